"""The text that a loss is measured on, as a stream of tokens."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from nanogpt_lit.data.sampler import windows_in
from nanogpt_lit.data.shards import TokenShards, ready_format
from nanogpt_lit.data.sources import open_source
from nanogpt_lit.data.tokenizer import Tokenizer
from nanogpt_lit.errors import UserError
from nanogpt_lit.run.pieces import latest_config

TOKENS_AT_A_TIME = 1 << 18


def tokens_of(source: str, text_key: str, tokenizer: Tokenizer, block_size: int) -> Iterator[np.ndarray]:
    """Of a text, every document with end-of-text before it; of ready shards, the windows that training validates on.

    source, text_key: as data.source and data.text_key. Raises UserError for shards of a larger vocabulary.
    """
    folder = Path(source).expanduser()
    if ready_format(folder):
        shards = TokenShards.open(folder, "val")
        shards.check_vocabulary(tokenizer.vocab_size)
        end = windows_in(len(shards), block_size, "val") * block_size + 1
        for start in range(0, end, TOKENS_AT_A_TIME):
            yield shards.read(start, min(TOKENS_AT_A_TIME, end - start))
        return
    for document in open_source(source, text_key).documents():
        starts = True
        for piece in document.pieces():
            yield tokenizer.encode_stream([(piece, starts)])
            starts = False


def validation_shards(checkpoint: Path) -> str:
    """The shards of the run that a checkpoint belongs to. Raises UserError where the run's folder does not say."""
    kept, _ = latest_config(checkpoint.parent.parent)
    data = (kept or {}).get("data") or {}
    root = ((kept or {}).get("trainer") or {}).get("default_root_dir")
    candidates = [data.get("source"), data.get("shards_dir"), Path(root) / "shards" if root else None]
    for folder in candidates:
        if folder is not None and ready_format(Path(folder).expanduser()):
            return str(folder)
    raise UserError(
        f"{checkpoint} lies in no run whose shards are here; name a text, or a folder of shards, with --data."
    )
