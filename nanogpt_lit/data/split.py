"""Which text is held out for validation: by document, and the same ones however the source grows."""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import Literal, Self

from nanogpt_lit.data.documents import Document
from nanogpt_lit.data.sources import Source
from nanogpt_lit.errors import UserError

Side = Literal["train", "val"]

HASHED_CHARS = 4096


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
    def plan(cls, source: Source, val_fraction: float) -> Self:
        """Looks at the first 1 / val_fraction documents. Raises UserError for a source without text."""
        check_val_fraction(val_fraction)
        starts = (next(document.pieces(), "") for document in source.documents())
        wanted = math.ceil(1 / val_fraction)
        hashes = [hash_of_start(start) for start in islice(filter(None, starts), wanted)]
        if not hashes:
            raise UserError("data.source holds no text: every document is empty.")
        if len(hashes) < wanted or len(set(hashes)) == 1:
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
