"""A law of the loss in the size of a network and the tokens that it reads, and how much of it is not known.

L(N, D) = E + A / N^a + B / D^b (Hoffmann et al., arXiv:2203.15556). A few runs cannot tell five numbers, so each has a
prior; what the runs leave is a distribution of laws, which a sampler walks through (Goodman and Weare, 2010), and an
interval holds a share of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Array = np.ndarray
LEAST_RUNS = 6
"""Fewer are no law."""
INTERVAL = 0.9
SEED, WALKERS, ROUNDS, DRAWN = 1, 48, 1_200, 20_000
STRETCH = 2.0
"""Most that a step of the sampler lengthens the distance between two walkers by; its authors' choice."""
MEDIANS = (0.5, 0.15, 0.2, 0.3, 0.3, 0.005)
"""Prior medians: E, and A and B at the run that is forecast, as shares of the least loss; a; b; and sigma, the noise of
a run as a share of its loss. Exponents of 0.2 to 0.4 are what others found."""
DEVIATIONS = (0.4, 1.0, 1.0, 0.35, 0.35, 0.7)
"""Deviations of their logarithms."""

BENDS = 0.045
"""Share of the loss by which a law misses for each factor of ten between the run and the largest that it was made from:
the root mean square of the first three in docs/forecast.json, one of which missed by 7 %. No noise of the runs explains
that: the law itself bends."""


@dataclass(frozen=True)
class Point:
    """A run and its validation loss in nats per token."""

    parameters: float
    tokens: float
    loss: float


@dataclass(frozen=True)
class Forecast:
    loss: float
    low: float
    high: float


class Law:
    """The distribution of laws that a few runs leave.

    parameters, tokens: of the run that is forecast, from where the law is written
    """

    def __init__(self, points: Sequence[Point], parameters: float, tokens: float) -> None:
        self.points, self.parameters, self.tokens = points, parameters, tokens
        self._n = np.log([point.parameters / parameters for point in points])
        self._d = np.log([point.tokens / tokens for point in points])
        self._loss = np.array([point.loss for point in points])
        medians = np.array(MEDIANS)
        medians[:3] *= self._loss.min()
        self._mean, self._deviation = np.log(medians), np.array(DEVIATIONS)
        self.laws = np.exp(self._walked())
        """E, A, B, a, b, sigma of each, A and B at the run that is forecast."""

    def losses(self, parameters: float, tokens: float) -> Array:
        """The loss of a run by each of the laws, without noise."""
        E, A, B, a, b, _ = self.laws.T
        return E + A * (parameters / self.parameters) ** -a + B * (tokens / self.tokens) ** -b

    def forecast(self, parameters: float, tokens: float) -> Forecast:
        """The median and the interval of a run's loss, with the noise that every run has and the law's own misses."""
        largest = max(point.parameters * point.tokens for point in self.points)
        tens = max(0.0, float(np.log10(parameters * tokens / largest)))
        noise = np.random.default_rng(SEED).normal(size=len(self.laws))
        losses = self.losses(parameters, tokens) * np.exp(noise * np.hypot(self.laws[:, -1], BENDS * tens))
        low, loss, high = np.quantile(losses, [(1 - INTERVAL) / 2, 0.5, (1 + INTERVAL) / 2])
        return Forecast(float(loss), float(low), float(high))

    def _log_probability(self, theta: Array) -> Array:
        """The logarithm of prior times likelihood.   theta: logarithms of laws, (laws, 6)"""
        with np.errstate(all="ignore"):  # a walker may propose what no float holds, which is then improbable
            E, A, B, a, b, sigma = np.exp(theta.T)[:, :, None]
            loss = E + A * np.exp(-a * self._n) + B * np.exp(-b * self._d)  # (laws, points)
            misses = (np.log(self._loss / loss) / sigma) ** 2
        prior = ((theta - self._mean) / self._deviation) ** 2
        return -0.5 * misses.sum(1) - len(self._loss) * theta[:, -1] - 0.5 * prior.sum(1)

    def _walked(self) -> Array:
        generator = np.random.default_rng(SEED)
        size, half = len(self._mean), WALKERS // 2
        drawn = self._mean + self._deviation * generator.normal(size=(DRAWN, size))
        walkers = drawn[np.argsort(self._log_probability(drawn))[-WALKERS:]]
        value = self._log_probability(walkers)
        first, second, kept = slice(0, half), slice(half, None), []
        for number in range(ROUNDS):
            for mine, others in ((first, second), (second, first)):
                z = ((STRETCH - 1) * generator.random(half) + 1) ** 2 / STRETCH
                partners = walkers[others][generator.integers(half, size=half)]
                moved = partners + z[:, None] * (walkers[mine] - partners)
                reached = self._log_probability(moved)
                accepted = np.log(generator.random(half)) < (size - 1) * np.log(z) + reached - value[mine]
                walkers[mine] = np.where(accepted[:, None], moved, walkers[mine])
                value[mine] = np.where(accepted, reached, value[mine])
            if number >= ROUNDS // 2 and number % 4 == 0:
                kept.append(walkers.copy())
        return np.concatenate(kept)
