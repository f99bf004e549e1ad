"""A run has one writer: its folder is locked while it is trained, and names the process.

The operating system's lock on a file ends with the process that holds it, killed or not. Where a file system has no
such locks, or (NFS, mounted so) keeps them to one machine, signs of life decide: the holder touches a file of its own
every few seconds, and one that has stopped doing so is dead.
"""

import json
import os
import platform
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from filelock import FileLock, Timeout

from nanogpt_lit.errors import UserError, tell
from nanogpt_lit.runtime.durable import write_durably

LOCK, HOLDER = "training.lock", "training.json"
SIGN_S = 10.0
"""Between two signs of life."""
SILENT_S = 45.0
"""After so long without one, a holder is taken for dead: some signs, and the time for which NFS remembers a file."""


@dataclass(frozen=True)
class Holder:
    pid: int
    host: str
    since: str

    @classmethod
    def this_process(cls) -> Self:
        return cls(os.getpid(), platform.node(), time.strftime("%Y-%m-%d %H:%M:%S"))

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


class RunLock:
    """The lock of one run's folder, for this process and those that it starts."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        """The folder that is locked."""
        self._lock: Any = None
        self._ended: threading.Event | None = None

    def acquire(self, folder: Path) -> None:
        """Take the lock. Waits where the holder is probably dead; without effect where this process has it already.

        Raises UserError where another process trains the run.
        """
        if self.folder == folder:
            return
        self._acquire(folder)
        self.folder = folder
        with suppress(OSError):  # a full disk is told of at the first save
            write_durably(folder / HOLDER, json.dumps(asdict(Holder.this_process())))
        self._ended = threading.Event()
        threading.Thread(target=give_signs, args=(folder, self._ended), name="run lock", daemon=True).start()

    def release(self) -> None:
        """Release the lock. Without effect where this process does not hold it."""
        if self._ended is not None and self.folder is not None:
            self._ended.set()
            self._ended = None
            with suppress(OSError):
                (self.folder / HOLDER).unlink()
        self._let_go()
        self.folder = None

    def __getstate__(self) -> dict[str, Any]:
        """The state for a process that this one starts, and that trains in its stead."""
        return {"folder": self.folder, "_lock": None, "_ended": None}

    def _acquire(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        before, until_s, reported = sign_of(folder), time.monotonic() + SILENT_S, False
        while True:
            locked, holder = self._lock_file(folder / LOCK), read_holder(folder)
            if locked is not False and is_gone(holder, locked=bool(locked)):
                return
            sign = sign_of(folder)
            alive = sign not in (None, before) or (locked is False and holder is not None and is_running(holder))
            silent = time.monotonic() >= until_s or (locked is not False and silence_s(folder) > SILENT_S)
            if alive or (silent and locked is False):
                self._let_go()
                raise UserError(
                    f"{folder} is being trained by {holder or 'another process'}. Wait until that has ended, stop it "
                    "(by a file called stop in that folder), or set another trainer.default_root_dir."
                )
            if silent:
                return
            if not reported:
                tell(f"{folder} was trained by {holder}; waiting up to {SILENT_S:g} s for a sign of it")
                reported = True
            time.sleep(0.5)

    def _lock_file(self, path: Path) -> bool | None:
        """True where the operating system gives us its lock; None where it has none for this file system."""
        if self._lock is not None:
            return True
        lock = FileLock(path, thread_local=False)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return False
        except PermissionError:
            raise
        except (OSError, NotImplementedError):
            return None
        self._lock = lock
        return True

    def _let_go(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None


def is_gone(holder: Holder | None, locked: bool) -> bool:
    """True where the process that held the run is known to be gone. On this machine, a lock that was free proves it."""
    return holder is None or (holder.host == platform.node() and (locked or not is_running(holder)))


def sign_of(folder: Path) -> int | None:
    """The time of the holder's latest sign; None where there is none."""
    try:
        # Opened, not only asked for: NFS may answer from memory otherwise.
        with (folder / HOLDER).open("rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except OSError:
        return None


def silence_s(folder: Path) -> float:
    """Since the holder's latest sign, by the clock of the machine that the files are on."""
    if (sign := sign_of(folder)) is None:
        return 0.0
    (folder / LOCK).touch()
    return ((folder / LOCK).stat().st_mtime_ns - sign) / 1e9


def give_signs(folder: Path, ended: threading.Event) -> None:
    while not ended.wait(SIGN_S):
        with suppress(OSError):
            os.utime(folder / HOLDER)


def read_holder(folder: Path) -> Holder | None:
    """Who trains the run, or did when it was killed. None where nobody does, or the file is not whole."""
    try:
        holder = Holder(**json.loads((folder / HOLDER).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    known = isinstance(holder.host, str) and isinstance(holder.pid, int) and 0 < holder.pid < 2**31
    return holder if known else None


def is_running(holder: Holder) -> bool:
    """True also where this process cannot know: on another machine, and on Windows, where the lock says it."""
    if holder.host != platform.node() or sys.platform == "win32":
        return True
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
