"""The largest batch, sequence and network that fit."""

from collections.abc import Callable

FURTHEST = 8
"""A line through two small sizes may be wrong about the slope: so many times the larger of them is not gone beyond."""


def largest(reserved_mib: Callable[[int], float], start: int, usable_mib: float, unit: int = 1) -> int | None:
    """The largest multiple of `unit`, to within 3 percent, that needs no more than usable_mib; None where not even
    `unit` does.

    reserved_mib: of a size, growing with it   start: a size to begin with
    Memory grows nearly in a line with the batch and the sequence: a line through two sizes leads to the third.
    """
    known: dict[int, float] = {}
    fitting, too_large = 0, None
    size = max(unit, start // unit * unit)
    while True:
        known[size] = reserved_mib(size)
        if known[size] <= usable_mib:
            fitting = size
        else:
            too_large = size
        enough = max(unit, int(0.03 * fitting) // unit * unit)
        if too_large is not None and too_large - fitting <= enough:
            return fitting or None
        if fitting == 0:
            size = size // 2  # nothing is known of the line yet
        elif len(known) == 1:
            size = 2 * fitting
        else:
            other = min(known) if too_large is None else too_large
            slope = (known[other] - known[fitting]) / (other - fitting)
            size = fitting + int((usable_mib - known[fitting]) / slope) if slope > 0 else FURTHEST * fitting
        # Each step is so large that it ends the search if it leads too far.
        size = max(size // unit * unit, fitting + enough)
        if too_large is not None:
            size = min(size, max(fitting + enough, too_large - enough))
        elif len(known) > 1:
            size = min(size, FURTHEST * fitting)
