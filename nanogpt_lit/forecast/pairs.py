"""The loss of a table of pairs of tokens: any network learns it first, and then makes use of what lies further back."""

from pathlib import Path

import numpy as np

from nanogpt_lit.data.shards import TokenShards

MOST_TOKENS = 5_000_000
PRIOR = 5.0
"""Pairs' worth of the single tokens' frequencies that a pair's are mixed with."""


def loss_of_pairs(folder: Path, vocab_size: int) -> float:
    """Nats per token of the validation part of a folder of shards, by pairs counted in the training part."""
    train, val = (read(folder, split) for split in ("train", "val"))
    singles = np.bincount(train, minlength=vocab_size)
    frequency = (singles + 1) / (len(train) + vocab_size)
    pairs, counts = np.unique(train[:-1] * vocab_size + train[1:], return_counts=True)
    wanted = val[:-1] * vocab_size + val[1:]
    places = np.searchsorted(pairs, wanted).clip(max=len(pairs) - 1)
    counted = np.where(pairs[places] == wanted, counts[places], 0)
    probability = (counted + PRIOR * frequency[val[1:]]) / (singles[val[:-1]] + PRIOR)
    return float(-np.log(probability).mean())


def read(folder: Path, split: str) -> np.ndarray:
    shards = TokenShards.open(folder, split)
    return shards.read(0, min(len(shards), MOST_TOKENS))
