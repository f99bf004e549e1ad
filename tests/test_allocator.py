"""Segments and blocks of the caching allocator, counted by hand from the rules of CUDACachingAllocator.cpp."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt_lit.plan.allocator import MIB, CachingAllocator, Event, ExpandableAllocator, replay, rounded


def in_turn(*sizes_mib):
    """Allocations one after another, none released."""
    return [Event(i, round(size * MIB)) for i, size in enumerate(sizes_mib)]


@pytest.mark.parametrize(("size", "block"), [(1, 512), (512, 512), (513, 1024), (MIB, MIB), (MIB + 1, MIB + 512)])
def test_blocks_are_multiples_of_512(size, block):
    assert rounded(size) == block


@pytest.mark.parametrize(
    ("sizes_mib", "reserved_mib"),
    [
        ([0.5], 2),  # small blocks share segments of 2 MiB
        ([0.5] * 4, 2),
        ([0.5] * 5, 4),
        ([3], 20),  # from 1 to 10 MiB, segments of 20
        ([3] * 6, 20),
        ([3] * 7, 40),
        ([10], 10),  # from there, the next multiple of 2
        ([11], 12),
        ([147.4], 148),
        ([0.5, 3, 18], 2 + 20 + 18),
    ],
)
def test_segments_are_taken_in_the_sizes_of_the_allocator(sizes_mib, reserved_mib):
    assert replay(in_turn(*sizes_mib)).reserved == reserved_mib * MIB


def test_the_smallest_free_block_that_will_do_is_taken():
    # Free: 16 and 24. 15 goes into 16 and 24 remains for 23; the other way round, 24 would be broken first.
    events = [*in_turn(24, 16), Event(0, -24 * MIB), Event(1, -16 * MIB), Event(2, 15 * MIB), Event(3, 23 * MIB)]
    assert replay(events).reserved == 40 * MIB


def test_freed_neighbours_become_one_block_again():
    # 20 MiB hold 9 and 9; when both are free, 18 fit.
    events = [*in_turn(9, 9), Event(0, -9 * MIB), Event(1, -9 * MIB), Event(2, 18 * MIB)]
    assert replay(events).reserved == 20 * MIB


def test_a_gap_between_two_blocks_is_lost_to_a_larger_one():
    events = [*in_turn(9, 2, 9), Event(0, -9 * MIB), Event(2, -9 * MIB), Event(3, 18 * MIB)]
    assert replay(events).reserved == 20 * MIB + 18 * MIB


def test_what_is_too_little_to_split_off_counts_as_allocated():
    # 12 MiB were reserved for 12; of these 11 are asked for, and a rest of at most 1 MiB stays with the block.
    events = [Event(0, 12 * MIB), Event(0, -12 * MIB), Event(1, 11 * MIB)]
    assert replay(events).allocated == 12 * MIB
    allocator = CachingAllocator()
    for event in events[:1]:
        allocator.malloc(event.serial, event.bytes)
    allocator.free(0)
    allocator.malloc(1, 11 * MIB)
    assert allocator.allocated == 12 * MIB
    allocator.free(1)
    allocator.malloc(2, 11 * MIB - 512)  # a rest of more than 1 MiB is split off
    assert allocator.allocated == 11 * MIB - 512


def test_expandable_segments_map_pages_and_close_gaps():
    # One range: 30 MiB map two pages of 20; 40 begin at 0 again and need no new ones; 41 need a third.
    assert replay([*in_turn(30), Event(0, -30 * MIB), Event(1, 40 * MIB)], expandable=True).reserved == 40 * MIB
    assert replay([*in_turn(30), Event(0, -30 * MIB), Event(1, 41 * MIB)], expandable=True).reserved == 60 * MIB


def test_the_end_of_an_expandable_segment_is_taken_last():
    # Free: 18 MiB in the middle and 15 at the end. 14 would fit the end best, which could grow; the middle is taken.
    events = [*in_turn(18, 25, 2), Event(0, -18 * MIB), Event(3, 14 * MIB), Event(4, 16 * MIB)]
    assert replay(events, expandable=True).reserved == 80 * MIB
    assert replay([*events[:4], Event(3, 16 * MIB), Event(4, 14 * MIB)], expandable=True).reserved == 60 * MIB


def test_expandable_segments_leave_no_rest_with_a_block():
    events = [Event(0, 12 * MIB), Event(0, -12 * MIB), Event(1, 11 * MIB)]
    assert replay(events, expandable=True).allocated == 12 * MIB
    allocator = ExpandableAllocator()
    for event in events[:1]:
        allocator.malloc(event.serial, event.bytes)
    allocator.free(0)
    allocator.malloc(1, 11 * MIB)
    assert allocator.allocated == 11 * MIB


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 40 * MIB), st.integers(0, 5)), min_size=1, max_size=60),
    st.booleans(),
)
def test_any_sequence_is_accounted_for(requests, expandable):
    """Each request is for so many bytes and lives until so many further requests."""
    allocator = ExpandableAllocator() if expandable else CachingAllocator()
    alive = {}
    for serial, (size, lifetime) in enumerate(requests):
        for old in [old for old, (_, until) in alive.items() if until < serial]:
            allocator.free(old)
            del alive[old]
        allocator.malloc(serial, size)
        alive[serial] = (size, serial + lifetime)
        spans = sorted(span(allocator, serial) for serial in alive)
        assert all(first[1] <= second[0] for first, second in itertools.pairwise(spans))  # none overlap
        assert sum(rounded(size) for size, _ in alive.values()) <= allocator.allocated <= allocator.reserved
    for serial in alive:
        allocator.free(serial)
    assert allocator.allocated == 0


def span(allocator, serial):
    """Addresses of a block."""
    block = allocator._used[serial]
    return block.address, block.address + block.size
