"""The fake CUDA device of this process: its settings and its counters. It is there where libcuda.so.1 is preloaded."""

import ctypes
import json
from typing import Any

_LIBRARY = ctypes.CDLL(None)


def is_here() -> bool:
    return hasattr(_LIBRARY, "fake_cuda_report")


def configure(**settings: int) -> None:
    """lag (launches), others_mib, page_lock_mib, arithmetic, registers_pages (0 or 1), new_peak (the peak is counted
    from here). Raises KeyError for any other."""
    for name, value in settings.items():
        if _LIBRARY.fake_cuda_set(name.encode(), ctypes.c_long(value)):
            raise KeyError(name)


def report() -> dict[str, Any]:
    """used_mib, peak_mib, page_locked_mib, page_locked_peak_mib, launches, products, copies, allocations, refused,
    registrations_refused, waits, synchronizations, sources_changed"""
    _LIBRARY.fake_cuda_report.restype = ctypes.c_char_p
    return json.loads(_LIBRARY.fake_cuda_report())
