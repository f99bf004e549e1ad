"""A loss that jumps: the run goes back to its last checkpoint and leaves out the samples that led there.

So PaLM did (arXiv:2204.02311, section 5.1), by hand: the spikes did not come again with other samples. Weights and
moments go back; steps, schedule and samples go on, so that nothing is read twice and a resumed run does the same.
"""

import math
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from torch import Tensor

from nanogpt_lit.checkpoint.newest import load_together
from nanogpt_lit.checkpoint.run_file import PREVIOUS, SUFFIX
from nanogpt_lit.checkpoint.state import RunState
from nanogpt_lit.errors import UserError
from nanogpt_lit.loops.contract import Observer, Training
from nanogpt_lit.run.guards import give_up
from nanogpt_lit.run.metrics import say
from nanogpt_lit.runtime.processes import broadcast, mean_of_processes, rank

RECENT = 64
"""Steps whose median loss a step is compared with; the first ones of a run are compared with nothing."""


class SpikeGuard(Observer):
    """Stands before those that count, validate or save a step.

    factor: of the median, above which a loss is a spike   folder: of the run's checkpoints; None where there are none
    last_checkpoint: the one to go on from, if there is any
    """

    def __init__(
        self, factor: float, folder: Path | None = None, last_checkpoint: Callable[[], str | None] = lambda: None
    ) -> None:
        """Raises UserError unless factor is above 1."""
        check_spike_factor(factor)
        self.factor = factor
        self.rollbacks = 0
        """How often the run went back, over all its processes."""
        self._folder, self._last_checkpoint = folder, last_checkpoint
        self._losses: deque[float] = deque(maxlen=RECENT)
        self._window: Tensor | None = None
        self._tried: set[int] = set()

    def on_train_start(self, training: Training) -> None:
        self._training = training

    def on_batch_end(self, loss: Tensor, tokens: int) -> None:
        share = loss / self._training.settings.accumulate_grad_batches
        self._window = share if self._window is None else self._window + share

    def on_step_end(self, step: int, lr: float, grad_norm: Tensor) -> None:
        """Waits for the device, once a step. Raises NotFinite when there is no checkpoint left to try."""
        assert self._window is not None, "a step of no micro-batch"
        loss, self._window = float(mean_of_processes(self._window)), None
        if not math.isfinite(loss):
            return  # guards.py leaves such a step out
        if len(self._losses) == RECENT and loss > self.factor * median(self._losses):
            self._go_back(step, loss)
        else:
            self._losses.append(loss)

    def _go_back(self, step: int, loss: float) -> None:
        seen = f"step {step:,}: the loss {loss:.3f} is above {self.factor:g} times the median of the {RECENT} before"
        paths = [self._folder / f"{name}{SUFFIX}" for name in ("last", PREVIOUS)] if self._folder is not None else []
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
            give_up(f"{seen}, again after going back; a lower model.optim.lr may help.", self._last_checkpoint())
        put_back(self._training, state)
        self._tried.add(state.step)
        self.rollbacks += 1
        self._say(f"{seen}; weights and moments are those of step {state.step:,} again, the samples since are left out")

    @staticmethod
    def _say(line: str) -> None:
        if rank() == 0:
            say(line)

    def state_dict(self) -> dict[str, Any]:
        return {"losses": list(self._losses), "went_back": self.rollbacks}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Empty where the run so far was not guarded."""
        self._losses.extend(state.get("losses", []))
        self.rollbacks = state.get("went_back", 0)


def check_spike_factor(factor: float) -> None:
    if not factor > 1:
        raise UserError(f"spike_factor={factor} must be above 1; 2 goes back at twice the median of recent steps.")


def put_back(training: Training, state: RunState) -> None:
    """Weights and moments of a checkpoint; the rates stay those of this step."""
    now = [
        {name: value for name, value in group.items() if name != "params"} for group in training.optimizer.param_groups
    ]
    training.module.load_state_dict(state.weights)
    training.optimizer.load_state_dict(state.optimizer)
    for group, settings in zip(training.optimizer.param_groups, now, strict=True):
        group.update(settings)
