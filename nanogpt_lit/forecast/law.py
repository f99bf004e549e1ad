"""A law of the loss in the size of a network and the tokens that it reads, and how much of it is not known.

L(N, D) = E + A / N^a + B / D^b (Hoffmann et al., arXiv:2203.15556). A few runs cannot tell five numbers, so each has a
prior, and what the runs leave is a distribution of laws; an interval holds a share of it. With exponents and noise
given, the law is linear in E, A and B, and their distribution is a normal one in closed form; a grid has the rest.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Array = np.ndarray
LEAST_RUNS = 6
"""Fewer are no law."""
BEGINS = 0.9
"""Share of the loss of a table of pairs below which runs follow a law. Above it their losses stand and then fall faster
than any: a law of runs with less than a twentieth below it was 12 % off (docs/forecast.json)."""
BEGUN = 0.8
"""Share of that loss below which the best run has to come. Runs of which it had come to 0.82 made a forecast for thirty
times the work that was 12 % off; those of all others in the record are below."""
INTERVAL = 0.9
SEED, DRAWN = 1, 4_000
SHARES, SHARES_DEVIATION = np.array((0.35, 0.3, 0.35)), np.array((0.3, 0.2, 0.25))
"""Prior of E, and of what N and D add to it in the middle of the runs, as shares of the loss there; none is below 0."""
EXPONENT, EXPONENT_DEVIATION = 0.25, 0.5
"""Prior median of a and of b, and the deviation of its logarithm."""
NOISE, NOISE_DEVIATION = 0.005, 0.7
"""The same of the noise of a run as a share of its loss."""
NOISY = 0.02
"""Runs that lie farther from every law, as a share of the loss, follow none."""
EXPONENTS, NOISES = np.geomspace(0.04, 1.2, 18), np.geomspace(0.002, 0.04, 9)
BENDS = 0.02
"""Share of the loss by which a law misses for each factor of ten between a run and the largest that it was made from:
losses in docs/forecast.json fall faster at first than any law does. So nearer runs count for more, and farther
intervals are wider."""


@dataclass(frozen=True)
class Point:
    """A run and its validation loss in nats per token."""

    parameters: float
    tokens: float
    loss: float

    @property
    def work(self) -> float:
        return self.parameters * self.tokens


@dataclass(frozen=True)
class Forecast:
    loss: float
    low: float
    high: float


class NoLawError(Exception):
    """Why runs give no forecast, in a sentence."""


class Law:
    """The distribution of laws that a few runs leave."""

    def __init__(self, points: Sequence[Point]) -> None:
        self.points = points
        table = np.log([(point.parameters, point.tokens, point.loss) for point in points])
        self._middle = table.mean(0)
        self._largest = max(point.work for point in points)
        self.laws = self._drawn(*(table - self._middle).T)
        """E, A, B, a, b, noise of each, the first three as shares of the loss in the middle of the runs, A and B
        there."""

    @property
    def fits(self) -> bool:
        """Tell whether the runs follow a law: losses near it, and a tenth of the laws without a term below zero."""
        return len(self.laws) > DRAWN / 10 and float(np.median(self.laws[:, -1])) < NOISY

    def losses(self, parameters: float, tokens: float) -> Array:
        """The loss of a run by each of the laws, without noise."""
        E, A, B, a, b, _ = self.laws.T
        n, d = np.log((parameters, tokens)) - self._middle[:2]
        return np.exp(self._middle[2]) * (E + A * np.exp(-a * n) + B * np.exp(-b * d))

    def forecast(self, parameters: float, tokens: float) -> Forecast:
        """The median and the interval of a run's loss, with the noise that every run has and the law's own misses."""
        tens = max(0.0, float(np.log10(parameters * tokens / self._largest)))
        noise = np.random.default_rng(SEED).normal(size=len(self.laws))
        losses = self.losses(parameters, tokens) * np.exp(noise * np.hypot(self.laws[:, -1], BENDS * tens))
        low, loss, high = np.quantile(losses, [(1 - INTERVAL) / 2, 0.5, (1 + INTERVAL) / 2])
        return Forecast(float(loss), float(low), float(high))

    def _drawn(self, n: Array, d: Array, loss: Array) -> Array:
        """Laws by their probability.   logarithms, of which 0 is the middle of the runs"""
        a, b, noise = (each.ravel() for each in np.meshgrid(EXPONENTS, EXPONENTS, NOISES, indexing="ij"))
        terms = np.stack([np.ones((len(a), len(n))), np.exp(np.outer(-a, n)), np.exp(np.outer(-b, d))], 2)
        terms /= np.exp(loss)[:, None]  # (cells, runs, 3), whose sums should be 1
        tens = ((n + d).max() - n - d) / np.log(10)
        variance = noise[:, None] ** 2 + (BENDS * tens) ** 2  # (cells, runs)
        weighted, prior = terms / variance[:, :, None], SHARES_DEVIATION**-2.0
        precision = weighted.mT @ terms + np.diag(prior)
        pull = weighted.sum(1) + prior * SHARES
        mean = np.linalg.solve(precision, pull[:, :, None])[:, :, 0]

        of_exponents = (np.log((a, b)) - np.log(EXPONENT)) / EXPONENT_DEVIATION
        of_noise = (np.log(noise) - np.log(NOISE)) / NOISE_DEVIATION
        misses = (1 / variance).sum(1) - (pull * mean).sum(1) + (of_exponents**2).sum(0) + of_noise**2
        value = -0.5 * (misses + np.log(variance).sum(1) + np.linalg.slogdet(precision)[1])
        share = np.cumsum(np.exp(value - value.max()))
        cells = np.searchsorted(share, share[-1] * (np.arange(DRAWN) + 0.5) / DRAWN)

        normal = np.random.default_rng(SEED).normal(size=(DRAWN, 3, 1))
        root = np.linalg.cholesky(precision[cells])
        shares = mean[cells] + np.linalg.solve(root.mT, normal)[:, :, 0]
        laws = np.column_stack([shares, a[cells], b[cells], noise[cells]])
        return laws[(shares > 0).all(1)]


def law_of(runs: Sequence[Point], pairs: float) -> Law:
    """The law of a few runs, of which an infinite loss has diverged. Raises NoLawError where there is none.

    pairs: the loss of a table of which token follows which, which any network learns first
    """
    points = [run for run in runs if run.loss < BEGINS * pairs]
    best = min((run.loss for run in runs), default=math.inf)
    if len(points) < LEAST_RUNS or best > BEGUN * pairs:
        diverged = sum(math.isinf(run.loss) for run in runs)
        raise NoLawError(
            f"a law takes {LEAST_RUNS} runs below {BEGINS * pairs:.4f}, the best below {BEGUN * pairs:.4f}: "
            f"{BEGINS:.0%} and {BEGUN:.0%} of the loss of a table of which token follows which. Of {len(runs)} runs "
            f"{len(points)} are, the best at {best:.4f}, and {diverged} diverged. A longer --budget makes longer ones."
        )
    law = Law(points)
    if not law.fits:
        raise NoLawError(
            f"the runs follow no law that falls with weights and tokens to within {NOISY:.0%} of the loss. A steadier "
            "learning rate or a longer --budget may bring them to one."
        )
    return law
