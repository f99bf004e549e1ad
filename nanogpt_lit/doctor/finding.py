"""A line of the doctor's: how something is, and what to do about it."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from nanogpt_lit.errors import UserError, in_brief


@dataclass(frozen=True)
class Finding:
    level: Literal["ok", "look", "wrong"]
    """ok: nothing to do; look: something that may cost time, or comfort; wrong: something that fails, or will."""
    check: str
    """The subject, in a word."""
    text: str
    """The state, and unless it is ok, what to do."""

    def __str__(self) -> str:
        line = f"{self.level:<6} {self.check:<11} {self.text}"
        # Names of files and settings may come from elsewhere, with characters in them that a terminal would obey.
        return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line)


def unless_it_fails(name: str, check: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """The findings of a check; one that breaks is a finding itself."""
    try:
        yield from check()
    except Exception as error:
        yield failed(name, error)


def failed(name: str, error: Exception) -> Finding:
    """The finding of a check that an error has ended: a sentence of ours, a missing package, or anything else."""
    if isinstance(error, UserError):
        return Finding("wrong", name, str(error).rstrip("."))
    reason = f"could not be looked at ({in_brief(error)})"
    if isinstance(error, ModuleNotFoundError) and error.name is not None:
        reason += f": pip install --force-reinstall {error.name.partition('.')[0]}"
    return Finding("wrong", name, reason)
