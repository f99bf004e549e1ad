"""The C library's heap, told to keep what a training step gives back, because the next one asks for it again."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""glibc's <malloc.h>"""
NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Large blocks that are freed stay with this process, for the next of their size. Whether the system can do that.

    Without it glibc gives every tensor of more than 32 MiB (logits, the gradient of the embedding) back to the system
    and fetches it again, page by page, zeroed: of a step on a processor with GPT-2's vocabulary that was a fifth. The
    same as MALLOC_MMAP_MAX_=0 and MALLOC_TRIM_THRESHOLD_=2147483647 in the environment. Bits do not change. Elsewhere
    than with glibc (Windows, macOS, musl) it does nothing.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # musl has no mallopt, or one that returns 0.
    return mallopt is not None and mallopt(M_MMAP_MAX, 0) == 1 and mallopt(M_TRIM_THRESHOLD, NEVER) == 1
