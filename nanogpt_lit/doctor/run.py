"""Disk, shards and checkpoints of a run, compared with their checksums. NumPy and torch are imported late."""

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from nanogpt_lit.doctor.finding import Finding, unless_it_fails
from nanogpt_lit.errors import UserError
from nanogpt_lit.runtime.durable import PARTIAL, check_writable

SUFFIX, SHARDS = ".safetensors", ".shards"
"""Endings of a checkpoint and of the folder with its parts, as in checkpoint/, which imports torch."""
GPT2_CHECKPOINT_BYTES = 1_500_000_000
"""Weights and AdamW's moments of 124M parameters, in float32."""
TRIED_BYTES = 64 * 2**20
SLOW_BYTES_PER_S = 30e6


def check_disk(folder: Path, checkpoint_bytes: int | None) -> Iterator[Finding]:
    """Check whether checkpoints fit the disk that `folder` is, or will be, on, and how long one takes.

    checkpoint_bytes: the size of the run's; None before the first
    """
    check_writable("trainer.default_root_dir", folder)
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    size = checkpoint_bytes or GPT2_CHECKPOINT_BYTES
    whose = "one of this run's" if checkpoint_bytes else "one of GPT-2's"
    free = shutil.disk_usage(there).free
    text = f"{free / 1e9:,.1f} GB free in {there}"
    # A new one is written beside the one that it replaces, and that one beside its own predecessor.
    if free < 3 * size:
        fails = free < (1.1 * size if checkpoint_bytes is not None else TRIED_BYTES)
        text += f", and a checkpoint like {whose} takes {size / 1e9:,.2f}: make room for three"
        yield Finding("wrong" if fails else "look", "space", text)
    else:
        yield Finding("ok", "space", text)
    if free < 4 * TRIED_BYTES:
        return
    try:
        rate = bytes_per_s(there)
    except OSError as error:
        text = f"{there} cannot be written ({error.strerror}): name another folder, or ask its owner"
        yield Finding("wrong", "disk", text)
        return
    text = f"{rate / 1e6:,.0f} MB/s written to the disk, {size / rate:,.1f} s for a checkpoint like {whose}"
    slow = rate < SLOW_BYTES_PER_S
    yield Finding("look" if slow else "ok", "disk", text + (": another disk saves faster" if slow else ""))


def bytes_per_s(folder: Path) -> float:
    """The rate at which a file is written and brought to the disk, as a checkpoint is."""
    block = os.urandom(2**20)  # zeros would be compressed by some disks
    started_s = time.perf_counter()
    with tempfile.TemporaryFile(dir=folder) as file:
        for _ in range(TRIED_BYTES // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return TRIED_BYTES / (time.perf_counter() - started_s)


def check_shards(folder: Path) -> Iterator[Finding]:
    """Compare prepared shards, byte by byte, with what was written."""
    from nanogpt_lit.data.shards import TokenShards, read_manifest, ready_format
    from nanogpt_lit.data.tokenizer_files import read_tokenizer_files

    kind = ready_format(folder) if folder.is_dir() else None
    if kind is None:
        check_writable("data.shards_dir", folder)
        yield Finding("look", "shards", f"none are in {folder} yet; fit prepares them")
        return
    try:
        train, val = (TokenShards.open(folder, side) for side in ("train", "val"))
        text = f"{len(train):,} tokens to train on and {len(val):,} to validate on in {folder}"
        if kind != "ours":
            yield Finding("ok", "shards", f"{text}, in {kind}'s format, which keeps no checksums")
            return
        manifest = read_manifest(folder)
        read_tokenizer_files(folder, manifest)
        listed = {shard["file"]: shard["sha256"] for split in manifest["splits"].values() for shard in split["shards"]}
        damaged = {name for name, sha256 in listed.items() if tokens_sha256(folder / name) != sha256}
        vocabulary = manifest["tokenizer"]["vocab_size"]
        # The header has no checksum. Its other fields have been compared with the file and the manifest.
        damaged |= {file.path.name for file in (*train.files, *val.files) if file.vocab_size != vocabulary}
    except UserError as error:
        yield Finding("wrong", "shards", str(error).rstrip("."))
        return
    except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
        text = f"{folder} cannot be checked ({type(error).__name__}: {error}): remove it, fit prepares it again"
        yield Finding("wrong", "shards", text)
        return
    for name in sorted(damaged):
        text = f"{folder / name} is not as it was written: remove {folder}, fit prepares it again"
        yield Finding("wrong", "shards", text)
    if not damaged:
        yield Finding("ok", "shards", f"{text}, every byte as it was written")


def tokens_sha256(path: Path) -> str:
    from nanogpt_lit.data.shard_file import HEADER_BYTES

    with path.open("rb") as file:
        file.seek(HEADER_BYTES)
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_checkpoints(run: Path) -> Iterator[Finding]:
    """Compare each checkpoint with its checksums, and look for weights that are no numbers."""
    files = checkpoints_in(run)
    if not files:
        yield Finding("look", "checkpoint", f"none is in {run} yet")
    for path in files:
        yield from unless_it_fails("checkpoint", lambda path=path: [check_checkpoint(path)])  # type: ignore[misc]
    for path in sorted(run.rglob(f"*{SUFFIX}{PARTIAL}")):
        if not path.is_dir():
            text = f"{path} is left of a write that was cut short, or under way; fit removes it"
            yield Finding("look", "checkpoint", text)


def checkpoints_in(run: Path) -> list[Path]:
    return [path for path in sorted(run.rglob(f"*{SUFFIX}")) if path.parent.suffix != SHARDS]


def check_checkpoint(path: Path) -> Finding:
    """Read one, tensor by tensor, so that the memory it takes is that of the largest."""
    import torch

    from nanogpt_lit.checkpoint.run_file import STATES, opened

    if path.is_symlink() and not path.exists():
        return Finding("wrong", "checkpoint", f"{path} is a link to {path.readlink()}, which is not there")
    states = tuple(f"{state}." for state in STATES)
    try:
        description, stored = opened(path)
        with stored:
            step, size = description.get("step"), sum(file.stat().st_size for file in stored.files)
            for name in stored.names:
                tensor = stored.read([name])[name]
                if not name.startswith(states) and tensor.is_floating_point() and not torch.isfinite(tensor).all():
                    text = f"{path} holds weights that are not numbers ({name}): go on from another one"
                    return Finding("wrong", "checkpoint", text)
    except (UserError, OSError) as error:
        return Finding("wrong", "checkpoint", str(error).rstrip("."))
    said = f" step {step:,}," if isinstance(step, int) else ""
    text = f"{path}:{said} {size / 1e6:,.1f} MB, every byte as it was written"
    return Finding("ok", "checkpoint", text)


def largest_checkpoint(run: Path) -> int | None:
    """The bytes of the largest; None without any."""
    sizes = [path.stat().st_size for path in checkpoints_in(run) if path.is_file()]
    sizes += [sum(part.stat().st_size for part in folder.iterdir()) for folder in run.rglob(f"*{SHARDS}")]
    return max(sizes, default=None)


def check_times(run: Path) -> Iterator[Finding]:
    """Name checkpoints of the future."""
    for path in checkpoints_in(run):
        if path.is_file() and (ahead_s := path.stat().st_mtime - time.time()) > 60:
            text = f"{path} was saved {ahead_s / 3600:,.1f} hours from now: a clock was set back, set it right"
            yield Finding("look", "clock", f"{text}; of several runs, fit goes on with the one that was saved last")


def check_holders(run: Path) -> Iterator[Finding]:
    """Name the runs that are being trained, and those that were when their process was killed."""
    from nanogpt_lit.checkpoint.run_lock import HOLDER, is_running, read_holder

    for path in sorted(run.rglob(HOLDER)):
        if (holder := read_holder(path.parent)) is None:
            yield Finding("look", "run", f"{path} does not say who trains that run; fit passes it over")
        elif is_running(holder):
            yield Finding("ok", "run", f"{path.parent} is trained by {holder}")
        else:
            text = f"{path.parent} was trained by {holder}, which was killed: fit --resume auto goes on with it"
            yield Finding("look", "run", text)
