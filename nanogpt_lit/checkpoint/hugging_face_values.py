"""Values of a config.json from a stranger."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanogpt_lit.errors import UserError


def check_as_ours(described: Mapping[str, Any], only: Mapping[str, Any], path: Path) -> None:
    """Raises UserError for a key with another value than the one that our network has.

    only: those values, which are also what a key stands for that is not there
    """
    for key, ours in only.items():
        if (value := described.get(key, ours)) != ours:
            raise UserError(f"{path} has {key}={value!r}; this network has {ours!r} and nothing else.")


def sizes_of(described: Mapping[str, Any], keys: Mapping[str, tuple[str, int | None]], path: Path) -> dict[str, Any]:
    """Sizes under our names. keys: our name, theirs, and the size where theirs is not there; None may stay None

    Raises UserError, naming the file and the key, for what is no size.
    """
    sizes = {}
    for ours, (theirs, default) in keys.items():
        size = described.get(theirs, default)
        if not (size is None and default is None) and (type(size) is not int or not 1 <= size < 2**31):
            raise UserError(f"{path} has {theirs}={size!r}, which is no size.")
        sizes[ours] = size
    return sizes


def number_of(described: Mapping[str, Any], key: str, default: float, path: Path) -> float:
    value = described.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{path} has {key}={value!r}, which is no number.")
    return float(value)
