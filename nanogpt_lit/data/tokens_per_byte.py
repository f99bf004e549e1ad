"""What makes bits per byte of text, which can be compared between tokenizers, of a loss per token."""

from pathlib import Path

import numpy as np

from nanogpt_lit.data.shards import TokenShards, read_manifest, ready_format
from nanogpt_lit.data.tokenizer import Tokenizer

MOST_TOKENS = 1 << 22
"""Read of shards that do not say how many bytes they were: enough for a ratio."""


def val_tokens_per_byte(folder: Path, tokenizer: Tokenizer) -> float | None:
    """Tokens for each byte of UTF-8 in the validation part of a folder of shards, without end-of-text.

    None where the tokens stand for no text.
    """
    if ready_format(folder) == "ours":
        val = read_manifest(folder)["splits"]["val"]
        counts = [val.get(name) for name in ("tokens", "documents", "bytes")]
        if not all(type(count) is int for count in counts):
            return None
        tokens, text_bytes = counts[0] - counts[1], counts[2]
    else:
        shards = TokenShards.open(folder, "val")
        ids = shards.read(0, min(len(shards), MOST_TOKENS))
        lengths = tokenizer.byte_lengths()
        ids = ids[(ids != tokenizer.eot) & (ids < len(lengths))]
        tokens, text_bytes = len(ids), int(np.sum(lengths[ids]))
    return tokens / text_bytes if tokens > 0 and text_bytes > 0 else None
