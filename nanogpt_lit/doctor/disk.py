"""Whether checkpoints fit the disk of a run, and how long one takes."""

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from nanogpt_lit.doctor.finding import Finding

GPT2_CHECKPOINT_BYTES = 1_500_000_000
"""Weights and AdamW's moments of 124M parameters, in float32."""
TRIED_BYTES = 64 * 2**20
SLOW_BYTES_PER_S = 30e6


def check_disk(folder: Path, checkpoint_bytes: int | None) -> Iterator[Finding]:
    """Of the disk that `folder` is, or will be, on. checkpoint_bytes: the size of the run's; None before the first"""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    size = checkpoint_bytes or GPT2_CHECKPOINT_BYTES
    whose = "one of this run's" if checkpoint_bytes else "one of GPT-2's"
    free = shutil.disk_usage(there).free
    told = f"{free / 1e9:,.1f} GB free in {there}"
    # A new one is written beside the one that it replaces, and that one beside its own predecessor.
    if free < 3 * size:
        fails = checkpoint_bytes is not None and free < 1.1 * size
        told += f", and a checkpoint like {whose} takes {size / 1e9:,.2f}: make room for three"
        yield Finding("wrong" if fails else "look", "space", told)
    else:
        yield Finding("ok", "space", told)
    if free < 4 * TRIED_BYTES:
        return
    try:
        rate = bytes_per_s(there)
    except OSError as error:
        told = f"{there} cannot be written ({error.strerror}): name another folder, or ask its owner"
        yield Finding("wrong", "disk", told)
        return
    told = f"{rate / 1e6:,.0f} MB/s written to the disk, {size / rate:,.1f} s for a checkpoint like {whose}"
    if rate < SLOW_BYTES_PER_S:
        yield Finding("look", "disk", f"{told}: another disk saves faster")
    else:
        yield Finding("ok", "disk", told)


def bytes_per_s(folder: Path) -> float:
    """Of a file written and brought to the disk, as a checkpoint is."""
    block = os.urandom(2**20)  # zeros would be compressed by some disks
    started_s = time.perf_counter()
    with tempfile.TemporaryFile(dir=folder) as file:
        for _ in range(TRIED_BYTES // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return TRIED_BYTES / (time.perf_counter() - started_s)
