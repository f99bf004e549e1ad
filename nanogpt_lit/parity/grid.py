"""The cases of the comparison, both frameworks against plain PyTorch in each, and the memory that each takes."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from nanogpt_lit.data.datamodule import TokenDataModule
from nanogpt_lit.parity.processes import in_new_processes, peak_bytes, run_together
from nanogpt_lit.parity.record import Curves, Difference, compare, earliest
from nanogpt_lit.parity.runs import LOOPS, OVERFLOWS, Case, quiet

AXES: dict[str, tuple[Any, ...]] = {
    "precision": ("32-true", "bf16-mixed", "16-mixed", "16-mixed overflow"),
    "accumulate": (1, 4),
    "clip": ("off", "on"),
    "dropout": (0.0, 0.1),
    "optimizer": ("for-loop", "foreach", "fused"),
    "ragged": ("no", "yes"),
    "processes": ("1", "2", "2-fsdp2"),
}
"""Values of each axis of the grid. 2-fsdp2 has no scaler."""
MEANINGS = {
    "precision": "as Lightning names it; overflow: float16 whose scale starts too high, skips steps and grows later",
    "accumulate": "micro-batches per optimizer step",
    "clip": "gradients clipped by their global norm",
    "dropout": "its probability",
    "optimizer": "the implementation of torch's AdamW",
    "ragged": "the training loader ends inside an accumulation window, and starts again",
    "processes": "2 under DistributedDataParallel (gloo), or each with its share of the weights under FSDP2",
}

Point = dict[str, Any]


def every_combination(axes: dict[str, tuple[Any, ...]]) -> list[Point]:
    points = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    return [point for point in points if not (is_sharded(point) and point["precision"].startswith("16"))]


def is_sharded(point: Point) -> bool:
    return str(point.get("processes")).endswith("fsdp2")


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
    """The case at a point. base: gives network, optimizer, schedule and seed   clip: what "on" means"""
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
        processes=int(point["processes"][0]),
        sharded=is_sharded(point),
    )


FRAMEWORKS = ("lightning", "accelerate")


@dataclass(frozen=True)
class Outcome:
    differences: dict[str, Difference | None]
    """The first, of each framework from plain PyTorch."""
    quantities: int
    """Compared in each loop, over all processes."""
    skipped_steps: int
    seconds_per_step: dict[str, float]
    """The mean of each loop, validation included."""
    curves: dict[str, Curves]

    @property
    def identical(self) -> bool:
        return not any(self.differences.values())


def compare_loops(case: Case, data: TokenDataModule, turn: int = 0) -> Outcome:
    """Run a case in each loop. turn: chooses the loop that is first, so that in a row of cases each is as often"""
    names = [*LOOPS]
    names = names[turn % len(names) :] + names[: turn % len(names)]
    runs = {name: LOOPS[name](case, data) for name in names}
    expected = runs["reference"]
    return Outcome(
        {name: compare(expected.entries, runs[name].entries) for name in FRAMEWORKS},
        len(expected.entries),
        int(max(values.get("train/skipped_steps", 0) for _, values in expected.curves)),
        {name: runs[name].seconds_per_step for name in LOOPS},
        {name: runs[name].curves for name in LOOPS},
    )


def warm_up(case: Case, data: TokenDataModule) -> None:
    """Run each loop once, so that what happens only once in a process is in nobody's time."""
    for run in LOOPS.values():
        run(case, data)


def compare_together(processes: int, cases: Sequence[Case], data: TokenDataModule) -> list[Outcome]:
    """The outcome of each case of several processes. They are started once: that takes as long as many cases."""
    data.position = None
    of_ranks = run_together(processes, compare_cases, cases, data)
    return [of_all_ranks(outcomes) for outcomes in zip(*of_ranks, strict=True)]


def compare_cases(cases: Sequence[Case], data: TokenDataModule) -> list[Outcome]:
    quiet()
    warm_up(cases[0], data)
    return [compare_loops(case, data, turn) for turn, case in enumerate(cases)]


def of_all_ranks(outcomes: Sequence[Outcome]) -> Outcome:
    first = outcomes[0]
    return Outcome(
        {name: earliest([outcome.differences[name] for outcome in outcomes]) for name in FRAMEWORKS},
        sum(outcome.quantities for outcome in outcomes),
        first.skipped_steps,
        {name: max(outcome.seconds_per_step[name] for outcome in outcomes) for name in LOOPS},
        first.curves,
    )


def peak_growth_mib(case: Case, data: TokenDataModule) -> dict[str, float] | None:
    """The growth of a fresh process's peak resident memory from just before each loop is called to its end.

    Weights, gradients, optimizer states, activations, the comparison's own copies, and what the loop's library loads
    are in it, the libraries' import is not. None where the system does not tell a process its peak (Windows).
    """
    if peak_bytes() is None:
        return None
    data.position = None
    grown = in_new_processes(len(LOOPS), grow, case, data, torch.get_num_threads())
    return dict(zip(LOOPS, grown, strict=True))


def grow(rank: int, folder: Path, case: Case, data: TokenDataModule, threads: int) -> float:
    quiet()
    torch.set_num_threads(threads)
    before = peak_bytes()
    list(LOOPS.values())[rank](case, data)
    after = peak_bytes()
    assert before is not None
    assert after is not None
    return (after - before) / 2**20
