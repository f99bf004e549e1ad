"""Both frameworks against plain PyTorch, in a case or without one of the settled differences."""

from collections.abc import Sequence
from dataclasses import dataclass

from nanogpt_lit.data.datamodule import TokenDataModule
from nanogpt_lit.parity.curves import Curves
from nanogpt_lit.parity.processes import run_together
from nanogpt_lit.parity.record import Difference, compare
from nanogpt_lit.parity.runs import LOOPS, Case, quiet

FRAMEWORKS = ("lightning", "accelerate")


@dataclass(frozen=True)
class Outcome:
    differences: dict[str, Difference | None]
    """The first, of each framework from plain PyTorch."""
    quantities: int
    """Compared in each loop, over all processes."""
    skipped_steps: int
    seconds_per_step: dict[str, float]
    """Of each loop, validation in it."""
    curves: dict[str, Curves]

    @property
    def identical(self) -> bool:
        return not any(self.differences.values())


def compare_loops(case: Case, data: TokenDataModule, turn: int = 0) -> Outcome:
    """turn: which loop is the first, so that in a row of cases each is as often"""
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
    """What happens once only in a process is then not in anybody's time."""
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


def earliest(differences: Sequence[Difference | None]) -> Difference | None:
    """Of the processes' first differences, that which came first."""
    found = [difference for difference in differences if difference is not None]
    return min(found, key=lambda difference: difference.position, default=None)
