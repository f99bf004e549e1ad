"""Work in a process of its own, forked from one that has imported everything and has not touched CUDA: its allocator
begins empty, and one import serves all. And a command of the project in such a process, with what it leaves behind."""

import gc
import multiprocessing
import os
import pickle
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from arithmetic import OnTheCPU
from fake_device import configure, report

import nanogpt_lit.cli.fit  # noqa: F401 - for all that are forked
from nanogpt_lit.__main__ import main

MIB = 2**20


class FailedError(Exception):
    """The end of what a process wrote before it failed."""


def apart(work: Callable[..., Any], *arguments: Any, log: Path) -> Any:
    """What work answers. Raises FailedError; all that the process wrote is in log."""
    gc.collect()
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)

    def child() -> None:
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))  # of a test, say
        there.send_bytes(pickle.dumps(work(*arguments)))

    process = context.Process(target=child)
    process.start()
    there.close()
    try:
        return pickle.loads(here.recv_bytes())
    except EOFError:
        lines = log.read_text(errors="replace").strip().splitlines() or ["without a word"]
        raise FailedError("\n".join(lines[-15:])) from None
    finally:
        process.join()


def command(
    arguments: Sequence[str],
    computes: bool = True,
    before: Callable[[], None] | None = None,
    program: Callable[[list[str]], int] = main,
) -> int:
    """The exit code of a command. computes: with arithmetic, or else what a kernel would make is not there
    before: called when the device is ready   program: in place of `python -m nanogpt_lit`
    """
    configure(arithmetic=int(computes))
    positions_from_the_host()
    if before is not None:
        before()
    with OnTheCPU() if computes else nullcontext():
        return program(list(arguments))


def peaks() -> dict[str, Any]:
    """Of this process: PyTorch's allocator beside the device's own account."""
    counted, statistics = report(), torch.cuda.memory_stats()
    return {
        "allocated_mib": round(torch.cuda.max_memory_allocated() / MIB, 1),
        "reserved_mib": round(torch.cuda.max_memory_reserved() / MIB, 1),
        "driver_mib": round(counted["peak_mib"], 1),
        "page_locked_mib": round(counted["page_locked_peak_mib"]),
        "out_of_memory": statistics["num_ooms"],
        "retries": statistics["num_alloc_retries"],
    }


def positions_from_the_host() -> None:
    """torch.arange's kernel writes nothing here, and an embedding in host memory reads the positions it was to make."""
    arange = torch.arange

    def on_host(*bounds: Any, device: Any = None, **options: Any) -> torch.Tensor:
        if device is None or torch.device(device).type != "cuda":
            return arange(*bounds, device=device, **options)
        return arange(*bounds, **options).to(device)

    torch.arange = on_host


def curves_of(run: Path) -> dict[str, dict[int, float]]:
    """What TensorBoard would draw of a run's folder: by tag and step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
