"""What a fit tells the supervisor that started it, by two files in a folder that the environment names.

Its output goes to the terminal as always: a supervisor that read it would take the progress line away.
"""

import os
import signal
import threading
from contextlib import suppress
from io import FileIO
from pathlib import Path

FOLDER = "NANOGPT_LIT_SUPERVISED"
"""The environment variable."""
TOKENS, ERROR = "tokens", "error"
"""The files: tokens trained on so far, and the error that ended the process."""


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

    def write(self, tokens: int) -> None:
        """Costs microseconds: the page stays in memory, and survives the process."""
        if self._file is not None:
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
