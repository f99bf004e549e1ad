"""A difference between the frameworks that was settled, and what shows when it is unsettled."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nanogpt_lit.data.datamodule import TokenDataModule
from nanogpt_lit.parity.record import Difference, compare, distance_of_weights
from nanogpt_lit.parity.runs import LOOPS, Case


@dataclass(frozen=True)
class Drift:
    first: Difference | None
    weights: float | None
    """How far apart the weights are at the end, at most."""
    refused: str | None = None
    """The framework's error, where it runs nothing."""

    def __bool__(self) -> bool:
        return self.first is not None or self.refused is not None

    def __str__(self) -> str:
        if self.refused is not None:
            return f"refused: {self.refused}"
        if self.first is None:
            return "no drift"
        return str(self.first) + (f"; weights at the end by {self.weights:.1e}" if self.weights else "")


@dataclass(frozen=True)
class Settled:
    name: str
    breaks: str
    """What happens without it."""
    loop: str
    """Where it is turned off."""
    case: Callable[[Case], Case]
    """A case in which it matters."""
    off: Callable[[], Any]
    """A context without it."""
    only_rounds: bool = False
    """Whether it changes nothing but the order of a sum, which a CPU's kernels may round to the same bits."""

    def drift(self, base: Case, data: TokenDataModule) -> Drift:
        """What happens without it. A case of several processes is for `drifts_together`."""
        case = self.case(base)
        expected = LOOPS["reference"](case, data).entries
        try:
            with self.off():
                found = LOOPS[self.loop](case, data).entries
        except RuntimeError as error:
            return Drift(None, None, str(error).split(".")[0])
        return Drift(compare(expected, found), distance_of_weights(expected, found))

    def describe(self, drift: Drift) -> str:
        return "rounded alike on this CPU" if self.only_rounds and not drift else str(drift)
