"""The checkpoints of a run: `best` and `last` after validations, `last` besides at times of its own and at the end."""

import time
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from nanogpt_lit.checkpoint import disk
from nanogpt_lit.checkpoint.disk import BestEffortSaver
from nanogpt_lit.checkpoint.run_file import SUFFIX
from nanogpt_lit.checkpoint.state import RunState
from nanogpt_lit.errors import UserError
from nanogpt_lit.loops.contract import Observer, Training
from nanogpt_lit.run.metrics import StepMetrics
from nanogpt_lit.runtime.processes import Agreement

EVERY_MINUTES = 15.0


class Checkpoints(Observer):
    """Observer that saves between two steps, after all others have seen the step and its validation.

    folder: where they are   metrics: whose validations tell the best   times: by default every 15 minutes
    state: what is saved, where the framework does not do it itself (`Training.save`); all processes ask for it together
    saver: that writes the files; None where they are of a framework's own format
    after_validations: False where somebody else saves then, and only `last` is kept here
    asked_to_stop: whether a signal has come, for a disk that takes nothing at the end
    """

    def __init__(
        self,
        folder: Path,
        metrics: StepMetrics,
        state: Callable[[Training], RunState],
        saver: BestEffortSaver | None,
        times: "SaveTimes | None" = None,
        suffix: str = SUFFIX,
        after_validations: bool = True,
        asked_to_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.folder = folder
        self.unsaved: UserError | None = None
        """Why the end of the run is not saved; None where it is."""
        self._metrics, self._state, self._saver, self._suffix = metrics, state, saver, suffix
        self._times = times or SaveTimes()
        self._after_validations, self._asked_to_stop = after_validations, asked_to_stop
        self._has_validated = False
        self._saved_step: int | None = None

    def path(self, name: str) -> Path:
        return self.folder / f"{name}{self._suffix}"

    def files(self) -> dict[str, Path]:
        """The checkpoints that exist, by name: "best", "last"."""
        if self._saver is not None:
            self._saver.wait()
        found = {name: self.path(name) for name in ("best", "last")}
        return {name: path for name, path in found.items() if path.exists()}

    def on_train_start(self, training: Training) -> None:
        self._training = training
        if training.processes == 1:
            self._times.agreement = None
        if self._saver is not None:
            self._saver.in_background = True

    def on_before_step(self, grad_norm: Tensor) -> None:
        if self._saver is not None and self._saver.holds_tensors:
            self._saver.let_go()

    def on_validation_end(self, step: int, loss: Tensor) -> None:
        self._has_validated = self._after_validations

    def between_steps(self, step: int) -> bool:
        if self._has_validated or self._times.due(step):
            self._save(step)
        return False

    def on_train_end(self) -> None:
        if self._has_validated or self._saved_step != self._training.step:
            self._save(self._training.step)
        if self._saver is not None:
            try:
                if self._training.is_stopped:  # a signal may have done it, and did not ask for less than this
                    self._saver.insist(disk.STOP_S)
                else:
                    self._saver.insist(disk.END_S, self._asked_to_stop)
            except UserError as error:
                self.unsaved = error

    def on_exit(self) -> None:
        if self._saver is not None:
            self._saver.in_background = False
            self._saver.wait()

    def _save(self, step: int) -> None:
        validations = self._metrics.validations
        is_best = self._has_validated and validations.best == validations.latest
        paths = [self.path(name) for name in (("best", "last") if is_best else ("last",))]
        self._has_validated, self._saved_step = False, step
        with self._metrics.paused():
            if (save := self._training.save) is not None:
                for path in paths:
                    save(path)
            else:
                state = self._state(self._training)
                if self._saver is not None and (self._training.rank == 0 or state.is_sharded):
                    for path in paths:
                        self._saver.save(path, state)
        self._times.saved()


class SaveTimes:
    """Times at which `last` is saved besides; several processes all ask after each step, and get the same answer.

    every_minutes, every_steps: None for no such saves
    """

    def __init__(
        self,
        every_minutes: float | None = EVERY_MINUTES,
        every_steps: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Set the times. Raises UserError for one that is not above zero."""
        for name, every in (("minutes", every_minutes), ("steps", every_steps)):
            if every is not None and not every > 0:
                raise UserError(f"checkpoint_every_{name}={every} must be above 0; null leaves it out.")
        self.every_minutes = every_minutes
        self.every_steps = every_steps
        self._clock = clock
        self._saved_s = clock()
        self.agreement: Agreement | None = Agreement()
        """The processes' agreement; None where a process is alone."""

    def due(self, step: int) -> bool:
        """Decide whether to save after this step."""
        if self.every_steps is not None and step % self.every_steps == 0:
            return True
        if self.every_minutes is None:
            return False
        is_time = self._clock() - self._saved_s >= 60 * self.every_minutes
        return is_time if self.agreement is None else self.agreement.highest(int(is_time)) > 0

    def saved(self) -> None:
        """Called with every checkpoint: the minutes are counted from here."""
        self._saved_s = self._clock()

    def __str__(self) -> str:
        times = [
            *([f"every {self.every_minutes:g} minutes"] if self.every_minutes is not None else []),
            *([f"every {self.every_steps:,} steps"] if self.every_steps is not None else []),
            "at the end",
        ]
        return ", ".join(times[:-1]) + (" and " if times[1:] else "") + times[-1]
