"""Values by which a stranger's file describes a network: read as sizes and numbers, or held to the one of ours."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanogpt_lit.errors import UserError

NEEDED: Any = object()
"""In place of a default, for a key that has to be there."""


class ForeignValues:
    """Values by their keys. Raises UserError, naming the file and the key, for what is none.

    prefix: of the keys in the file
    """

    def __init__(self, path: Path, values: Mapping[str, Any], prefix: str = "") -> None:
        self.path, self.values, self.prefix = path, values, prefix

    def get(self, key: str, default: Any) -> Any:
        value = self.values.get(f"{self.prefix}{key}", default)
        if value is NEEDED:
            raise UserError(f"{self.path} lacks {self.prefix}{key}, which says the network's shape.")
        return value

    def size(self, key: str, default: int | None = NEEDED) -> Any:
        """A size. A default of None may stay None."""
        value = self.get(key, default)
        if not (value is None and default is None) and (type(value) is not int or not 1 <= value < 2**31):
            raise self.wrong(key, value, "which is no size")
        return value

    def number(self, key: str, default: float = NEEDED) -> float:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.wrong(key, value, "which is no number")
        return float(value)

    def check(self, only: Mapping[str, Any]) -> None:
        """Check the keys that our network has no choice of. only: its values, and those of a key that is not there"""
        for key, ours in only.items():
            if (value := self.get(key, ours)) != ours:
                raise self.wrong(key, value, f"and this network has {ours!r} and nothing else")

    def wrong(self, key: str, value: Any, why: str) -> UserError:
        return UserError(f"{self.path} has {self.prefix}{key}={value!r:.60}, {why}.")
