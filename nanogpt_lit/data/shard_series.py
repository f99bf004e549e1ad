"""The shards of one side of the split, written one after another."""

from pathlib import Path
from typing import Any, Self

from nanogpt_lit.data.encoder import TokenBatch
from nanogpt_lit.data.shard_file import ShardWriter
from nanogpt_lit.data.split import Side
from nanogpt_lit.errors import UserError

SHARD_TOKENS = 100_000_000


class ShardSeries:
    """The shards of one side, each of SHARD_TOKENS but for the last."""

    def __init__(self, folder: Path, side: Side, vocab_size: int) -> None:
        self.folder, self.side, self.vocab_size = folder, side, vocab_size
        self.tokens = self.documents = self.text_bytes = 0
        self.shards: list[dict[str, Any]] = []
        self._writer: ShardWriter | None = None

    def write(self, batch: TokenBatch) -> None:
        tokens = batch.tokens
        while len(tokens):
            if self._writer is None:
                self._writer = ShardWriter(self.folder / f"{self.side}_{len(self.shards):06}.bin", self.vocab_size)
            room = SHARD_TOKENS - self._writer.n_tokens
            self._writer.write(tokens[:room])
            tokens = tokens[room:]
            if self._writer.n_tokens == SHARD_TOKENS:
                self._finish(self._writer)
        self.tokens += len(batch.tokens)
        self.documents += batch.documents
        self.text_bytes += batch.text_bytes

    def _finish(self, writer: ShardWriter) -> None:
        writer.close()
        self.shards.append({"file": writer.path.name, "tokens": writer.n_tokens, "sha256": writer.sha256})
        self._writer = None

    def close(self) -> dict[str, Any]:
        """The entry of the series in the manifest. Raises UserError when nothing was written."""
        if self._writer is not None:
            self._finish(self._writer)
        if not self.shards:
            raise UserError(f"data.source holds too little text: nothing is left for {self.side}.")
        return {
            "tokens": self.tokens,
            "documents": self.documents,
            "bytes": self.text_bytes,
            "shards": self.shards,
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.abort()
