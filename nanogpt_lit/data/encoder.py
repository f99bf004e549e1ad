"""Documents to tokens: which text is held out for validation, and encoding on all cores, in order, in bounded memory.

Held out is by document, and the same ones however the source grows.

Threads, not processes: tiktoken releases the interpreter lock while it encodes, and threads need no copies of the text
(scripts/bench_prepare.py compares the two).
"""

import hashlib
import math
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Literal, Self

import numpy as np

from nanogpt_lit.data.documents import PIECE_CHARS, Document
from nanogpt_lit.data.sources import Source
from nanogpt_lit.data.tokenizer import Tokenizer
from nanogpt_lit.errors import UserError

Side = Literal["train", "val"]

HASHED_CHARS = 4096
# Beyond this the thread that reads and writes cannot feed them, and memory grows with every thread (some 10 MB each).
MOST_THREADS = 32


@dataclass(frozen=True)
class Split:
    """A document is held out when the hash of its start, in [0, 1), is below `val_fraction`.

    By the start alone, not by place or name: near copies land on the same side, and a document stays on its side when
    others come or go. `always_val` and `always_train` are the two hashes that keep either side from being empty.
    With fewer documents than 1 / val_fraction none can be spared: then (`by_document` False) the last part of each
    document's text is held out, as nanoGPT does with Shakespeare.
    """

    val_fraction: float
    by_document: bool = False
    always_val: float = 0.0
    always_train: float = 0.0

    @classmethod
    def plan(cls, source: Source, val_fraction: float, by_document: bool = False) -> Self:
        """Looks at the first 1 / val_fraction documents. Raises UserError for a source without text.

        by_document: no document may be divided, however few there are; where all are alike, that is an error
        """
        check_val_fraction(val_fraction)
        starts = (next(document.pieces(), "") for document in source.documents())
        all_hashes = map(hash_of_start, filter(None, starts))
        wanted = math.ceil(1 / val_fraction)
        hashes = list(islice(all_hashes, wanted))
        if not hashes:
            raise UserError("data.source holds no text: every document is empty.")
        if by_document:
            if (other := next((hash_ for hash_ in chain(hashes, all_hashes) if hash_ != hashes[0]), None)) is None:
                raise UserError("data.source holds one conversation, and another is needed to validate on.")
            hashes.append(other)
        elif len(hashes) < wanted or len(set(hashes)) == 1:
            return cls(val_fraction)
        return cls(val_fraction, by_document=True, always_val=min(hashes), always_train=max(hashes))

    def parts(self, document: Document) -> Iterator[tuple[Side, Iterator[str]]]:
        """The document's text by side, each part in pieces; none of them is empty."""
        if self.by_document:
            pieces = document.pieces()
            start = next(pieces, "")
            if start:
                yield self.side(hash_of_start(start)), chain([start], pieces)
            return
        sides: tuple[Side, Side] = ("train", "val")
        for side, part in zip(sides, document.divide(self.val_fraction), strict=True):
            pieces = part.pieces()
            start = next(pieces, "")
            if start:
                yield side, chain([start], pieces)

    def side(self, hash_: float) -> Side:
        if hash_ == self.always_train:
            return "train"
        return "val" if hash_ < self.val_fraction or hash_ == self.always_val else "train"


def check_val_fraction(val_fraction: float) -> None:
    """Raises UserError outside (0, 0.5]."""
    if not 0 < val_fraction <= 0.5:
        raise UserError(f"data.val_fraction={val_fraction} must be above 0 and at most 0.5; 0.1 holds out a tenth.")


def hash_of_start(text: str) -> float:
    """A number in [0, 1) that depends on the first characters alone."""
    digest = hashlib.blake2b(text[:HASHED_CHARS].encode(), digest_size=6).digest()
    return int.from_bytes(digest) / 2**48


@dataclass
class TextBatch:
    """Pieces of one side, about PIECE_CHARS characters together."""

    side: Side
    pieces: list[tuple[str, bool]] = field(default_factory=list)  # text, whether it starts a document
    chars: int = 0


@dataclass(frozen=True)
class TokenBatch:
    side: Side
    tokens: np.ndarray
    documents: int  # that start in it
    text_bytes: int  # in UTF-8
    turns: np.ndarray | None = None  # of conversations (data/windows.py)


def encode_documents(documents: Iterable[Document], split: Split, tokenizer: Tokenizer) -> Iterator[TokenBatch]:
    """The tokens of all documents, each preceded by end-of-text. The order within each side is that of the source."""
    threads = min(available_cpus(), MOST_THREADS)
    pool = ThreadPoolExecutor(threads, thread_name_prefix="encode")
    waiting: deque[Future[TokenBatch]] = deque()
    try:
        for batch in text_batches(documents, split):
            waiting.append(pool.submit(encode_batch, batch, tokenizer))
            if len(waiting) > 2 * threads:  # enough that none runs dry while the oldest is written
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def text_batches(documents: Iterable[Document], split: Split) -> Iterator[TextBatch]:
    """Short documents together, long ones in pieces, train and val apart."""
    open_batches: dict[Side, TextBatch] = {"train": TextBatch("train"), "val": TextBatch("val")}
    for document in documents:
        for side, pieces in split.parts(document):
            starts_document = True
            for piece in pieces:
                batch = open_batches[side]
                batch.pieces.append((piece, starts_document))
                batch.chars += len(piece)
                starts_document = False
                if batch.chars >= PIECE_CHARS:
                    yield batch
                    open_batches[side] = TextBatch(side)
    yield from (batch for batch in open_batches.values() if batch.pieces)


def encode_batch(batch: TextBatch, tokenizer: Tokenizer) -> TokenBatch:
    text_bytes = sum(len(text) if text.isascii() else len(text.encode()) for text, _ in batch.pieces)
    documents = sum(starts_document for _, starts_document in batch.pieces)
    return TokenBatch(batch.side, tokenizer.encode_stream(batch.pieces), documents, text_bytes)


def available_cpus() -> int:
    """The cores this process may use, which a container or a job scheduler can make fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
