"""Sources of text: the standard library of the running Python, files, folders, or the hub.

A source is read more than once (to plan the split, to make a vocabulary, to encode), always in the same order.
"""

import hashlib
import os
import platform
import sysconfig
from collections.abc import Collection, Iterator
from functools import cached_property
from pathlib import Path
from typing import Protocol

from nanogpt_lit.data.documents import Document, FileDocument, UndecodableError, opened
from nanogpt_lit.errors import UserError

JSONL = {".jsonl", ".ndjson"}
PARQUET = {".parquet"}

# Tests, other people's packages, and the two packages that no one typed: character tables and generated help text.
NOT_STDLIB = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data", "__pycache__"}

WHAT_WORKS = (
    "stdlib (the source of this Python's standard library), a file or folder of text, a .jsonl or .parquet file, "
    "or hf:OWNER/NAME"
)


class Source(Protocol):
    """Documents in a fixed order, and what tells one state of them from another."""

    skipped: set[str]
    """Files and lines that were left out as undecodable, as far as they have been read."""

    def documents(self) -> Iterator[Document]: ...

    def fingerprint(self) -> dict[str, str | int]:
        """A description that changes whenever the text may have changed; found without reading it."""

    def text_bytes(self) -> int | None:
        """The approximate bytes of text; None when they cannot be known without reading."""


def open_source(
    source: str, text_key: str = "text", skip_undecodable: bool = False, conversations: bool = False
) -> Source:
    """The source that `data.source` names. Raises UserError when there is no such thing or it holds no files.

    conversations: its documents are conversations, which are read from JSON Lines alone
    """
    found = _open_source(source, text_key, skip_undecodable)
    if conversations:
        if not isinstance(found, FilesSource) or found.suffixes - JSONL:
            raise UserError(
                f"data.source={source} is not conversations: with data.documents=conversations it is a .jsonl file, or "
                "a folder with nothing else."
            )
        found.conversations = True
    return found


def _open_source(source: str, text_key: str, skip_undecodable: bool) -> Source:
    if source == "stdlib":
        return StdlibSource()
    if source.startswith("hf:"):
        return HubSource(source, text_key)
    if "://" in source:
        raise UserError(f"data.source={source} is an address; download it and give the file's path.")
    if not source:
        raise UserError(f"data.source is empty; what works: {WHAT_WORKS}.")
    path = Path(source).expanduser()
    if path.is_file():
        return FilesSource(path, [path], text_key, skip_undecodable)
    if path.is_dir():
        return FilesSource(path, visible_files(path), text_key, skip_undecodable)
    if path.exists():
        raise UserError(f"data.source={source} is neither a file nor a folder; what works: {WHAT_WORKS}.")
    raise UserError(f"data.source={source} does not exist; what works: {WHAT_WORKS}.")


class FilesSource:
    """A file, or the files below a folder: rows for JSON Lines and Parquet, else one document per text file."""

    def __init__(self, root: Path, paths: list[Path], text_key: str = "text", skip_undecodable: bool = False) -> None:
        self.root = root
        self.text_key = text_key
        self.skip_undecodable = skip_undecodable
        self.conversations = False
        """True where rows are conversations, and not texts."""
        self.skipped: set[str] = set()
        # Known before anything is read, so that a file that changes meanwhile makes the result stale.
        self._stats = {path: path.stat() for path in paths}
        if not any(stat.st_size for stat in self._stats.values()):
            raise UserError(f"data.source={root} holds no text: {len(paths)} files, all empty.")

    @property
    def suffixes(self) -> set[str]:
        return {path.suffix.lower() for path in self._stats}

    @cached_property
    def text_paths(self) -> list[Path]:
        """The paths without those of binary files. Raises UserError when no other is there."""
        paths = [path for path in self._stats if path.suffix.lower() in JSONL | PARQUET or not is_binary(path)]
        if not paths:
            raise UserError(f"data.source={self.root} holds no text, only binary files (a zero byte near the start).")
        return paths

    def documents(self) -> Iterator[Document]:
        if self.conversations:
            from nanogpt_lit.data.conversations import conversations  # few runs learn from them

            for path in self.text_paths:
                yield from conversations(path, self.skipped if self.skip_undecodable else None)
            return
        for path in self.text_paths:
            suffix = path.suffix.lower()
            if suffix in JSONL | PARQUET:
                from nanogpt_lit.data.rows import jsonl_documents, parquet_documents  # most sources are text files

                if suffix in JSONL:
                    yield from jsonl_documents(path, self.text_key, self.skipped if self.skip_undecodable else None)
                else:
                    yield from parquet_documents(path, self.text_key)
            elif not self.skip_undecodable:
                yield FileDocument(path)
            else:
                # Only a full pass can tell, before the first half has become tokens.
                try:
                    document = FileDocument(path).checked()
                except UndecodableError:
                    self.skipped.add(str(path))
                else:
                    yield document

    def fingerprint(self) -> dict[str, str | int]:
        digest = hashlib.sha256()
        for path, stat in self._stats.items():
            digest.update(f"{path.relative_to(self.root)}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
        return {
            "path": str(self.root.resolve()),
            "files": len(self._stats),
            "bytes": self._size(),
            "sha256": digest.hexdigest(),
        }

    def _size(self) -> int:
        return sum(stat.st_size for stat in self._stats.values())

    def text_bytes(self) -> int:
        parquet = [path for path in self.text_paths if path.suffix.lower() in PARQUET]
        total = sum(self._stats[path].st_size for path in self.text_paths if path not in parquet)
        if parquet:
            from nanogpt_lit.data.rows import parquet_text_bytes

            total += sum(parquet_text_bytes(path, self.text_key) for path in parquet)
        return total


class StdlibSource(FilesSource):
    """The Python files of the running interpreter's library; a few bad ones on purpose are left out."""

    def __init__(self) -> None:
        root = Path(sysconfig.get_path("stdlib"))
        paths = [path for path in visible_files(root, NOT_STDLIB) if path.suffix == ".py"]
        if not paths:
            raise UserError(f"data.source=stdlib: this Python has no library sources in {root}; name a file or folder.")
        super().__init__(root, paths, skip_undecodable=True)

    def fingerprint(self) -> dict[str, str | int]:
        # Not the times of change: two environments of one Python version hold the same text.
        return {"python": platform.python_version(), "files": len(self._stats), "bytes": self._size()}


class HubSource:
    """hf:OWNER/NAME or hf:OWNER/NAME:CONFIG, the train split, streamed."""

    def __init__(self, source: str, text_key: str = "text") -> None:
        self.name, _, self.config = source.removeprefix("hf:").partition(":")
        self.text_key = text_key
        self.skipped: set[str] = set()
        if self.name.count("/") != 1 or not all(self.name.split("/")):
            raise UserError(f"data.source={source}: a hub data set is written hf:OWNER/NAME or hf:OWNER/NAME:CONFIG.")

    def documents(self) -> Iterator[Document]:
        from nanogpt_lit.data.rows import hub_documents

        return hub_documents(self.name, self.config or None, self.text_key)

    def fingerprint(self) -> dict[str, str | int]:
        return {"hub": self.name, "config": self.config}

    def text_bytes(self) -> None:
        return None


def visible_files(root: Path, left_out: Collection[str] = ()) -> list[Path]:
    """The files below a folder in the order of their relative names.

    Nothing whose name starts with a dot, nothing below folders named in `left_out`.
    """

    def unreadable(error: OSError) -> None:
        raise UserError(f"data.source: {error.filename} cannot be read ({error.strerror}).") from error

    paths = []
    for folder, folders, names in os.walk(root, onerror=unreadable):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in left_out]
        paths += [Path(folder, name) for name in names if not name.startswith(".")]
    # A broken link or a pipe is no file.
    return sorted((path for path in paths if path.is_file()), key=lambda path: path.relative_to(root).as_posix())


def is_binary(path: Path) -> bool:
    """True where a zero byte stands in the first 8 KB; text has none."""
    with opened(path) as file:
        return b"\0" in file.read(8192)
