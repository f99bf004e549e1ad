"""What a fit tells the supervisor that started it, by two files in a folder that the environment names.

Its output goes to the terminal as always: a supervisor that read it would take the progress line away.
"""

import json
import os
import shlex
import signal
import subprocess
import threading
from collections.abc import Sequence
from contextlib import suppress
from io import FileIO
from pathlib import Path

FOLDER = "NANOGPT_LIT_SUPERVISED"
"""The environment variable."""
TOKENS, ERROR = "tokens", "error"
"""The files: tokens trained on so far, and the error that ended the process."""


COMMAND = "NANOGPT_LIT_KEPT_ALIVE_BY"
"""The environment variable with the supervisor's own command, a list in JSON."""


def resume_command(program: Sequence[str], arguments: Sequence[str]) -> str:
    """What to type to go on with a run, quoted for the shell. program, arguments: that it was started with

    A run that is kept alive is gone on with by the command that keeps it alive.
    """
    if COMMAND in os.environ:
        words = json.loads(os.environ[COMMAND])
    else:
        words = [*program, *without(arguments, ("--resume", "--ckpt_path")), "--resume", "auto"]
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def without(arguments: Sequence[str], options: Sequence[str]) -> list[str]:
    """The arguments without these options and their values."""
    kept: list[str] = []
    words = iter(arguments)
    for word in words:
        if word in options:
            next(words, None)
        elif word.partition("=")[0] not in options:
            kept.append(word)
    return kept


def supervised() -> bool:
    return FOLDER in os.environ


def report_error(error: BaseException) -> None:
    """Leaves the error for the supervisor; of several processes of one run, the first has the cause."""
    with suppress(OSError), Path(os.environ[FOLDER], ERROR).open("x", encoding="utf-8", errors="replace") as file:
        file.write(" ".join(f"{type(error).__name__}: {error}".split()))


class Position:
    """Leaves, after every optimizer step, how far the run is. A killed process can no longer say it."""

    def __init__(self) -> None:
        self._file: FileIO | None = None
        if supervised():
            self._file = FileIO(Path(os.environ[FOLDER], TOKENS), "w")

        self.is_read = self._file is not None
        """Whether there is a supervisor to read it."""

    def write(self, tokens: int) -> None:
        """Costs microseconds: the page stays in memory, and survives the process."""
        assert self._file is not None, "nobody reads it"
        self._file.seek(0)
        self._file.write(b"%20d" % tokens)


def stop_with_supervisor() -> None:
    """Ends this process as SIGTERM does once its supervisor is gone; otherwise two would write one run after a restart.

    The supervisor holds the other end of standard input.
    """

    def wait() -> None:
        # Not sys.stdin, whose lock a waiting thread would hold when the interpreter ends.
        with suppress(OSError):
            while os.read(0, 1):
                pass
        signal.raise_signal(signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()
