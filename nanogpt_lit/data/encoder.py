"""Documents to tokens on all cores, in order, in bounded memory.

Threads, not processes: tiktoken releases the interpreter lock while it encodes, and threads need no copies of the text
(scripts/bench_prepare.py compares the two).
"""

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from nanogpt_lit.data.documents import PIECE_CHARS, Document
from nanogpt_lit.data.split import Side, Split
from nanogpt_lit.data.tokenizer import Tokenizer

# Beyond this the thread that reads and writes cannot feed them, and memory grows with every thread (some 10 MB each).
MOST_THREADS = 32


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
