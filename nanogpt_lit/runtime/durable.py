"""Files and folders that appear whole or not at all, whatever happens to the process, the power or the disk."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from nanogpt_lit.errors import UserError

PARTIAL = ".partial"
"""Suffix of a file or folder while it is being written."""


@contextmanager
def durable_file(path: Path, keep_as: Path | None = None) -> Iterator[BinaryIO]:
    """A file to write, which takes its name once it is complete and on the disk.

    keep_as: the name that a file of this name takes first, so that no write puts the only copy at risk
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_of(path)
    if partial.is_dir():  # not ours, and no reason to write nothing
        partial = partial_of(path.with_name(f"{path.name}.{os.getpid()}"))
    try:
        with partial.open("w+b") as file:
            yield file
            file.flush()
            # Without it, the rename may reach the disk before the bytes: after a power loss the name holds zeros.
            os.fsync(file.fileno())
        if keep_as is not None and path.exists():
            keep_file(path, keep_as)
        partial.replace(path)
        sync_folder(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def keep_file(path: Path, keep_as: Path) -> None:
    """Give a file a second name, so that nobody who reads it finds it missing before the next one takes its place."""
    link = partial_of(keep_as)
    link.unlink(missing_ok=True)  # of a process that was killed here
    try:
        os.link(path, link)
    except OSError:  # a file system without hard links, such as that of many USB sticks
        path.replace(keep_as)
        return
    link.replace(keep_as)
    link.unlink(missing_ok=True)  # POSIX leaves both names where both already were one file


@contextmanager
def durable_folder(folder: Path, keep_as: Path | None = None) -> Iterator[Path]:
    """A folder to write files into, which takes its name once all of them are on the disk.

    keep_as: the name that a folder of this name takes first; without it, the name has to be free
    """
    partial = partial_of(folder)
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed here
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in partial.iterdir():
            with path.open("r+b") as file:
                os.fsync(file.fileno())
        sync_folder(partial)
        if keep_as is not None and folder.exists():
            folder.replace(keep_as)
        partial.replace(folder)
        sync_folder(folder.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def check_space(folder: Path, needed: int) -> None:
    """Raises OSError where a file of so many bytes does not fit: found out before, not after writing for a minute."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f"it takes {needed / 2**20:,.1f} MiB and the disk has {free / 2**20:,.1f} MiB left")


def check_writable(key: str, folder: Path) -> None:
    """Raises UserError, naming the key, for a folder that cannot be made or written. Makes none."""
    for path in (folder.absolute(), *folder.absolute().parents):
        try:
            path.stat()
        except FileNotFoundError:
            reason = f"{path} is a link to {path.readlink()}, which is not there" if path.is_symlink() else None
        except OSError as error:
            reason = f"{path}: {error.strerror}"
        else:
            if path.is_dir() and os.access(path, os.W_OK | os.X_OK):
                return
            reason = f"{path} cannot be written" if path.is_dir() else f"{path} is no folder"
        if reason is not None:
            raise UserError(f"{key}={folder}: {reason}; name another folder.")


def write_durably(path: Path, text: str) -> None:
    """The text as it is (no translation of line ends), whole and on the disk when this returns."""
    with durable_file(path) as file:
        file.write(text.encode())


def partial_of(path: Path) -> Path:
    # In the same folder: a rename between file systems is a copy, and a copy can be cut short.
    return path.with_name(path.name + PARTIAL)


def sync_folder(folder: Path) -> None:
    """Brings the names in a folder to the disk. Windows has no such call, and writes them through."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sweep(folder: Path) -> list[Path]:
    """Removes files that writes which were cut short left behind; call it before the first write of a run.

    A folder of such a name was not left by a checkpoint's write, and stays.
    """
    leftovers = sorted(path for path in folder.glob(f"*{PARTIAL}") if not path.is_dir() or path.is_symlink())
    for leftover in leftovers:
        leftover.unlink(missing_ok=True)
    return leftovers
