"""How much memory each loop takes, each in a process of its own."""

import sys
from pathlib import Path

import torch

from nanogpt_lit.data.datamodule import TokenDataModule
from nanogpt_lit.parity.processes import in_new_processes
from nanogpt_lit.parity.runs import LOOPS, Case, quiet

WHAT_IT_IS = (
    "Growth of a fresh process's peak resident memory from just before the loop is called to its end: weights, "
    "gradients, optimizer states, activations, the comparison's own copies, and what the loop's library loads and "
    "keeps. The libraries' import is not in it."
)


def peak_growth_mib(case: Case, data: TokenDataModule) -> dict[str, float] | None:
    """By loop; None on a system that does not tell a process its peak (Windows)."""
    if peak_bytes() is None:
        return None
    data.position = None
    grown = in_new_processes(len(LOOPS), grow, case, data, torch.get_num_threads())
    return dict(zip(LOOPS, grown, strict=True))


def grow(rank: int, folder: Path, case: Case, data: TokenDataModule, threads: int) -> float:
    quiet()
    torch.set_num_threads(threads)
    before = peak_bytes()
    list(LOOPS.values())[rank](case, data)
    after = peak_bytes()
    assert before is not None
    assert after is not None
    return (after - before) / 2**20


def peak_bytes() -> int | None:
    """The most memory that this process has held at once."""
    status = Path("/proc/self/status")
    if status.is_file():
        # Not getrusage: on Linux its maximum is handed down from the parent through exec.
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return None
