import subprocess
import sys

import pytest

TEN_LARGE_BLOCKS = """
import ctypes, resource, sys
from nanogpt_lit.runtime.process_settings import keep_freed_memory

if sys.argv[1] == "kept":
    assert keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = libc.memset.argtypes = libc.free.argtypes = None

def use_block():
    block = ctypes.c_void_p(libc.malloc(ctypes.c_size_t(SIZE)))
    libc.memset(block, 1, ctypes.c_size_t(SIZE))
    libc.free(block)

SIZE = 64 * 2**20  # above what glibc ever keeps by itself, 32 MiB
use_block()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    use_block()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(how):
    answer = subprocess.run([sys.executable, "-c", TEN_LARGE_BLOCKS, how], capture_output=True, text=True, check=True)
    return int(answer.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a setting of glibc")
def test_a_large_block_that_was_freed_is_used_again_without_a_page_fault():
    assert page_faults("as it comes") > 10  # at least one for each block, however large the system's pages are
    assert page_faults("kept") < 10  # not one for each: a few may be the interpreter's own


def test_elsewhere_than_on_linux_it_does_nothing_and_says_so(monkeypatch):
    from nanogpt_lit.runtime import process_settings

    monkeypatch.setattr(process_settings.sys, "platform", "win32")
    monkeypatch.setattr(process_settings.ctypes, "CDLL", None)
    assert not process_settings.keep_freed_memory()
