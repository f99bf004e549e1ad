"""What a run sets for its whole process, in every loop: how float32 matrices are multiplied."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from nanogpt_lit.matmul import restored_matmul_backend, set_matmul_backend


@contextmanager
def restored_process_settings() -> Iterator[None]:
    """Put back at the end of a run, however it ends, what it has set for its process. Also a decorator."""
    with restored_matmul_backend():
        yield


def set_for_process(module: nn.Module, device: torch.device) -> None:
    """Called by every loop before its first batch. device: where the module computes"""
    set_matmul_backend(device, tf32=bool(getattr(module, "tf32", False)))
