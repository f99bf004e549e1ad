"""One line of the doctor's."""

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "look", "wrong"]
"""Nothing to do; something that may cost time, or comfort; something that fails, or will."""


@dataclass(frozen=True)
class Finding:
    level: Level
    check: str
    """What was looked at, in a word."""
    text: str
    """What is so, and unless it is ok, what to do."""

    def __str__(self) -> str:
        line = f"{self.level:<6} {self.check:<11} {self.text}"
        # Names of files and settings may come from elsewhere, with signs in them that a terminal would obey.
        return "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in line)
