"""Watches over steps: one that is not finite is left out, one whose memory ends is taken in smaller pieces, a loss that
jumps is gone back from, and a run whose loss no longer falls ends.

GradScaler leaves out such a step under float16, and goes on with a smaller scale; here it is the rule at every
precision, and too many of them end the run. Going back from a jump is what PaLM did (arXiv:2204.02311, section 5.1), by
hand: the spikes did not come again with other samples. Weights and moments go back; steps, schedule and samples go on,
so that nothing is read twice and a resumed run does the same.
"""

import math
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any, NoReturn

from torch import Tensor

from nanogpt_lit.checkpoint.newest import load_together
from nanogpt_lit.checkpoint.run_file import PREVIOUS, SUFFIX
from nanogpt_lit.checkpoint.state import RunState
from nanogpt_lit.errors import UserError
from nanogpt_lit.loops.contract import Observer, Training, clipping_order
from nanogpt_lit.memory.elastic import ElasticLoss, start_elastic, stop_elastic
from nanogpt_lit.run.metrics import StepMetrics, say
from nanogpt_lit.runtime.processes import broadcast, mean_of_processes, rank

IN_A_ROW = 20
"""Steps left out before a run is given up: a scale of 65,536 has then been halved to 1/16."""


class NotFinite(UserError):  # noqa: N818 - a fact about the run
    """Numbers that a run cannot go on with: it is given up."""


class ElasticSteps(Observer):
    """Observer that lets the steps of a run survive an out-of-memory (memory/elastic.py)."""

    _training: Training | None = None
    _window: list[Any] | None = None

    def on_train_start(self, training: Training) -> None:
        self._training = training
        start_elastic(
            training.module,
            accumulate_grad_batches=training.settings.accumulate_grad_batches,
            scaler=training.scaler,
            device=training.device,
            say=say,
        )
        loss = getattr(training.module, "loss", None)
        self._window = loss.window if isinstance(loss, ElasticLoss) else None

    def on_step_end(self, step: int, lr: float, grad_norm: Tensor) -> None:
        if self._window is not None:
            self._window.clear()  # the step is over, also one that left the weights alone

    def on_exit(self) -> None:
        if self._training is not None:
            stop_elastic(self._training.module)


class FiniteGuard(Observer):
    """Observer that leaves out steps whose gradients are not finite, and gives the run up after too many in a row.

    last_checkpoint: the one to go on from, if there is any
    """

    def __init__(self, last_checkpoint: Callable[[], str | None] = lambda: None) -> None:
        self._last_checkpoint = last_checkpoint
        self._in_a_row = 0

    def on_train_start(self, training: Training) -> None:
        self._training = training
        self._parameters = clipping_order(training.optimizer)
        self._skipped = getattr(training.schedule, "skipped_steps", 0)

    def on_before_step(self, grad_norm: Tensor) -> None:
        """Waits for the device, once a step. On several processes the norm is that of all, and so is the decision."""
        if not math.isfinite(grad_norm.item()):
            for parameter in self._parameters:
                parameter.grad = None  # an optimizer's step then leaves all as it is

    def on_step_end(self, step: int, lr: float, grad_norm: Tensor) -> None:
        # The schedule counts the steps that did not happen (optim/schedule.py).
        before, self._skipped = self._skipped, getattr(self._training.schedule, "skipped_steps", 0)
        self._in_a_row = self._in_a_row + 1 if self._skipped > before else 0
        if self._in_a_row >= IN_A_ROW:
            give_up(self._sentence(step), self._last_checkpoint())

    def _sentence(self, step: int) -> str:
        if (scale := self._training.loss_scale()) is None:
            cause = "a lower model.optim.lr, or a longer model.schedule.warmup_steps, may help"
        else:
            cause = (
                f"the loss scale has sunk to {scale:g} and float16 still cannot hold them; "
                "trainer.precision=bf16-mixed or 32-true may"
            )
        return f"the gradients of {IN_A_ROW} steps in a row, up to step {step:,}, are not finite; {cause}."


def give_up(sentence: str, checkpoint: str | None) -> NoReturn:
    """Raise NotFinite, naming the checkpoint to go on from."""
    kept = f"The last good checkpoint is {checkpoint}." if checkpoint else "No checkpoint was saved before."
    raise NotFinite(f"{sentence} {kept}")


RECENT = 64
"""Steps whose median loss a step is compared with; the first ones of a run are compared with nothing."""


class SpikeGuard(Observer):
    """Observer that goes back to a checkpoint when the loss jumps, before others count, validate or save the step.

    factor: of the median, above which a loss is a spike   folder: of the run's checkpoints; None where there are none
    last_checkpoint: the one to go on from, if there is any
    """

    def __init__(
        self, factor: float, folder: Path | None = None, last_checkpoint: Callable[[], str | None] = lambda: None
    ) -> None:
        self.factor = factor
        self.rollbacks = 0
        """Number of times that the run went back, over all its processes."""
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
            return  # FiniteGuard leaves such a step out
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
            assert state is not None, "every process was given the path"
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


def put_back(training: Training, state: RunState) -> None:
    """Put weights and moments of a checkpoint into the training; the learning rates stay those of this step."""
    now = [
        {name: value for name, value in group.items() if name != "params"} for group in training.optimizer.param_groups
    ]
    training.module.load_state_dict(state.weights)
    training.optimizer.load_state_dict(state.optimizer)
    for group, settings in zip(training.optimizer.param_groups, now, strict=True):
        group.update(settings)


class EarlyStopping(Observer):
    """Observer that ends a run after `patience` validations in a row without a better loss; `best` is of the best one.

    The count is part of the run and goes on with it. All processes know the same loss and end together.
    """

    def __init__(self, patience: int, metrics: StepMetrics) -> None:
        self.patience = patience
        self._metrics = metrics

    def between_steps(self, step: int) -> bool:
        return self.has_ended

    @property
    def has_ended(self) -> bool:
        return self._metrics.validations.since_best >= self.patience

    def sentence(self) -> str:
        best = self._metrics.validations.best
        assert best is not None, "a count of validations without one"
        return f"{self.patience} validations in a row without a better loss than {best[1]:.4f} at step {best[0]:,}"
