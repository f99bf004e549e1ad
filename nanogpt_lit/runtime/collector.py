"""A quick start: no garbage collection while modules are imported, and no import that no command needs."""

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
    with no_collector(), _no_metrics_of_transformers():
        yield
        gc.freeze()


@contextmanager
def _no_metrics_of_transformers() -> Iterator[None]:
    """Have torchmetrics, which Lightning imports, leave out its metrics that need transformers: where that is
    installed, its import takes more than a second."""
    from unittest.mock import patch

    try:
        from lightning_utilities.core.imports import RequirementCache
    except ImportError:  # which the doctor reports
        yield
        return
    is_met = RequirementCache.__bool__

    def is_met_but_for_them(self: RequirementCache) -> bool:
        return not (self.requirement or "").startswith("transformers") and is_met(self)

    with patch.object(RequirementCache, "__bool__", is_met_but_for_them):
        yield
