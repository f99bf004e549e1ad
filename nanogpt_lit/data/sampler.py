"""The order of samples: batch k is a pure function of (seed, k), in constant memory.

A sample is a window of block_size + 1 tokens, targets being the tokens one later. In an epoch the windows lie side by
side in the stream of tokens and each is drawn once, in an order that a keyed permutation computes index by index:
nothing is shuffled in memory, and a resumed run starts at any batch at once.

The permutation is a Feistel network with splitmix64 as its round function (Luby and Rackoff, "How to construct
pseudorandom permutations from pseudorandom functions", 1988; Steele, Lea and Flood, "Fast splittable pseudorandom
number generators", 2014), brought to any size by walking the cycle until it lands inside (Black and Rogaway, "Ciphers
with arbitrary finite domains", 2002).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Sampler

from nanogpt_lit.errors import UserError

# 4 rounds are proven for large halves. With halves of 1 or 2 bits, the orders of an epoch of 2 to 12 windows come out
# about equally often from 10 rounds on (tests/test_sampler.py); at 6, some orders of 5 windows are twice too frequent.
ROUNDS = 10  # even
VALIDATION_KEY = 0x76616C  # "val": whatever the seed of a run, validation reads the same windows
LOOKAHEAD = 1024  # samples whose order is computed in one call; NumPy's cost per call is shared among them


def mix64(x: np.ndarray) -> np.ndarray:
    """splitmix64 of uint64: every bit of x moves about half of the bits of the result."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def epoch_keys(seed: int, epoch: np.ndarray) -> np.ndarray:
    """(ROUNDS + 1, n) uint64: the keys of the rounds, and last a number for the epoch's phase."""
    key = mix64(mix64(np.array([seed % 2**64], dtype=np.uint64)) ^ epoch.astype(np.uint64))
    return mix64(key + np.arange(ROUNDS + 1, dtype=np.uint64)[:, None])


def permute(index: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """The place of each index of range(size) in the permutation that its column of `keys` (ROUNDS, n) selects."""
    bits = (size - 1).bit_length()
    # Halves as equal as an odd number of bits allows; they swap widths every round, and ROUNDS is even.
    shift, masks = np.uint64(bits // 2), [np.uint64((1 << n) - 1) for n in (bits - bits // 2, bits // 2)]

    def feistel(x: np.ndarray, keys: np.ndarray) -> np.ndarray:  # a permutation of range(2**bits)
        left, right = x >> shift, x & masks[1]
        for n, key in enumerate(keys):
            left, right = right, left ^ (mix64(right ^ key) & masks[n % 2])
        return (left << shift) | right

    x = feistel(index.astype(np.uint64), keys)
    while (outside := x >= size).any():  # 2 rounds or fewer on average: 2**bits < 2 * size
        x[outside] = feistel(x[outside], keys[:, outside])
    return x.astype(np.int64)


def windows_in(n_tokens: int, block_size: int, split: str) -> int:
    """The number of windows side by side in the stream. Raises UserError when not even one fits."""
    if n_tokens <= block_size:
        works = "more text" if split == "train" else "more text or a larger data.val_fraction"
        if n_tokens > 1:
            works = f"data.block_size={n_tokens - 1} or less, or {works}"
        raise UserError(
            f"data.block_size={block_size} is a block longer than the shards: it needs {block_size + 1:,} tokens, "
            f"the split {split!r} has {n_tokens:,}; what works: {works}."
        )
    return (n_tokens - 1) // block_size


@dataclass
class StreamPosition:
    """The share of the global order that a process takes, and where it begins. A training loop states it."""

    rank: int = 0
    world: int = 1
    batches_done: Callable[[], int] = lambda: 0
    """Micro-batches this process has trained on. Asked when iteration starts, so that the loop's own counter is the
    only truth: batches that workers fetched ahead and nobody trained on are neither lost nor repeated."""


class BatchOrder(Sampler[list[int]]):
    """Batches of window starts for training, for ever. Use as DataLoader(batch_sampler=...).

    Micro-batch k of rank r in a world of w is global micro-batch k * w + r: one process that accumulates 4 and two
    that accumulate 2 see the same samples in every step.
    """

    def __init__(self, n_tokens: int, block_size: int, batch_size: int, seed: int, position: StreamPosition) -> None:
        # Each epoch cuts the text at another phase, or the same tokens would stand at the same place of their window
        # in every epoch, and the last token of a window would never be seen with what follows. The phase needs room:
        # one window less per epoch.
        self.n_windows = max(1, windows_in(n_tokens, block_size, "train") - 1)
        self.n_phases = min(block_size, n_tokens - self.n_windows * block_size)
        self.block_size = block_size
        self.batch_size = batch_size
        self.seed = seed
        self.position = position

    def window_starts(self, samples: np.ndarray) -> np.ndarray:
        """Starts in the stream of the windows at these positions in the endless order of samples."""
        epoch, index = np.divmod(samples, self.n_windows)
        keys = epoch_keys(self.seed, epoch)
        phase = (keys[ROUNDS] % np.uint64(self.n_phases)).astype(np.int64)
        return phase + self.block_size * permute(index, self.n_windows, keys[:ROUNDS])

    def __iter__(self) -> Iterator[list[int]]:
        B, rank, world = self.batch_size, self.position.rank, self.position.world
        k = self.position.batches_done()
        n = max(1, LOOKAHEAD // B)
        while True:
            batches = np.arange(k, k + n, dtype=np.int64) * world + rank
            yield from self.window_starts((batches[:, None] * B + np.arange(B)).ravel()).reshape(n, B).tolist()
            k += n


class NumberedOrder(BatchOrder):
    """The same of windows that are not cut from a stream but numbered: batches of their numbers."""

    def __init__(self, n_windows: int, batch_size: int, seed: int, position: StreamPosition) -> None:
        self.n_windows, self.n_phases, self.block_size = n_windows, 1, 1
        self.batch_size, self.seed, self.position = batch_size, seed, position


class ValidationOrder(Sampler[list[int]]):
    """Batches of window starts for validation: every window of the split once, in one fixed mixed order.

    The order depends on nothing but the sizes, so that its first batches are the same unbiased sample of the split in
    every run. Ranks take turns; what is left for the last turn is shared evenly, so that all ranks have equally many
    batches of equal sizes, and fewer than `world` windows are left out.

    limit: how many batches all ranks take together, as trainer.limit_val_batches says; None takes all
    """

    def __init__(
        self, n_tokens: int, block_size: int, batch_size: int, rank: int = 0, world: int = 1, limit: int | None = None
    ) -> None:
        self.n_windows = windows_in(n_tokens, block_size, "val")
        taken = self.n_windows if limit is None else min(self.n_windows, limit * batch_size)
        if self.n_windows < world:
            raise UserError(
                f"the split 'val' has {self.n_windows} windows, fewer than the {world} processes; a larger "
                "data.val_fraction or a smaller data.block_size works."
            )
        if taken < world:
            raise UserError(
                f"trainer.limit_val_batches={limit} gives {taken} sequences, fewer than the {world} processes; it "
                f"counts the batches of all of them, and {-(-world // batch_size)} or more works."
            )
        self.block_size = block_size
        self.batch_size = batch_size
        self.rank = rank
        self.world = world
        self.full_turns, rest = divmod(taken, batch_size * world)
        self.last_batch_size = rest // world  # of the turn that is shared; 0: there is none
        self._keys = epoch_keys(VALIDATION_KEY, np.zeros(1, dtype=np.int64))[:ROUNDS]

    def __len__(self) -> int:
        return self.full_turns + (self.last_batch_size > 0)

    def __iter__(self) -> Iterator[list[int]]:
        B, B_last = self.batch_size, self.last_batch_size
        n = max(1, LOOKAHEAD // B)
        for turn in range(0, self.full_turns, n):
            turns = np.arange(turn, min(turn + n, self.full_turns), dtype=np.int64)
            yield from self._batches((turns * self.world + self.rank) * B, B)
        if B_last:
            yield from self._batches(np.array([self.full_turns * self.world * B + self.rank * B_last]), B_last)

    def _batches(self, first_samples: np.ndarray, batch_size: int) -> list[list[int]]:
        """The window starts of batches, given the first sample of each."""
        samples = first_samples[:, None] + np.arange(batch_size)
        keys = np.broadcast_to(self._keys, (ROUNDS, samples.size))
        return (self.block_size * permute(samples.ravel(), self.n_windows, keys)).reshape(samples.shape).tolist()


class Interleaved(Sampler[list[int]]):
    """Yield the first batch of each sampler, then the second of each: dealt out, every process gets its own."""

    def __init__(self, samplers: Sequence[Any]) -> None:
        self.samplers = samplers

    def __iter__(self) -> Iterator[list[int]]:
        for turn in zip(*self.samplers, strict=True):
            yield from turn

    def __len__(self) -> int:
        return sum(len(sampler) for sampler in self.samplers)


def interleave(loaders: Sequence[DataLoader]) -> DataLoader:
    """One loader whose batches take turns. loaders: of each process, by rank"""
    return with_batches(loaders[0], Interleaved([loader.batch_sampler for loader in loaders]))


def with_batches(loader: DataLoader, batches: Any) -> DataLoader:
    """The loader with other batches of samples, read in this process."""
    return DataLoader(
        loader.dataset,
        batch_sampler=batches,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        generator=loader.generator,
    )
