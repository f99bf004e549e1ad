"""What PyTorch's CUDA caching allocator takes from the card for a given sequence of allocations.

A card must hold what is reserved, not what is allocated: blocks are cut from segments, segments are kept, and what is
left between blocks may fit nothing. The rules are those of c10/cuda/CUDACachingAllocator.cpp with default settings, for
one stream. `expandable` is PYTORCH_ALLOC_CONF=expandable_segments:True, which only Linux has.
"""

import bisect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

MIB = 2**20
SMALL_BLOCK = 1 * MIB
"""Up to here a block comes from a small segment."""
SMALL_SEGMENT, LARGE_SEGMENT, LARGE_BLOCK, SEGMENT_STEP = 2 * MIB, 20 * MIB, 10 * MIB, 2 * MIB


class Event(NamedTuple):
    """One allocation on the card, or with negative bytes its release."""

    serial: int
    bytes: int


class Usage(NamedTuple):
    """Peaks, in bytes."""

    allocated: int
    reserved: int


def rounded(size: int) -> int:
    """The size of the block for so many bytes: multiples of 512."""
    return max(512, (size + 511) // 512 * 512)


def segment_size(block: int) -> int:
    """How much is taken from the card when no free block will do."""
    if block <= SMALL_BLOCK:
        return SMALL_SEGMENT
    if block < LARGE_BLOCK:
        return LARGE_SEGMENT
    return (block + SEGMENT_STEP - 1) // SEGMENT_STEP * SEGMENT_STEP


def replay(events: Iterable[Event], expandable: bool = False, cap: int | None = None) -> Usage:
    """The peaks of a whole sequence. Raises OutOfMemoryError when it needs more than `cap` bytes."""
    allocator = (ExpandableAllocator if expandable else CachingAllocator)(cap)
    for event in events:
        if event.bytes > 0:
            allocator.malloc(event.serial, event.bytes)
        else:
            allocator.free(event.serial)
    return Usage(allocator.peak_allocated, allocator.peak_reserved)


class OutOfMemoryError(Exception):
    """The sequence does not fit under the cap."""


class _Counts:
    def __init__(self, cap: int | None = None) -> None:
        self.cap = cap
        self.allocated = self.peak_allocated = self.reserved = self.peak_reserved = 0

    def _count(self, allocated: int = 0, reserved: int = 0) -> None:
        self.allocated += allocated
        self.reserved += reserved
        if self.allocated > self.peak_allocated:
            self.peak_allocated = self.allocated
        if self.reserved > self.peak_reserved:
            self.peak_reserved = self.reserved

    def _fits(self, size: int) -> bool:
        return self.cap is None or self.reserved + size <= self.cap

    def _refuse(self, size: int) -> None:
        raise OutOfMemoryError(f"{size} bytes more than {self.reserved} of {self.cap}")


@dataclass(eq=False, slots=True)
class _Block:
    address: int
    size: int
    small: bool
    free: bool = True
    before: "_Block | None" = None
    after: "_Block | None" = None

    @property
    def key(self) -> tuple[int, int]:
        return self.size, self.address


class CachingAllocator(_Counts):
    """Segments that are cut into blocks; the best fitting free block is taken, neighbours that are free are joined."""

    def __init__(self, cap: int | None = None) -> None:
        super().__init__(cap)
        self._free: dict[bool, list[tuple[int, int]]] = {True: [], False: []}  # small or not: sorted (size, address)
        self._at: dict[int, _Block] = {}  # free blocks by address
        self._used: dict[int, _Block] = {}  # by the caller's serial
        self._next_address = 0

    def malloc(self, serial: int, size: int) -> None:
        size = rounded(size)
        small = size <= SMALL_BLOCK
        block = self._best_fit(size, small) or self._new_segment(size, small)
        rest = block.size - size
        if rest >= 512 if small else rest > SMALL_BLOCK:
            tail = _Block(block.address + size, rest, small, before=block, after=block.after)
            if block.after is not None:
                block.after.before = tail
            block.after, block.size = tail, size
            self._keep(tail)
        block.free = False
        self._used[serial] = block
        self._count(allocated=block.size)

    def free(self, serial: int) -> None:
        block = self._used.pop(serial)
        block.free = True
        self._count(allocated=-block.size)
        if block.before is not None and block.before.free:
            block = self._join(block.before, block)
        if block.after is not None and block.after.free:
            self._forget(block.after)
            block = self._joined(block, block.after)
        self._keep(block)

    def _join(self, first: _Block, second: _Block) -> _Block:
        self._forget(first)
        return self._joined(first, second)

    @staticmethod
    def _joined(first: _Block, second: _Block) -> _Block:
        first.size += second.size
        first.after = second.after
        if second.after is not None:
            second.after.before = first
        return first

    def _best_fit(self, size: int, small: bool) -> _Block | None:
        index = bisect.bisect_left(self._free[small], (size, 0))
        if index == len(self._free[small]):
            return None
        return self._at.pop(self._free[small].pop(index)[1])

    def _new_segment(self, size: int, small: bool) -> _Block:
        segment = segment_size(size)
        if not self._fits(segment):
            self._release_whole_segments()
            if not self._fits(segment):
                self._refuse(segment)
        self._count(reserved=segment)
        self._next_address += segment + MIB  # segments never touch
        return _Block(self._next_address - segment, segment, small)

    def _release_whole_segments(self) -> None:
        for block in list(self._at.values()):
            if block.before is None and block.after is None:
                self._forget(block)
                self._count(reserved=-block.size)

    def _keep(self, block: _Block) -> None:
        bisect.insort(self._free[block.small], block.key)
        self._at[block.address] = block

    def _forget(self, block: _Block) -> None:
        keys = self._free[block.small]
        keys.pop(bisect.bisect_left(keys, block.key))
        del self._at[block.address]


def page_size(small: bool) -> int:
    return SMALL_SEGMENT if small else LARGE_SEGMENT


class ExpandableAllocator(_Counts):
    """One range of addresses for small and one for large blocks; pages of 2 and 20 MiB are mapped where blocks lie."""

    def __init__(self, cap: int | None = None) -> None:
        super().__init__(cap)
        self._spans: dict[bool, list[tuple[int, int]]] = {True: [], False: []}  # used [start, end), sorted
        self._mapped: dict[bool, set[int]] = {True: set(), False: set()}
        self._used: dict[int, tuple[bool, tuple[int, int]]] = {}

    def malloc(self, serial: int, size: int) -> None:
        size = rounded(size)
        small = size <= SMALL_BLOCK
        start = self._best_hole(size, small)
        span = (start, start + size)
        missing = self._pages(span, small) - self._mapped[small]
        if not self._fits(len(missing) * page_size(small)):
            self._unmap_unused()
            missing = self._pages(span, small) - self._mapped[small]
            if not self._fits(len(missing) * page_size(small)):
                self._refuse(len(missing) * page_size(small))
        self._mapped[small] |= missing
        bisect.insort(self._spans[small], span)
        self._used[serial] = (small, span)
        self._count(allocated=size, reserved=len(missing) * page_size(small))

    def free(self, serial: int) -> None:
        small, span = self._used.pop(serial)
        spans = self._spans[small]
        spans.pop(bisect.bisect_left(spans, span))
        self._count(allocated=span[0] - span[1])

    def _best_hole(self, size: int, small: bool) -> int:
        """The smallest hole between used spans that will do, or the end."""
        best, end = None, 0
        for start, following in self._spans[small]:
            hole = start - end
            if hole >= size and (best is None or hole < best[0]):
                best = (hole, end)
            end = following
        return end if best is None else best[1]

    def _pages(self, span: tuple[int, int], small: bool) -> set[int]:
        return set(range(span[0] // page_size(small), (span[1] - 1) // page_size(small) + 1))

    def _unmap_unused(self) -> None:
        for small, mapped in self._mapped.items():
            used = set().union(*(self._pages(span, small) for span in self._spans[small]))
            self._count(reserved=-len(mapped - used) * page_size(small))
            self._mapped[small] = mapped & used
