"""YAML that may come from anywhere: measured before anything is built from it, so that no file costs memory or time.

PyYAML builds nested lists by recursion in C, where 100,000 brackets end the process, and repeats what an alias names
as often as it is asked to. Its events come one at a time, and nothing is built from them: they are counted first.
"""

import re
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from nanogpt_lit.errors import UserError

LARGEST = 2**18
"""Bytes. A whole configuration of ours has a hundredth of it."""
DEEPEST = 50
MOST_VALUES = 10_000
"""Most values, those that aliases repeat included."""
LONGEST_NUMBER = 100
MOST_OPEN_BRACKETS = 200
"""Most open brackets in a text, which the command line's parser may read as YAML again."""
TAGS = (None, "!", *(f"tag:yaml.org,2002:{name}" for name in ("str", "seq", "map")))
"""Any other builds something else than its value looks like."""

Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class TooMuch(yaml.YAMLError):
    """More than any configuration needs."""


def load_yaml_file(path: Path) -> Any:
    """Load a file as plain values. Raises UserError as `read_yaml_file` does."""
    return yaml.safe_load(read_yaml_file(path))


def read_yaml_file(path: Path) -> str:
    """The text of a YAML file. Raises UserError, naming the file, for one that is no text, no YAML, or too much."""
    if path.exists() and not path.is_file():  # a pipe would keep us waiting, /dev/zero has no end
        raise UserError(f"{path} is {'a folder' if path.is_dir() else 'no regular file'}; a YAML file works.")
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}).") from error
    if len(content) > LARGEST:
        raise UserError(f"{path} is larger than {LARGEST // 1024} KiB, and no configuration is.")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        encoding = "UTF-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "not UTF-8"
        line = content[: error.start].count(b"\n") + 1
        raise UserError(f"{path} is {encoding}, in line {line}; save it as UTF-8.") from error
    try:
        check_yaml(text)
        _check_keys(yaml.compose(text, Loader), set())
        yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{path} cannot be read as YAML: {reason(error, text)}.") from error
    except (ValueError, RecursionError, OverflowError) as error:  # of a date or a number that is none
        raise UserError(f"{path} cannot be read as YAML: {' '.join(str(error).split())[:200]}.") from error
    return text


def check_yaml(text: str) -> None:
    """Check a text, building nothing. Raises TooMuch for what would cost memory or time, YAMLError for no YAML."""
    if len(text) > LARGEST:
        raise TooMuch(f"it is longer than {LARGEST:,} characters")
    sizes: dict[str, int] = {}  # of what an anchor names, in values
    around: list[tuple[str | None, int]] = []  # (anchor, values before it), of the lists and mappings that are open
    values = 0
    for event in yaml.parse(text, Loader):
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise TooMuch(f"*{event.anchor} in line {line} stands for what it is part of, or for nothing")
            values += sizes[event.anchor]
        elif isinstance(event, yaml.CollectionStartEvent | yaml.ScalarEvent):
            if event.tag not in TAGS:
                raise TooMuch(f"the tag {event.tag[:40]} in line {line} is not read; plain values are")
            values += 1
            if isinstance(event, yaml.ScalarEvent):
                _check_scalar(event, line)
                if event.anchor:
                    sizes[event.anchor] = 1
            else:
                around.append((event.anchor, values - 1))
                sizes.pop(event.anchor, None)  # until its end it would stand for itself
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = around.pop()
            if anchor:
                sizes[anchor] = values - before
        if len(around) > DEEPEST:
            raise TooMuch(f"line {line} is nested more than {DEEPEST} deep")
        if values > MOST_VALUES:
            raise TooMuch(f"up to line {line} it holds more than {MOST_VALUES:,} values")


def _check_keys(node: yaml.Node | None, seen: set[int]) -> None:
    """Raises TooMuch for a key that is written twice: the library takes the second and drops the first."""
    if not isinstance(node, yaml.CollectionNode) or id(node) in seen:
        return
    seen.add(id(node))
    lines: dict[str, int] = {}
    for item in node.value:
        for part in item if isinstance(item, tuple) else [item]:
            _check_keys(part, seen)
        if isinstance(item, tuple) and isinstance(item[0], yaml.ScalarNode):
            key, line = item[0].value, item[0].start_mark.line + 1
            if lines.setdefault(key, line) != line:
                raise TooMuch(f"{key[:40]} is in line {lines[key]} and again in line {line}; write one of them")


def _check_scalar(event: yaml.ScalarEvent, line: int) -> None:
    text = event.value
    if not event.style and len(text) > LONGEST_NUMBER and re.fullmatch(r"[-+.]?[0-9][0-9a-fA-FxXoO_:.+-]*", text):
        raise TooMuch(f"the number in line {line} has {len(text):,} digits")
    depth = deepest = 0
    for character in text if "[" in text or "{" in text else "":
        depth += (character in "[{") - (character in "]}")
        deepest = max(deepest, depth)
    if deepest > MOST_OPEN_BRACKETS:
        raise TooMuch(f"the text in line {line} opens {deepest:,} brackets")


def reason(error: yaml.YAMLError, text: str) -> str:
    """Say in one line, with the line of the file, what the library says in several."""
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None)
    if mark is None or problem is None:
        return " ".join(str(error).split())[:200]
    if "\t" in "".join(text.splitlines()[mark.line : mark.line + 1]):
        problem = "a tab; indent with spaces"
    elif problem.startswith("but "):  # "expected a single document in the stream, but found another document"
        problem = f"{error.context}, {problem}"
    return f"{problem[:200]} (line {mark.line + 1})"
