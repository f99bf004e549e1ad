"""PyTorch's CUDA caching allocator, simulated: what it takes from the GPU for a given sequence of allocations.

A GPU must hold what is reserved, not what is allocated: blocks are cut from segments, segments are kept, and what is
left between blocks may fit nothing; what one stream has released, another never takes. The rules are those of
c10/cuda/CUDACachingAllocator.cpp with default settings, as long as memory lasts. `expandable` is
PYTORCH_ALLOC_CONF=expandable_segments:True, which only Linux has. tests/fake_gpu compares both with PyTorch's own.
"""

import bisect
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

MIB = 2**20
SMALL_BLOCK = 1 * MIB
"""Up to here a block comes from a small segment."""
SMALL_SEGMENT, LARGE_SEGMENT, LARGE_BLOCK, SEGMENT_STEP = 2 * MIB, 20 * MIB, 10 * MIB, 2 * MIB


class Event(NamedTuple):
    """One allocation on the GPU, or with negative bytes its release."""

    serial: int
    bytes: int
    stream: int = 0
    """Stream that it was allocated in; 0 is the one that computes."""


Pool = tuple[bool, int]
"""(small, stream) of the blocks that may take each other's place; a plain tuple, for one is made with each block."""


class Usage(NamedTuple):
    """Peaks, in bytes."""

    allocated: int
    reserved: int


def rounded(size: int) -> int:
    """The size of the block for so many bytes: multiples of 512."""
    return (size + 511) // 512 * 512 or 512


def segment_size(block: int) -> int:
    """Bytes taken from the GPU when no free block will do."""
    if block <= SMALL_BLOCK:
        return SMALL_SEGMENT
    if block < LARGE_BLOCK:
        return LARGE_SEGMENT
    return (block + SEGMENT_STEP - 1) // SEGMENT_STEP * SEGMENT_STEP


def replay(events: Iterable[tuple[int, int, int]], expandable: bool = False) -> Usage:
    """The peaks of a whole sequence of Events."""
    allocator = ExpandableAllocator() if expandable else CachingAllocator()
    malloc, free = allocator.malloc, allocator.free
    for serial, size, stream in events:
        if size > 0:
            malloc(serial, size, stream)
        else:
            free(serial)
    return Usage(allocator.peak_allocated, allocator.peak_reserved)


@dataclass(eq=False, slots=True)
class _Block:
    address: int
    size: int
    pool: Pool
    free: bool = True
    before: "_Block | None" = None
    after: "_Block | None" = None


class CachingAllocator:
    """Segments that are cut into blocks; the best fitting free block is taken, neighbours that are free are joined."""

    def __init__(self) -> None:
        self.allocated = self.peak_allocated = self.reserved = self.peak_reserved = 0
        self._free: dict[Pool, list[tuple[int, int, _Block]]] = defaultdict(list)
        """(size, address, block), sorted."""
        self._used: dict[int, _Block] = {}  # by the caller's serial
        self._next_address = 0

    def malloc(self, serial: int, size: int, stream: int = 0) -> None:
        if size % 512:
            size = rounded(size)
        pool = size <= SMALL_BLOCK, stream
        block = self._best_fit(size, pool) or self._more_memory(size, pool)
        rest = block.size - size
        if rest > self._too_little_to_split(pool):
            tail = _Block(block.address + size, rest, pool, before=block, after=block.after)
            if block.after is not None:
                block.after.before = tail
            block.after, block.size = tail, size
            self._keep(tail)
        block.free = False
        self._used[serial] = block
        self.allocated += block.size
        if self.allocated > self.peak_allocated:
            self.peak_allocated = self.allocated

    def free(self, serial: int) -> None:
        block = self._used.pop(serial)
        block.free = True
        self.allocated -= block.size
        if block.before is not None and block.before.free:
            self._forget(block.before)
            block = self._joined(block.before, block)
        if block.after is not None and block.after.free:
            self._forget(block.after)
            block = self._joined(block, block.after)
        self._keep(block)

    def _too_little_to_split(self, pool: Pool) -> int:
        return 0 if pool[0] else SMALL_BLOCK

    def _best_fit(self, size: int, pool: Pool) -> _Block | None:
        free = self._free[pool]
        index = bisect.bisect_left(free, (size,))
        return free.pop(index)[2] if index < len(free) else None

    def _more_memory(self, size: int, pool: Pool) -> _Block:
        segment = segment_size(size)
        self._count_reserved(segment)
        self._next_address += segment + MIB  # segments never touch
        return _Block(self._next_address - segment, segment, pool)

    def _count_reserved(self, size: int) -> None:
        self.reserved += size
        self.peak_reserved = max(self.peak_reserved, self.reserved)

    @staticmethod
    def _joined(first: _Block, second: _Block) -> _Block:
        first.size += second.size
        first.after = second.after
        if second.after is not None:
            second.after.before = first
        return first

    def _keep(self, block: _Block) -> None:
        bisect.insort(self._free[block.pool], (block.size, block.address, block))

    def _forget(self, block: _Block) -> None:
        free = self._free[block.pool]
        del free[bisect.bisect_left(free, (block.size, block.address))]


class ExpandableAllocator(CachingAllocator):
    """PyTorch's allocator with expandable_segments: for each stream one segment for small and one for large blocks,
    which grow at their ends by pages of 2 and 20 MiB."""

    def __init__(self) -> None:
        super().__init__()
        self._ends: dict[Pool, _Block] = {}
        """The end of each segment, a block that is never free."""

    def _too_little_to_split(self, pool: Pool) -> int:
        return 0

    def _end(self, pool: Pool) -> _Block:
        if pool not in self._ends:
            self._ends[pool] = _Block(len(self._ends) * 2**50, 0, pool, free=False)
        return self._ends[pool]

    def _best_fit(self, size: int, pool: Pool) -> _Block | None:
        free, end = self._free[pool], self._end(pool)
        index = bisect.bisect_left(free, (size,))
        # The last block counts for as large as it can grow: any other that will do is taken before it.
        if index + 1 < len(free) and free[index][2].after is end:
            index += 1
        return free.pop(index)[2] if index < len(free) else None

    def _more_memory(self, size: int, pool: Pool) -> _Block:
        end = self._end(pool)
        last = end.before
        if last is not None and last.free:
            self._forget(last)
        else:
            last = _Block(end.address, 0, pool, before=last, after=end)
            if last.before is not None:
                last.before.after = last
            end.before = last
        page = SMALL_SEGMENT if pool[0] else LARGE_SEGMENT
        growth = (size - last.size + page - 1) // page * page
        self._count_reserved(growth)
        last.size += growth
        end.address += growth
        return last
