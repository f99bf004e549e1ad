"""Several real processes on this machine: joined under gloo, a run on several devices without the devices."""

import multiprocessing
import os
import pickle
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

Result = TypeVar("Result")

PATIENCE = timedelta(minutes=10)
"""The longest wait for another process; without one, loops that no longer take the same steps would hang."""


def run_together(processes: int, work: Callable[..., Result], *arguments: Any) -> list[Result]:
    """The results of work(*arguments) in each of several new processes, in the order of their ranks.

    They form one gloo process group and share the threads of this process evenly. `work`, its arguments and its results
    travel by pickle.
    """
    threads = max(1, torch.get_num_threads() // processes)
    return in_new_processes(processes, in_a_group, processes, threads, work, *arguments, method=quick_start())


def in_new_processes(
    processes: int, work: Callable[..., Result], *arguments: Any, method: str = "spawn"
) -> list[Result]:
    """The results of work(rank, folder, *arguments) in each of several new processes.

    folder: they share it   method: of multiprocessing
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # Pickled here: torch would hand the processes one memory to share, and all would train the same weights.
        start_processes(keep_result, (folder, pickle.dumps((work, arguments))), nprocs=processes, start_method=method)
        return [pickle.loads(result_file(folder, rank).read_bytes()) for rank in range(processes)]


def quick_start() -> str:
    """The start method: forkserver, whose copies of one process that has imported everything save seconds of imports.

    Not beside a GPU, which no process can use after its parent has looked at it, nor outside Linux, whose system
    libraries may not survive the copy: spawn there.
    """
    if sys.platform != "linux" or torch.cuda.is_available():
        return "spawn"
    multiprocessing.set_forkserver_preload(["nanogpt_lit.cli.fit", "nanogpt_lit.parity.runs"])
    return "forkserver"


def keep_result(rank: int, folder: Path, pickled: bytes) -> None:
    work, arguments = pickle.loads(pickled)
    result_file(folder, rank).write_bytes(pickle.dumps(work(rank, folder, *arguments)))


def result_file(folder: Path, rank: int) -> Path:
    return folder / f"result_{rank}.pickle"


def in_a_group(
    rank: int, folder: Path, processes: int, threads: int, work: Callable[..., Result], *arguments: Any
) -> Result:
    os.environ |= {
        # Both frameworks read here, rather than in the group, that they are not alone.
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",  # not used, and asked for
        # Or each would choose a number of threads of its own, and sums depend on it.
        "OMP_NUM_THREADS": str(threads),
    }
    torch.set_num_threads(threads)
    # A file brings them together where a port might be taken.
    store = dist.FileStore(str(folder / "rendezvous"), processes)  # type: ignore[attr-defined]  # not in its __all__
    dist.init_process_group("gloo", store=store, rank=rank, world_size=processes, timeout=PATIENCE)
    try:
        return work(*arguments)
    finally:
        dist.destroy_process_group()  # gloo's threads would abort the interpreter's exit


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
