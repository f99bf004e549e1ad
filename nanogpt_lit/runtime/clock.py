"""Two clocks: one stands still while the machine sleeps, the other does not. A week on a laptop has nights in it."""

import sys
import time
from collections.abc import Callable

LONG_S = 5.0
"""Shorter differences of the two are their own inaccuracy."""


def unbiased_s() -> float:
    """Windows' seconds awake; its other clocks, Python's among them, count what it slept."""
    import ctypes

    hundreds_of_ns = ctypes.c_ulonglong()
    ctypes.windll.kernel32.QueryUnbiasedInterruptTime(ctypes.byref(hundreds_of_ns))  # type: ignore[attr-defined]
    return hundreds_of_ns.value / 1e7


# Of Linux CLOCK_MONOTONIC, of macOS mach_absolute_time: neither counts sleep.
awake_s: Callable[[], float] = unbiased_s if sys.platform == "win32" else time.monotonic
"""Seconds that the machine was awake, from some moment on."""


_command_began_s: float | None = None


def begin_command() -> None:
    """Note that a command begins. To be called before the libraries are imported, which takes seconds."""
    global _command_began_s
    _command_began_s = awake_s()


def command_began_s() -> float | None:
    """The awake_s() at which this process's command began; None in a program of the user's own."""
    return _command_began_s


def elapsed_s() -> float:
    """Seconds, awake or asleep, from some moment on."""
    if sys.platform == "linux":
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    if sys.platform == "darwin":
        return time.clock_gettime(time.CLOCK_MONOTONIC)  # which there goes on in sleep
    return time.monotonic()


class Sleeps:
    """Notices that the machine has slept."""

    def __init__(self, elapsed: Callable[[], float] = elapsed_s, awake: Callable[[], float] = awake_s) -> None:
        self._elapsed, self._awake = elapsed, awake
        self._asleep_s = self._elapsed() - self._awake()

    def since_last_s(self) -> float:
        """Seconds slept since the last call that returned any, or since the beginning; 0 for none."""
        asleep_s = self._elapsed() - self._awake()
        slept_s = asleep_s - self._asleep_s
        if slept_s < LONG_S:
            return 0.0
        self._asleep_s = asleep_s
        return slept_s
