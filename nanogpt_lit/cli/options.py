"""The parser of a command that has options of its own. Light, so that `--help` answers before torch is imported."""

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from nanogpt_lit.errors import UserError


class OptionParser(argparse.ArgumentParser):
    """A parser whose errors are one sentence, as those of any other command."""

    def error(self, message: str) -> NoReturn:
        hint = "" if message.endswith(".") else f"; `{self.prog} --help` lists what there is."
        raise UserError(message + hint)


def program() -> str:
    """This program as it was called."""
    return "nanogpt-lit" if Path(sys.argv[0]).stem == "nanogpt-lit" else "python -m nanogpt_lit"


def parser_of(command: str, description: str, usage: str | None = None) -> OptionParser:
    """usage: what follows the command; None lists its options"""
    prog = f"{program()} {command}"
    usage = None if usage is None else f"{prog} {usage}"
    return OptionParser(prog=prog, usage=usage, description=description, allow_abbrev=False)
