"""A document: text read in pieces, so that one of 10 GB takes no more memory than one of 10 KB."""

import codecs
import io
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol, Self

from nanogpt_lit.errors import UserError

PIECE_CHARS = 1 << 16  # keeps 32 threads busy with a small file, and is still 10 ms of work for one
BLOCK_BYTES = 1 << 16
CUT_LOOKBACK = 1 << 15  # characters searched for a good place to cut
AFTER_LAST_NEWLINE = re.compile(r"(?s:.*)\S\n(?=\S)")  # single ones, as last_cut says
BEFORE_LAST_SPACE = re.compile(r"(?s:.*)\S(?= \S)")


class Document(Protocol):
    def pieces(self) -> Iterator[str]:
        """The text in pieces of at most 2 * PIECE_CHARS characters; no piece for an empty document."""

    def divide(self, tail: float) -> "tuple[Document, Document]":
        """The text up to and from about the last `tail` (a share of it), cut at a line start where one is near."""


@dataclass(frozen=True)
class TextDocument:
    text: str

    def pieces(self) -> Iterator[str]:
        return cut_pieces(self.text[i : i + PIECE_CHARS] for i in range(0, len(self.text), PIECE_CHARS))

    def divide(self, tail: float) -> tuple["TextDocument", "TextDocument"]:
        cut = int(len(self.text) * (1 - tail))
        line_start = self.text.find("\n", cut, cut + CUT_LOOKBACK) + 1
        if 0 < line_start < len(self.text):
            cut = line_start
        return TextDocument(self.text[:cut]), TextDocument(self.text[cut:])


@dataclass(frozen=True)
class FileDocument:
    """The bytes `start` to `stop` (None: the end) of a UTF-8 file; line ends become `\\n`, a byte order mark goes."""

    path: Path
    start: int = 0
    stop: int | None = None

    def pieces(self) -> Iterator[str]:
        """Raises UndecodableError at bytes that are not UTF-8, UserError when the file cannot be read."""
        return cut_pieces(self._decoded())

    def _decoded(self) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")()
        newlines = io.IncrementalNewlineDecoder(None, translate=True)
        offset = self.start
        with opened(self.path) as file:
            file.seek(offset)
            while True:
                block = file.read(BLOCK_BYTES if self.stop is None else min(BLOCK_BYTES, self.stop - offset))
                cut_character = len(decoder.getstate()[0])  # bytes kept from the block before
                try:
                    text = decoder.decode(block, final=not block)
                except UnicodeDecodeError as error:
                    raise UndecodableError(self.path, offset - cut_character + error.start) from error
                if offset == 0:
                    text = text.removeprefix("\N{BYTE ORDER MARK}")
                yield newlines.decode(text, final=not block)
                if not block:
                    return
                offset += len(block)

    def divide(self, tail: float) -> tuple[Self, Self]:
        with opened(self.path) as file:
            size = file.seek(0, io.SEEK_END)
            cut = int(size * (1 - tail))
            file.seek(cut)
            line_start = cut + file.read(CUT_LOOKBACK).find(b"\n") + 1
            if cut < line_start < size:
                cut = line_start
            else:  # at least not inside a character, whose second to fourth bytes are 0b10......
                start = max(0, cut - 3)
                file.seek(start)
                around = file.read(cut + 1 - start)
                cut = next((start + i for i in reversed(range(len(around))) if around[i] & 0xC0 != 0x80), cut)
        return type(self)(self.path, 0, cut), type(self)(self.path, cut)

    def checked(self) -> Document:
        """The same text, read to its end. Raises UndecodableError unless all of it is UTF-8."""
        pieces = self.pieces()
        start = next(pieces, "")
        if next(pieces, None) is None:
            return TextDocument(start)  # short: no need to read it again
        for _ in pieces:
            pass
        return self


class UndecodableError(UserError):
    """Bytes that are not UTF-8 text."""

    def __init__(self, path: Path, offset: int) -> None:
        super().__init__(
            f"data.source: {path} is not UTF-8 text (byte {offset:,}); convert it to UTF-8, or skip such files with "
            "data.skip_undecodable: true."
        )


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The file for reading. Any OSError, when opening or later, becomes a UserError that names it."""
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise UserError(f"data.source: {path} cannot be read ({error.strerror}).") from error


def cut_pieces(blocks: Iterable[str]) -> Iterator[str]:
    """The text of the blocks in pieces of PIECE_CHARS or more, each cut where tokens end anyway."""
    text = ""
    for block in blocks:
        text += block
        if len(text) >= PIECE_CHARS:
            cut = last_cut(text)
            yield text[:cut]
            text = text[cut:]
    if text:
        yield text


def last_cut(text: str) -> int:
    """The place to cut at so that both sides together have the tokens of the whole; the end when there is none.

    GPT-2's pattern (and its successors') looks ahead only at the end of a run of white space: a single newline
    belongs to what precedes it, a single space to the word that follows.
    """
    floor = max(1, len(text) - CUT_LOOKBACK) - 1
    for cut in (AFTER_LAST_NEWLINE, BEFORE_LAST_SPACE):
        if found := cut.match(text, floor):
            return found.end()
    return len(text)
