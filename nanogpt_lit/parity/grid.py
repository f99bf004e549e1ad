"""The cases that the loops are compared in."""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from nanogpt_lit.parity.runs import Case
from nanogpt_lit.parity.settled import OVERFLOWS

AXES: dict[str, tuple[Any, ...]] = {
    "precision": ("32-true", "bf16-mixed", "16-mixed", "16-mixed overflow"),
    "accumulate": (1, 4),
    "clip": ("off", "on"),
    "dropout": (0.0, 0.1),
    "optimizer": ("for-loop", "foreach", "fused"),
    "ragged": ("no", "yes"),
    "processes": (1, 2),
}
"""overflow: the scaler skips its first steps and grows its scale later   ragged: the loader ends inside a window"""

Point = dict[str, Any]


def every_combination(axes: dict[str, tuple[Any, ...]]) -> list[Point]:
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def every_pair(axes: dict[str, tuple[Any, ...]]) -> list[Point]:
    """Few points that have every value of each axis together with every value of each other axis."""
    points = every_combination(axes)
    missing = {pair for point in points for pair in pairs(point)}
    chosen: list[Point] = []
    while missing:
        best = max(points, key=lambda point: len(missing & set(pairs(point))))
        chosen.append(best)
        missing -= set(pairs(best))
    order = list(axes.values())
    return sorted(chosen, key=lambda point: [axis.index(v) for axis, v in zip(order, point.values(), strict=True)])


def pairs(point: Point) -> Iterator[tuple[Any, ...]]:
    return itertools.combinations(point.items(), min(2, len(point)))


def case_of(point: Point, base: Case, clip: float) -> Case:
    """base: gives the network, the optimizer, the schedule and the seed   clip: what "on" means"""
    accumulate = point["accumulate"]
    precision, _, overflow = point["precision"].partition(" ")
    return replace(
        base,
        settings=replace(
            base.settings,
            precision=precision,
            accumulate_grad_batches=accumulate,
            gradient_clip_val=clip if point["clip"] == "on" else None,
            val_check_interval=2 * accumulate + 1,  # in the middle of an epoch, and of a window where there are any
            limit_val_batches=2,
        ),
        gpt=replace(base.gpt, dropout=point["dropout"]),
        optim=replace(base.optim, implementation=point["optimizer"]),
        scaler=OVERFLOWS if overflow else {},
        batches_per_epoch=2 * accumulate + max(1, accumulate // 2) if point["ragged"] == "yes" else None,
        processes=point["processes"],
    )
