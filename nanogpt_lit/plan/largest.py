"""The largest batch, sequence and network that fit."""

from collections.abc import Callable


def largest(reserved_mib: Callable[[int], float], start: int, usable_mib: float, unit: int = 1) -> int | None:
    """The largest multiple of `unit`, to within 3 percent, that needs no more than usable_mib; None where not even
    `unit` does.

    reserved_mib: of a size, growing with it   start: a size to begin with
    Memory grows nearly in a line with the batch and the sequence: a line through two sizes leads to the third.
    """
    fitting: tuple[int, float] = (0, 0.0)
    size = max(unit, start // unit * unit)
    while (needed := reserved_mib(size)) <= usable_mib:
        fitting, size = (size, needed), 2 * size
    too_large: tuple[int, float] = (size, needed)
    while too_large[0] - fitting[0] > max(unit, int(0.03 * fitting[0])):
        if fitting[0] == 0:
            size = too_large[0] // 2  # nothing is known of the line yet
        else:
            slope = (too_large[1] - fitting[1]) / (too_large[0] - fitting[0])
            size = fitting[0] + int((usable_mib - fitting[1]) / slope)
        size = min(max(size // unit * unit, fitting[0] + unit), too_large[0] - unit)
        needed = reserved_mib(size)
        if needed <= usable_mib:
            fitting = (size, needed)
        else:
            too_large = (size, needed)
    return fitting[0] or None
