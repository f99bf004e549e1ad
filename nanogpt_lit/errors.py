"""The exceptions that are shown as one sentence, without a traceback."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from traceback import walk_tb


class UserError(ValueError):
    """A mistake that the user can mend: names the key or file, its value, and what would work.

    The command line prints the sentence and exits with 2. Every other exception is a defect and keeps its traceback.
    """


@contextmanager
def refused_by(package: str) -> Iterator[None]:
    """Tell as the user's mistake what a framework itself refuses, while it is built from settings and variables.

    An error that any other code raises is a defect, and keeps its traceback.
    """
    try:
        yield
    except UserError:
        raise
    except (ValueError, RuntimeError) as error:
        *_, (frame, _) = walk_tb(error.__traceback__)
        if f"{frame.f_globals.get('__name__')}.".startswith(f"{package}."):
            raise UserError(f"{' '.join(str(error).split())} ({package} says so)") from error
        raise


class NothingToDo(Exception):  # noqa: N818 - it is no error
    """Raised where all that was asked for is done already: the command line prints why, and exits with 0."""


def in_brief(error: BaseException) -> str:
    """Another library's error in one line: its class, and how its text begins."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"


def tell(line: str) -> None:
    """Print a line for the user beside the output, which may go to a file on a full disk."""
    with suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def shown(text: object) -> str:
    """Text for a terminal: what it would obey, and what no encoding holds, is written as an escape."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in str(text))
