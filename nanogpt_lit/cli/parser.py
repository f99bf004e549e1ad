"""The command line's parser: Lightning's, with mistakes reported in one sentence each."""

import difflib
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml  # type: ignore[import-untyped]
from jsonargparse import Namespace, get_loader, set_loader
from jsonargparse.typing import Path as ParsedPath
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser

from nanogpt_lit.errors import UserError, shown
from nanogpt_lit.runtime.precision import OTHER_NAMES
from nanogpt_lit.untrusted.config_values import check_arguments, check_numbers, check_paths
from nanogpt_lit.untrusted.imports import limit_imports, refusal, split_trusted
from nanogpt_lit.untrusted.yaml_file import check_yaml, read_yaml_file

WORDS = {
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "list": "a list, as [a, b]",
    "dict": "a mapping",
    "NoneType": "null",
}


load_yaml, read_text = get_loader("yaml"), ParsedPath.read_text
LONGEST_SENTENCE = 1000


def load_bounded(text: str) -> Any:
    """jsonargparse's own reading of a value, which may be any text."""
    check_yaml(text)
    try:
        return load_yaml(text)
    except (ValueError, RecursionError, OverflowError) as error:
        raise yaml.YAMLError(str(error)) from error


def read_bounded(path: ParsedPath) -> str:
    return read_text(path) if str(path) == "-" else read_yaml_file(Path(path.absolute))


# jsonargparse opens whatever file a value names, a pipe too, in the encoding of the machine.
set_loader("yaml", load_bounded, exceptions=(yaml.YAMLError,))
ParsedPath.read_text = read_bounded  # type: ignore[method-assign,assignment]


class Parser(LightningArgumentParser):
    """Says what is wrong in one sentence; the usage of fit alone would fill two screens.

    What it parses may come from anywhere: the room untrusted/ says what a configuration cannot do.
    """

    _is_parsing = False
    _helps_whole = False

    def parse_args(self, args: Sequence[str] | None = None, *more: Any, **options: Any) -> Namespace:  # type: ignore[override]
        """Parse and check settings. Raises UserError for those that name a place they may not."""
        if Parser._is_parsing:  # the parser of a command, called by that of all commands, which knows whom to trust
            return super().parse_args(args, *more, **options)
        trusted, args = split_trusted(sys.argv[1:] if args is None else args)
        Parser._helps_whole = args[-2:] in (["--help", "all"], ["-h", "all"])
        if Parser._helps_whole:
            args = args[:-1]
        limit_imports(trusted)
        check_arguments(args)
        Parser._is_parsing = True
        try:
            config = super().parse_args(args, *more, **options)
        except Mistake as mistake:
            raise UserError(str(mistake)) from mistake.__cause__
        except ImportError as error:  # a class_path where no class is expected is refused past jsonargparse's own net
            raise UserError(sentence(str(error), [])) from error
        finally:
            Parser._is_parsing = False
        settings = config[config.subcommand] if config.get("subcommand") else config
        check_numbers(settings.as_dict())
        check_paths(settings.as_dict())
        return config

    def instantiate(self, *arguments: Any, **options: Any) -> Namespace:
        """Build the classes. Raises UserError for one that cannot be made of what the configuration gives it."""
        try:
            return super().instantiate(*arguments, **options)
        except (ValueError, ImportError, MisconfigurationException) as error:
            cause: BaseException | None = error
            while cause is not None:
                if isinstance(cause, UserError):
                    raise cause from error
                if isinstance(cause, ImportError | MisconfigurationException):
                    reason = installable(" ".join(str(cause).split()).rstrip("."))
                    raise UserError(f"a class of the configuration cannot be made: {reason}.") from error
                cause = cause.__cause__
            raise

    def format_help(self, *more: Any, **options: Any) -> str:
        from nanogpt_lit.cli import help  # late, for few ask for it

        help.describe(self)
        return f"{super().format_help(*more, **options)}\n{help.beside()}" if Parser._helps_whole else help.short(self)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        cause: BaseException | None = ex
        while cause is not None:
            if isinstance(cause, UserError):  # a sentence already
                raise cause
            cause = cause.__cause__ or cause.__context__
        parser = getattr(ex, "subcommand_parser", None) or self
        text = shown(sentence(message, [action.dest for action in parser._actions]))
        if len(text) > LONGEST_SENTENCE:
            text = f"{text[: LONGEST_SENTENCE // 2]} ... {text[-LONGEST_SENTENCE // 2 :]}"
        raise Mistake(text) from ex


class Mistake(SystemExit):
    """The end of a parser: jsonargparse tries one type after the other, and would take any Exception for a no."""


def sentence(message: str, options: list[str]) -> str:
    """Say in one sentence what jsonargparse says in many lines. options: those that there are"""
    message = " ".join(message.split())
    keys, _, denied = message.partition("Importing '")
    if denied:
        key = (re.findall(r'Parser key "([\w.]+)"', keys) or [None])[-1]
        return refusal(denied.partition("'")[0], key)
    if unknown := re.search(r"(?:accept option|Option) '([\w.]+)'|unrecognized arguments: --([\w.-]+)", message):
        key = unknown[1] or unknown[2]
        nearest = difflib.get_close_matches(key, options, n=1)
        return f"there is no option {key}" + (f"; did you mean {nearest[0]}?" if nearest else "")
    if words := re.search(r"[Uu]nrecognized arguments: ([^-\s]\S*)", message):
        return f"{words[1]} stands alone; an option goes before it, as in --config {words[1]}"
    if number := re.search(r"Key must be a string, got: (\S+)\.", message):
        return f"a key of the configuration is {number[1]}, and keys are words, such as max_steps"
    key = named[1] if (named := re.match(r'Parser key "([\w.]+)": ', message)) else ""
    if text := re.search(r"Unable to load config '(.*?)'(?: -|$)", message):
        return f"{key}={text[1]} does not work; what does: keys below it, each as `max_steps: 1000`, with a space"
    if unmade := re.search(r"Problem with given class_path '([^']+)': (.*?)(?: - | Given value|$)", message):
        return f"{key}: there is no class {unmade[1]} that works there: {installable(unmade[2])}"
    if kind := re.search(r"Import path (\S+) does not correspond to a subclass of (\w+)", message):
        return f"{key}: {kind[1]} is no {kind[2]}, and only one of these works there"
    if "Subclass types expect one of" in message:
        given = re.search(r"Given value: (\S+)", message)
        return f"{key}={given[1] if given else ''} does not work; what does: class_path, with init_args below it"
    if wrong := re.fullmatch(
        r'Parser key "([\w.]+)": (.*?)(?:\.? Got| Given) value: (.*?)(?: - Expected .*| Given value.*)?', message
    ):
        _, reasons, value = wrong.groups()
        if works := accepted(reasons):
            precision = OTHER_NAMES.get(value.strip("'\"").lower()) if key == "trainer.precision" else None
            meant = f"; did you mean {precision}?" if precision else ";"
            return f"{key}={value} does not work{meant} what does: {', '.join(works)}"
    return re.sub(r'^Parser key "([\w.]+)":', r"\1:", message)


def installable(reason: str) -> str:
    """A reason, in which Lightning says of a package that it is not there, and pip's line for it."""
    if missing := re.search(r"Requirement '([\w-]+)[^']*' not met|No module named '(\w+)'", reason):
        name = missing[1] or missing[2]
        return f"it needs the package {name}: pip install {name}"
    return reason


def accepted(reasons: str) -> list[str]:
    """List what jsonargparse names as accepted: the values where it lists them, else the kinds of values."""
    reasons = reasons.partition("Subtypes:")[2].partition(" Errors:")[0] or reasons  # else each would be named twice
    found = []
    for literal, kind in re.findall(r"Literal\[([^\]]*)\]|<class '([\w.]+)'>|(?:list|List)\[", reasons):
        if not literal and not kind:
            kind = "list"
        values = [value.strip(" '") for value in literal.split(",")] if literal else [WORDS.get(kind, f"a {kind}")]
        found += [value for value in values if value not in found]
    return found
