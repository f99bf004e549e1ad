"""Successive halving at equal time: many short runs, fewer longer ones, and at last the best against the YAML.

Lightning's Tuner raises the rate within one run and takes the steepest place of its loss, which knows neither time nor
recipes nor seeds; optuna's and ray's halving counts a run's own steps and stops before what a schedule does at its
end. Here each run has a whole schedule, as short as the run, and the search is three rounds of a sorted list.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from nanogpt_lit.errors import UserError
from nanogpt_lit.tune.trials import Candidate, Trials, micro_batches, other_steps

RATES = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Learning rates that are tried with each recipe, as multiples of the YAML's."""
KEPT = 3
SEEDS = 3
UNITS = (1, 2, 4)
"""Length of a run in each round, as a multiple of the first round's."""
SECOND_ROUND = KEPT + 4
MIN_STEPS = 20
"""Least steps of the YAML's own candidate in the shortest run: fewer prove nothing."""
SLOWER = 1.5
"""A budget that is advised is enough for a machine that is so much slower when the advice is followed."""
FASTER = 0.97
"""A micro-batch must need less than this share of the time: it changes the YAML for nothing else."""
FULL = 0.97
"""Share of the budget that is planned."""
VALIDATION = 0.1
"""Largest share of a run's time."""
T_95 = {2: 6.31, 3: 2.92}
"""Student's t, one-sided 95 %, for so many pairs."""
HORIZON = 0.32
"""The best rate falls with the tokens of a run to this power: Bjorck et al. (arXiv:2409.19913)."""
LOWEST = 0.25
"""Least share of the best rate that is proposed: the law was found with far longer runs."""


@dataclass(frozen=True)
class Run:
    candidate: Candidate
    round: int
    seed: int
    given_s: float
    steps: int
    loss: float
    """Validation loss at the end; infinite where the run diverged."""
    curve: list[float] = field(repr=False, default_factory=list)


@dataclass
class Found:
    """All that was measured: what is proposed follows from it alone."""

    own: Candidate
    max_steps: int
    speeds: dict[Candidate, float] = field(default_factory=dict)
    """Seconds per optimizer step; the rate plays no part."""
    runs: list[Run] = field(default_factory=list)
    elapsed_s: float = 0.0

    def step_s(self, candidate: Candidate) -> float:
        return self.speeds[replace(candidate, lr=self.own.lr)]

    @property
    def run_s(self) -> float:
        """Seconds of the whole run that the YAML asks for."""
        return self.max_steps * self.step_s(self.own)

    def ranking(self, round: int) -> list[Run]:
        """The runs of a round that did not diverge, best first."""
        runs = [run for run in self.runs if run.round == round and math.isfinite(run.loss)]
        return sorted(runs, key=lambda run: run.loss)


def search(
    trials: Trials,
    own: Candidate,
    recipes: Sequence[str],
    max_steps: int,
    budget_s: float,
    clock: Callable[[], float],
    fits: Callable[[Candidate], bool] = lambda candidate: True,
    seed: int = 0,
    report: Callable[[str], None] = print,
) -> Found:
    """Measure candidates in three rounds.

    fits: whether a candidate's micro-batch fits the memory   seed: of the runs that choose; others decide
    report: takes a line for each round and run

    Raises UserError where the budget is too short to tell anything.
    """
    started_s, found = clock(), Found(own, max_steps)
    found.speeds = trials.speeds([own], min(2.0, 0.01 * budget_s))
    units = len(recipes) * len(RATES) + UNITS[1] * SECOND_ROUND + UNITS[2] * 2 * SEEDS
    steps = units * MIN_STEPS * (1 + VALIDATION)
    if steps * found.step_s(own) > budget_s:
        # Measured again, for as long as a longer budget would: the advice has to hold when it is followed.
        step_s = max(found.step_s(own), trials.speeds([own], 2.0)[own])
        raise UserError(
            f"--budget={budget_s:g}s is too short: a step of this network takes {step_s:.2g} s here, and comparing "
            f"runs of {MIN_STEPS} steps or more needs --budget {math.ceil(SLOWER * steps * step_s / 60)}min."
        )
    base = _fastest(trials, [c for c in micro_batches(own) if c == own or fits(c)], found, budget_s)
    measured = [replace(base, recipe=recipe, lr=own.lr) for recipe in recipes]
    _measure(trials, measured, found, 0.04 * budget_s)

    slowdown = 1 + VALIDATION
    candidates = [replace(base, recipe=recipe, lr=own.lr * by) for recipe in recipes for by in RATES]
    for round, length in enumerate(UNITS, start=1):
        seeds = [seed]
        if round > 1:
            ranked = [run.candidate for run in found.ranking(round - 1)]
            if not ranked:
                break
            if round == 2:
                candidates = _second_round(ranked, replace(base, lr=own.lr), own, fits)
                unknown = [replace(candidate, lr=own.lr) for candidate in candidates]
                unknown = [candidate for candidate in dict.fromkeys(unknown) if candidate not in found.speeds]
                _measure(trials, unknown, found, 0.02 * budget_s)
            else:
                # Seeds that chose nothing: the best of many is lucky on those that chose it.
                challengers = [candidate for candidate in ranked if candidate != own]
                candidates, seeds = [*challengers[:1], own], [seed + n for n in range(1, SEEDS + 1)]
        left_s = FULL * budget_s - (clock() - started_s)
        here = length * len(candidates) * len(seeds)
        later = (0, UNITS[2] * 2 * SEEDS, UNITS[2] * 2 * SEEDS + UNITS[1] * SECOND_ROUND)[len(UNITS) - round]
        given_s = min(length * left_s / slowdown / (here + later), found.run_s)
        if given_s < found.step_s(own):  # stopped, or out of time
            break
        report(f"round {round}: {len(candidates) * len(seeds)} runs of {given_s:.3g} s")
        began_s = clock()
        for each in seeds:
            for candidate in candidates:
                steps = max(1, int(given_s / found.step_s(candidate)))
                # A pass forward over a micro-batch takes a third of its training; half, to be sure.
                batch_s = found.step_s(own) / own.accumulate_grad_batches / 2
                val_batches = max(1, min(trials.val_batches, int(VALIDATION * given_s / batch_s)))
                result = trials.run(candidate, steps, each, val_batches)
                if result is None:  # Ctrl-C, or the budget
                    found.elapsed_s = clock() - started_s
                    return found
                found.runs.append(Run(candidate, round, each, given_s, steps, *result))
                report(f"  {candidate}: {result[0]:.4f} after {steps:,} steps")
        slowdown = (clock() - began_s) / (given_s * len(candidates) * len(seeds))
    found.elapsed_s = clock() - started_s
    return found


def _fastest(trials: Trials, candidates: list[Candidate], found: Found, budget_s: float) -> Candidate:
    found.speeds |= trials.speeds(candidates, min(0.04 * budget_s, found.run_s))
    fastest = min(candidates, key=found.step_s)
    return fastest if found.step_s(fastest) < FASTER * found.step_s(found.own) else found.own


def _measure(trials: Trials, candidates: Sequence[Candidate], found: Found, budget_s: float) -> None:
    """Measure speeds relative to the YAML's own candidate, measured again: a slower machine is slower for all."""
    measured = trials.speeds(list(dict.fromkeys([found.own, *candidates])), min(budget_s, found.run_s))
    faster = found.step_s(found.own) / measured[found.own]
    found.speeds |= {candidate: step_s * faster for candidate, step_s in measured.items() if candidate != found.own}


def _second_round(
    ranked: list[Candidate], same: Candidate, own: Candidate, fits: Callable[[Candidate], bool]
) -> list[Candidate]:
    """The best of the first, the YAML's values, other steps than the best has, and the rate beyond it at an edge."""
    best = ranked[0]
    beyond = {RATES[0]: 0.5, RATES[-1]: 2.0}.get(best.lr / own.lr)
    edge = [] if beyond is None else [replace(best, lr=best.lr * beyond)]
    others = [candidate for candidate in other_steps(best) if fits(candidate)]
    return list(dict.fromkeys([*ranked[:KEPT], same, *others, *edge]))


@dataclass(frozen=True)
class Decision:
    proposed: Candidate
    """The YAML's own where nothing is better for sure."""
    challenger: Candidate
    gains: tuple[float, ...]
    """Gain in validation loss over the YAML's values, seed by seed."""
    sure: bool | None
    """True where the gain is more than the seeds make; None where the search was stopped before it could tell."""
    given_s: float
    """Seconds that each run of the comparison had, at most as long as the whole run."""


def decide(found: Found) -> Decision | None:
    """The decision that follows from the measurements; None where there are too few to propose anything."""
    final = {(run.candidate, run.seed): run for run in found.runs if run.round == len(UNITS)}
    pairs = [
        (run, final[found.own, run.seed])
        for run in final.values()
        if run.candidate != found.own and (found.own, run.seed) in final
    ]
    if not pairs:
        # A round that was cut short has not tried all: its runs still are the longest.
        ranked = [run for round in (2, 1) for run in found.ranking(round)]
        if not ranked:
            return None
        best = ranked[0]
        return Decision(_carried(best, found), best.candidate, (), None, best.given_s)
    challenger = pairs[0][0]
    gains = tuple(_difference(own.loss, run.loss) for run, own in pairs)
    sure = surely_better(gains)
    proposed = found.own if not sure and (sure is False or gains[0] <= 0) else _carried(challenger, found)
    return Decision(proposed, challenger.candidate, gains, sure, challenger.given_s)


def surely_better(gains: Sequence[float]) -> bool | None:
    """True where the mean is above zero by more than its error, with 95 %; None for a single pair."""
    if len(gains) < 2:
        return None
    if any(math.isinf(gain) for gain in gains):
        return min(gains) > 0
    return statistics.mean(gains) > T_95[len(gains)] * statistics.stdev(gains) / len(gains) ** 0.5


def _difference(own: float, other: float) -> float:
    return -math.inf if math.isinf(other) else own - other


def _carried(run: Run, found: Found) -> Candidate:
    """The candidate, with its rate for a run of the YAML's length; the YAML's rate where that lies between the two."""
    best = run.candidate.lr
    carried = best * max(LOWEST, min(1.0, run.given_s / found.run_s) ** HORIZON)
    lr = found.own.lr if carried <= found.own.lr <= best else float(f"{carried:.2g}")
    return replace(run.candidate, lr=lr)
