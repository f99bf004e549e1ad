"""Processes that read ahead of training. Signals are training's, which needs batches to end its step."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import context
from multiprocessing.context import BaseContext

ALL_PROCESSES = [getattr(signal, name) for name in ("SIGINT", "SIGHUP", "SIGTERM") if hasattr(signal, name)]
"""What a terminal, or a system that shuts down, sends to all processes of a run."""


def quiet_context() -> BaseContext:
    """The system's way to start processes, or the one that was chosen; they begin with signals held back.

    `leave_signals_to_training` comes only after their imports, which take seconds.
    """
    quiet = QUIET_CONTEXTS.get(multiprocessing.get_start_method())
    return multiprocessing.get_context() if quiet is None else quiet()


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """From this thread, until the block ends, and from the processes that are started inside."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ALL_PROCESSES)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Quiet:
    def start(self) -> None:
        with _signals_held_back():
            super().start()  # type: ignore[misc]


QUIET_CONTEXTS: dict[str, type[BaseContext]] = {}
if os.name == "posix":  # Windows has no mask to inherit

    class QuietFork(_Quiet, context.ForkProcess):
        """Named, as the others, because a process that is spawned receives itself by pickle."""

    class QuietSpawn(_Quiet, context.SpawnProcess): ...

    class QuietForkServer(_Quiet, context.ForkServerProcess): ...

    class QuietForkContext(context.ForkContext):
        Process = QuietFork

    class QuietSpawnContext(context.SpawnContext):
        Process = QuietSpawn

    class QuietForkServerContext(context.ForkServerContext):
        Process = QuietForkServer

    QUIET_CONTEXTS |= {"fork": QuietForkContext, "spawn": QuietSpawnContext, "forkserver": QuietForkServerContext}


def leave_signals_to_training(worker: int) -> None:
    """The worker_init_fn.

    SIGTERM counts from the training process alone: so Python ends its workers, and waits for them at its own end.
    """
    for name in ("SIGINT", "SIGBREAK", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if sys.platform == "linux":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=end_with_training, daemon=True).start()
    elif os.name == "posix":  # nothing says who sent a signal
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def end_with_training() -> None:
    training = multiprocessing.parent_process()  # os.getppid() may be the server that forks
    assert training is not None
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != training.pid:
        pass
    os._exit(0)
