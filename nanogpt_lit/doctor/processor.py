"""Whether the processors that torch would count are those that it may use."""

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from nanogpt_lit.doctor.finding import Finding

GIB = 2**30
NO_LIMIT = 2**60
"""What version 1 of control groups writes for none is a little below 2**63."""


def check_processor(root: Path = Path("/")) -> Iterator[Finding]:
    """root: where /proc and /sys are"""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, memory = cpu_quota(root), memory_limit(root)
    threads = int(text) if (text := os.environ.get("OMP_NUM_THREADS", "")).isdigit() else processors
    told = f"{processors} processor{'s' if processors > 1 else ''}"
    if memory is not None:
        told += f", at most {memory / GIB:.1f} GiB of memory"
    if quota is not None and threads > math.ceil(quota):
        yield Finding(
            "look",
            "processor",
            f"{told}, of which this container may use {quota:g}: torch would start {threads} threads that wait for "
            f"each other; set OMP_NUM_THREADS={math.ceil(quota)}",
        )
    else:
        yield Finding("ok", "processor", told)


def cpu_quota(root: Path) -> float | None:
    """Processors that the control groups of this process allow it; None without a limit."""

    def version_2(text: str) -> float | None:
        quota, _, period = text.partition(" ")
        return None if quota == "max" else int(quota) / int(period)

    limits = limits_of(root, "cpu.max", version_2)
    quota, period = (first_line(root / f"sys/fs/cgroup/cpu/cpu.cfs_{name}_us") for name in ("quota", "period"))
    if quota and period and int(quota) > 0:
        limits.append(int(quota) / int(period))
    return min(limits, default=None)


def memory_limit(root: Path) -> int | None:
    """Bytes that the control groups of this process allow it; None without a limit."""
    limits = limits_of(root, "memory.max", lambda text: None if text == "max" else int(text))
    if text := first_line(root / "sys/fs/cgroup/memory/memory.limit_in_bytes"):
        limits.append(int(text))
    return min((int(limit) for limit in limits if limit < NO_LIMIT), default=None)


def limits_of(root: Path, name: str, parse: Callable[[str], float | None]) -> list[float]:
    """What the group of this process and those around it say (version 2 of control groups): the least of them rules."""
    line = first_line(root / "proc/self/cgroup") or ""
    if not line.startswith("0::"):
        return []
    mounted = root / "sys/fs/cgroup"
    group = mounted / line.removeprefix("0::").strip("/")
    around = [mounted, *(folder for folder in (group, *group.parents) if mounted in folder.parents)]
    texts = [first_line(folder / name) for folder in around]
    return [limit for text in texts if text and (limit := parse(text)) is not None]


def first_line(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").partition("\n")[0]
    except OSError:
        return None
