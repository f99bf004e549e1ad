"""Python's garbage collector, kept from looking where there is nothing to find."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_collector() -> Iterator[None]:
    """Pause Python's garbage collector: what refers to itself in a cycle is freed after the block."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def quick_imports() -> Iterator[None]:
    """Pause the collector for the first import of torch and Lightning: some 400,000 objects that stay until the end.

    To look through them while they are made, and ever again, takes a third of the time of a short command. In a
    process that has torch already it does nothing.
    """
    if "torch" in sys.modules:
        yield
        return
    with no_collector():
        yield
        gc.freeze()
