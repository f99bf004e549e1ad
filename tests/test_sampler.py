from collections import Counter
from collections.abc import Iterator
from itertools import islice
from math import factorial

import numpy as np
import pytest
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import DataLoader

from nanogpt_lit.data.sampler import (
    ROUNDS,
    BatchOrder,
    StreamPosition,
    ValidationOrder,
    epoch_keys,
    interleave,
    permute,
)

# A reference in plain Python integers, one index at a time, written from the papers rather than from the module.

MASK64 = 2**64 - 1


def splitmix64(x: int) -> int:
    z = (x + 0x9E3779B97F4A7C15) & MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK64
    return z ^ (z >> 31)


def naive_keys(seed: int, epoch: int) -> list[int]:
    key = splitmix64(splitmix64(seed & MASK64) ^ epoch)
    return [splitmix64((key + n) & MASK64) for n in range(ROUNDS + 1)]


def naive_permute(index: int, size: int, keys: list[int]) -> int:
    bits = 0
    while 2**bits < size:
        bits += 1
    low_bits = bits // 2
    while True:
        left, left_bits = index >> low_bits, bits - low_bits
        right, right_bits = index % 2**low_bits, low_bits
        for key in keys[:ROUNDS]:
            mixed = left ^ (splitmix64(right ^ key) % 2**left_bits)
            left, left_bits, right, right_bits = right, right_bits, mixed, left_bits
        index = left * 2**low_bits + right
        if index < size:
            return index


def naive_window_start(sample: int, n_tokens: int, block_size: int, seed: int) -> int:
    n_windows = max(1, (n_tokens - 1) // block_size - 1)
    epoch, index = divmod(sample, n_windows)
    keys = naive_keys(seed, epoch)
    phase = keys[ROUNDS] % min(block_size, n_tokens - 1 - n_windows * block_size + 1)
    return phase + block_size * naive_permute(index, n_windows, keys)


def train_order(n_tokens=1000, block_size=8, batch_size=3, seed=1337, rank=0, world=1, first_batch=0) -> BatchOrder:
    return BatchOrder(n_tokens, block_size, batch_size, seed, StreamPosition(rank, world, lambda: first_batch))


def batches(order: BatchOrder | ValidationOrder, n: int | None = None) -> list[list[int]]:
    return list(islice(order, n))


# The permutation -----------------------------------------------------------------------------------------------------

SIZES = sorted({1, 2, 3, *range(4, 40), *(2**n + d for n in range(6, 13) for d in (-1, 0, 1)), 1000, 5000})


@pytest.mark.parametrize("seed", [0, 1337, -1, 2**64 - 1])
def test_the_permutation_takes_every_index_to_a_place_of_its_own(seed):
    for size in SIZES:
        keys = epoch_keys(seed, np.full(size, 3))[:ROUNDS]
        assert np.array_equal(np.sort(permute(np.arange(size), size, keys)), np.arange(size)), size


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 1000, 2**31 + 11, 2**39 - 1, 2**40])
def test_the_permutation_equals_the_reference_in_plain_integers(size):
    index = np.unique(np.linspace(0, size - 1, 50).astype(np.int64))
    for seed, epoch in ((1337, 0), (1337, 1), (-5, 7), (2**70 + 3, 2**40)):
        ours = permute(index, size, epoch_keys(seed, np.full(len(index), epoch))[:ROUNDS])
        assert ours.tolist() == [naive_permute(i, size, naive_keys(seed, epoch)) for i in index.tolist()]


def test_two_epochs_and_two_seeds_have_different_orders():
    index = np.arange(500)
    orders = {
        tuple(permute(index, 500, epoch_keys(seed, np.full(500, epoch))[:ROUNDS]).tolist())
        for seed in (0, 1, 2)
        for epoch in (0, 1, 2)
    }
    assert len(orders) == 9


def chi_square(counts: Counter, n_kinds: int, n_draws: int) -> float:
    """Per degree of freedom; 1 for uniform counts, with a standard deviation of sqrt(2 / (n_kinds - 1))."""
    expected = n_draws / n_kinds
    seen = sum((n - expected) ** 2 for n in counts.values()) + (n_kinds - len(counts)) * expected**2
    return seen / expected / (n_kinds - 1)


def orders_of_epochs(size: int, n_epochs: int) -> np.ndarray:
    """(n_epochs, size): the permutations of many epochs, in one call."""
    epochs = np.repeat(np.arange(n_epochs), size)
    index = np.tile(np.arange(size), n_epochs)
    return permute(index, size, epoch_keys(7, epochs)[:ROUNDS]).reshape(n_epochs, size)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_order_of_a_few_windows_comes_about_equally_often(size):
    orders = orders_of_epochs(size, 12_000)
    statistic = chi_square(Counter(map(tuple, orders.tolist())), factorial(size), 12_000)
    assert statistic < 1 + 5 * (2 / (factorial(size) - 1)) ** 0.5  # five standard deviations


@pytest.mark.parametrize("size", [7, 16, 33, 100])
def test_places_and_neighbours_look_uniform(size):
    orders = orders_of_epochs(size, 4000)
    for n in (0, 1, size // 2, size - 1):  # where the n-th index goes
        assert chi_square(Counter(orders[:, n].tolist()), size, 4000) < 1 + 5 * (2 / (size - 1)) ** 0.5
    steps = (orders[:, 1] - orders[:, 0]) % size  # how far apart two neighbours end up: 1 .. size-1
    assert chi_square(Counter(steps.tolist()), size - 1, 4000) < 1 + 5 * (2 / (size - 2)) ** 0.5


# Training ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_tokens", [9, 16, 17, 24, 25, 33, 100, 1000, 10**11])
def test_the_order_equals_a_naive_loop(n_tokens):
    ours = batches(train_order(n_tokens=n_tokens), 500)
    assert ours == [[naive_window_start(3 * k + b, n_tokens, 8, 1337) for b in range(3)] for k in range(500)]


@pytest.mark.parametrize("n_tokens", [9, 10, 16, 17, 18, 24, 25, 26, 100])
def test_an_epoch_takes_every_window_once_and_none_reaches_beyond_the_end(n_tokens):
    order = train_order(n_tokens=n_tokens)
    W = order.n_windows
    assert max(1, (n_tokens - 1) // 8 - 1) == W
    starts = order.window_starts(np.arange(50 * W)).reshape(50, W)
    assert starts.min() >= 0
    assert starts.max() + 8 + 1 <= n_tokens
    for epoch in starts:
        assert np.diff(np.sort(epoch)).tolist() == [8] * (W - 1)


def test_every_phase_is_used_and_the_last_tokens_are_reached():
    order = train_order(n_tokens=41)
    starts = order.window_starts(np.arange(1000 * order.n_windows)).reshape(1000, -1)
    assert set(starts.min(axis=1).tolist()) == set(range(8))
    assert starts.max() + 8 + 1 >= 40


@pytest.mark.parametrize("first_batch", [1, 7, 341, 342, 1000, 10**9])
def test_starting_at_any_batch_equals_the_tail_of_the_whole_order(first_batch):
    if first_batch < 10**9:
        assert batches(train_order(first_batch=first_batch), 20) == batches(train_order(), first_batch + 20)[-20:]
    else:
        expected = [naive_window_start(3 * first_batch + b, 1000, 8, 1337) for b in range(3)]
        assert batches(train_order(first_batch=first_batch), 1) == [expected]


def test_the_first_batch_is_asked_for_when_iteration_starts():
    done = 0
    order = BatchOrder(1000, 8, 3, 1337, StreamPosition(batches_done=lambda: done))
    whole = batches(order, 20)
    done = 5
    assert batches(order, 10) == whole[5:15]


@pytest.mark.parametrize(("world", "accumulation"), [(2, 2), (4, 1)])
def test_processes_share_the_steps_of_one_process_that_accumulates_4(world, accumulation):
    alone = batches(train_order(), 40)
    ranks = [batches(train_order(rank=rank, world=world), 10 * accumulation) for rank in range(world)]
    for step in range(10):
        window = slice(step * accumulation, (step + 1) * accumulation)
        together = [batch for rank in ranks for batch in rank[window]]
        assert sorted(together) == sorted(alone[4 * step : 4 * step + 4])


def test_the_seed_changes_the_order():
    assert batches(train_order(seed=1), 5) != batches(train_order(seed=2), 5)


def test_a_batch_larger_than_the_lookahead_and_than_an_epoch_is_served():
    (batch,) = batches(train_order(n_tokens=50, batch_size=3000), 1)
    assert batch == [naive_window_start(b, 50, 8, 1337) for b in range(3000)]


# Validation ----------------------------------------------------------------------------------------------------------


def test_validation_reads_every_window_once_in_an_order_that_is_mixed_and_fixed():
    order = ValidationOrder(1000, 8, 3)
    read = [start for batch in batches(order) for start in batch]
    assert sorted(read) == list(range(0, 999 - 7, 8))
    assert read != sorted(read)
    assert [len(batch) for batch in order] == [3] * 41 + [1]
    assert len(order) == 42
    # The very windows: a change here makes val/loss of all earlier runs incomparable.
    keys = naive_keys(0x76616C, 0)
    assert read == [8 * naive_permute(i, 124, keys) for i in range(124)]


def test_the_first_validation_batches_are_spread_over_the_whole_split():
    n_windows = 10_000
    order = ValidationOrder(n_windows * 8 + 1, 8, 10)
    tenths = Counter(start * 10 // (n_windows * 8) for batch in batches(order, 100) for start in batch)
    assert chi_square(tenths, 10, 1000) < 1 + 5 * (2 / 9) ** 0.5


@pytest.mark.parametrize("n_windows", [3, 4, 8, 9, 10, 11, 17, 100])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_all_ranks_validate_equally_many_batches_of_equal_sizes(n_windows, world):
    orders = [ValidationOrder(n_windows * 8 + 1, 8, 3, rank, world) for rank in range(world)]
    ranks = [batches(order) for order in orders]
    sizes = [[len(batch) for batch in rank] for rank in ranks]
    assert all(rank == sizes[0] for rank in sizes)
    assert {len(order) for order in orders} == {len(sizes[0])}
    read = [start for rank in ranks for batch in rank for start in batch]
    assert len(read) == len(set(read)) == n_windows - n_windows % world
    alone = batches(ValidationOrder(n_windows * 8 + 1, 8, 3))
    full_turns = n_windows // (3 * world)
    for turn in range(full_turns):
        assert [rank[turn] for rank in ranks] == alone[turn * world : (turn + 1) * world]


@pytest.mark.parametrize("limit", [1, 2, 5, 7, 33, 34, 1000])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_limited_validation_reads_the_same_windows_on_any_number_of_processes(limit, world):
    n_windows, batch_size = 100, 3
    ranks = [batches(ValidationOrder(n_windows * 8 + 1, 8, batch_size, rank, world, limit)) for rank in range(world)]
    alone = [start for batch in batches(ValidationOrder(n_windows * 8 + 1, 8, batch_size)) for start in batch]
    wanted = alone[: limit * batch_size]
    read = {start for rank in ranks for batch in rank for start in batch}
    assert read == set(wanted[: len(wanted) - len(wanted) % world])  # all, but for what cannot be shared evenly
    assert max(len(rank) for rank in ranks) <= limit  # or the loops' own count would cut it


def test_a_validation_that_is_limited_to_fewer_windows_than_processes_is_refused():
    with pytest.raises(ValueError, match=r"limit_val_batches=1 gives 2 sequences, fewer than the 3 .* 2 or more works"):
        ValidationOrder(1000, 8, 2, 0, 3, 1)


def test_validation_with_fewer_windows_than_processes_is_refused():
    with pytest.raises(ValueError, match=r"2 windows, fewer than the 3 processes"):
        ValidationOrder(17, 8, 3, 0, 3)


# Too little text -----------------------------------------------------------------------------------------------------


def orders_of(n_tokens: int) -> Iterator[tuple[str, type]]:
    yield "train", lambda: train_order(n_tokens=n_tokens)
    yield "val", lambda: ValidationOrder(n_tokens, 8, 3)


def test_a_block_longer_than_the_shards_is_refused_and_one_that_just_fits_is_not():
    for split, make in orders_of(8):
        with pytest.raises(
            ValueError,
            match=rf"data.block_size=8 .* {split!r} has 8; what works: data.block_size=7 or less, or more text",
        ):
            make()
    for split, make in orders_of(1):
        with pytest.raises(ValueError, match=rf"{split!r} has 1; what works: more text"):
            make()
    for _, make in orders_of(9):
        assert batches(make(), 1)[0][0] == 0


# Batches put in turns, dealt out by accelerate itself.


LISTS = [[[0, 1], [4, 5], [8]], [[2, 3], [6, 7], [9]]]  # of two processes; the last turn is smaller


def test_accelerate_deals_out_to_each_process_its_own_batches():
    loader = interleave([DataLoader(range(10), batch_sampler=batches) for batches in LISTS])
    assert len(loader) == 6
    for rank, own in enumerate(LISTS):
        assert list(BatchSamplerShard(loader.batch_sampler, 2, rank, even_batches=False)) == own
