"""Files that appear whole or not at all, whatever happens to the process, the power or the disk."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

PARTIAL = ".partial"


@contextmanager
def durable_file(path: Path, keep_as: Path | None = None) -> Iterator[BinaryIO]:
    """A file to write, which takes its name once it is complete and on the disk.

    keep_as: the name that a file of this name takes first, so that no write puts the only copy at risk
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder: a rename between file systems is a copy, and a copy can be cut short.
    partial = path.with_name(path.name + PARTIAL)
    try:
        with partial.open("w+b") as file:
            yield file
            file.flush()
            # Without it, the rename may reach the disk before the bytes: after a power loss the name holds zeros.
            os.fsync(file.fileno())
        if keep_as is not None and path.exists():
            path.replace(keep_as)
        partial.replace(path)
        sync_folder(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Brings the names in a folder to the disk. Windows has no such call, and writes them through."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sweep(folder: Path) -> list[Path]:
    """Removes what writes that were cut short left behind; call it before the first write of a run."""
    leftovers = sorted(folder.glob(f"*{PARTIAL}"))
    for leftover in leftovers:
        leftover.unlink(missing_ok=True)
    return leftovers
