"""A loss that jumps: the run goes back to its last checkpoint and leaves out the samples that led there.

So PaLM did (arXiv:2204.02311, section 5.1), by hand: the spikes did not come again with other samples. Weights and
moments go back; steps, schedule and samples go on, so that nothing is read twice and a resumed run does the same.
"""

import math
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from torch import Tensor

from nanogpt_lit.checkpoint.run_file import PREVIOUS, SUFFIX
from nanogpt_lit.checkpoint.state import RunState
from nanogpt_lit.errors import UserError
from nanogpt_lit.loops.contract import Parts
from nanogpt_lit.run.curves import say
from nanogpt_lit.run.guards import NotFinite
from nanogpt_lit.run.resume import load_together
from nanogpt_lit.runtime.processes import broadcast, mean_of_processes, rank

RECENT = 64
"""Steps whose median loss a step is compared with; the first ones of a run are compared with nothing."""


class SpikeGuard:
    """Told of each micro-batch and each step, by every process, before the step is validated or saved."""

    def __init__(self, factor: float) -> None:
        """factor: of the median, above which a loss is a spike. Raises UserError unless it is above 1."""
        if not factor > 1:
            raise UserError(f"spike_factor={factor} must be above 1; 2 goes back at twice the median of recent steps.")
        self.factor = factor
        self.folder: Path | None = None
        """Of the run's checkpoints; None where there are none."""
        self.went_back = 0
        """How often, over all pieces of the run."""
        self._losses: deque[float] = deque(maxlen=RECENT)
        self._window: Tensor | None = None
        self._tried: set[int] = set()

    def add_batch(self, loss_share: Tensor) -> None:
        """loss_share: the micro-batch's mean loss divided by the accumulation"""
        share = loss_share.detach()
        self._window = share if self._window is None else self._window + share

    def end_step(self, step: int, parts: Parts) -> None:
        """Waits for the device, once a step. Raises NotFinite when there is no checkpoint left to try."""
        assert self._window is not None, "end_step() before the first add_batch()"
        loss, self._window = float(mean_of_processes(self._window)), None
        if not math.isfinite(loss):
            return  # guards.py leaves such a step out
        if len(self._losses) == RECENT and loss > self.factor * median(self._losses):
            self._go_back(step, loss, parts)
        else:
            self._losses.append(loss)

    def _go_back(self, step: int, loss: float, parts: Parts) -> None:
        seen = f"step {step:,}: the loss {loss:.3f} is above {self.factor:g} times the median of the {RECENT} before"
        paths = [self.folder / f"{name}{SUFFIX}" for name in ("last", PREVIOUS)] if self.folder is not None else []
        found = broadcast([path for path in paths if path.exists()])
        if not found:
            self._say(f"{seen}, and there is no checkpoint yet to go back to")
            return
        for path in found:
            state = load_together(path)
            assert state is not None, "every process was told the path"
            if state.step not in self._tried:
                break
        else:
            raise NotFinite(f"{seen}, again after going back; a lower model.optim.lr may help.")
        put_back(parts, state)
        self._tried.add(state.step)
        self.went_back += 1
        self._say(f"{seen}; weights and moments are those of step {state.step:,} again, the samples since are left out")

    @staticmethod
    def _say(line: str) -> None:
        if rank() == 0:
            say(line)

    def state_dict(self) -> dict[str, Any]:
        return {"losses": list(self._losses), "went_back": self.went_back}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Empty where the run so far was not guarded."""
        self._losses.extend(state.get("losses", []))
        self.went_back = state.get("went_back", 0)


def put_back(parts: Parts, state: RunState) -> None:
    """Weights and moments of a checkpoint; the rates stay those of this step."""
    now = [{name: value for name, value in group.items() if name != "params"} for group in parts.optimizer.param_groups]
    parts.module.load_state_dict(state.weights)
    parts.optimizer.load_state_dict(state.optimizer)
    for group, settings in zip(parts.optimizer.param_groups, now, strict=True):
        group.update(settings)
