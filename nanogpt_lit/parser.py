"""The command line's parser: Lightning's, with mistakes told in one sentence."""

import difflib
import re
import sys
from typing import NoReturn

from lightning.pytorch.cli import LightningArgumentParser

WORDS = {
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "list": "a list",
    "dict": "a mapping",
    "NoneType": "null",
}


class Parser(LightningArgumentParser):
    """Says what is wrong in one sentence; the usage of fit alone would fill two screens."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        parser = getattr(ex, "subcommand_parser", None) or self
        print(f"error: {sentence(message, [action.dest for action in parser._actions])}", file=sys.stderr)
        sys.exit(2)


def sentence(message: str, options: list[str]) -> str:
    """What jsonargparse says in many lines. options: those that there are"""
    message = " ".join(message.split())
    if unknown := re.search(r"does not accept option '([\w.]+)'|unrecognized arguments: --([\w.-]+)", message):
        key = unknown[1] or unknown[2]
        nearest = difflib.get_close_matches(key, options, n=1)
        return f"there is no option {key}" + (f"; did you mean {nearest[0]}?" if nearest else "")
    if wrong := re.fullmatch(r'Parser key "([\w.]+)": (.*?)(?:\.? Got| Given) value: (.*)', message):
        key, reasons, value = wrong.groups()
        if works := accepted(reasons):
            return f"{key}={value} does not work; what does: {', '.join(works)}"
    return message


def accepted(reasons: str) -> list[str]:
    """What jsonargparse names as accepted: the values themselves where it lists them, else the kinds of values."""
    reasons = reasons.partition("Subtypes:")[2].partition(" Errors:")[0] or reasons  # else each would be named twice
    found = []
    for literal, kind in re.findall(r"Literal\[([^\]]*)\]|<class '([\w.]+)'>", reasons):
        values = [value.strip(" '") for value in literal.split(",")] if literal else [WORDS.get(kind, f"a {kind}")]
        found += [value for value in values if value not in found]
    return found
