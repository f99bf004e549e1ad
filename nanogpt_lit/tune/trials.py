"""Short training runs of the user's own network, by the plain loop."""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nanogpt_lit.data.datamodule import TokenDataModule
from nanogpt_lit.gpt.model import GPTConfig
from nanogpt_lit.loops import reference
from nanogpt_lit.loops.contract import LoopSettings, Observer
from nanogpt_lit.memory.techniques import MemoryConfig
from nanogpt_lit.module import LitNanoGPT
from nanogpt_lit.optim.adamw import AdamWConfig
from nanogpt_lit.optim.schedule import ScheduleConfig
from nanogpt_lit.run.guards import NotFinite
from nanogpt_lit.runtime.precision import full_precision_name
from nanogpt_lit.tune.candidate import Candidate, model_section

SPEED_STEPS = 4
"""Of which the first, which sets up, is not counted."""


class Trials:
    """settings: the sections of the YAML, completed   own: what they say   asked: whether to stop, after each step"""

    def __init__(
        self, settings: Any, own: Candidate, device: str, clock: Callable[[], float], asked: Callable[[], bool]
    ) -> None:
        self._settings, self._own, self._device = settings, own, device
        self._clock, self._asked = clock, asked
        self._data = TokenDataModule(**settings.data)
        self._data.setup()
        self.val_batches = len(self._data.val_dataloader())
        limit = settings.trainer.limit_val_batches
        if isinstance(limit, int) and limit:
            self.val_batches = min(self.val_batches, limit)

    def build(self, candidate: Candidate, steps: int) -> LitNanoGPT:
        """Raises UserError where the candidate's recipe does not go with the rest of the YAML."""
        model = self._settings.model
        changed = model_section(model, self._own, candidate)
        # A schedule of the run's own shape, and as short as the trial.
        warmup = model.schedule["warmup_steps"] * steps / self._settings.trainer.max_steps
        changed["schedule"] |= {"warmup_steps": round(warmup), "total_steps": steps}
        # Without torch.compile, which every run would wait for.
        return LitNanoGPT(
            GPTConfig(**changed["gpt"]),
            AdamWConfig(**changed["optim"]),
            ScheduleConfig(**changed["schedule"]),
            memory=MemoryConfig(**model.memory),
        )

    def speeds(self, candidates: Sequence[Candidate], budget_s: float) -> dict[Candidate, float]:
        """Seconds per optimizer step, medians of steps taken by turns: what slows the machine slows them all."""
        started_s, times = self._clock(), {candidate: list[float]() for candidate in candidates}
        while True:
            for candidate, found in times.items():
                watch = StepWatch(self._clock, self._device)
                self._train(candidate, SPEED_STEPS, self._data.seed, None, watch)
                found += watch.step_s[1:] or watch.step_s  # the first alone where the run was stopped
            if self._asked() or self._clock() - started_s > budget_s:
                break
        return {candidate: statistics.median(found) for candidate, found in times.items()}

    def run(self, candidate: Candidate, steps: int, seed: int, val_batches: int) -> tuple[float, list[float]] | None:
        """The validation loss after so many steps, infinite where the run diverged, and the training loss of each.

        None where the run was stopped. The validation reads the same windows for every candidate.
        """
        watch = StepWatch(self._clock, self._device)
        try:
            self._train(candidate, steps, seed, val_batches, watch)
        except NotFinite:
            return math.inf, watch.losses()
        if watch.loss is None:
            return None
        losses = watch.losses()
        # Above where it began, by more than one batch differs from the validation: it went astray.
        held = math.isfinite(watch.loss) and all(map(math.isfinite, losses)) and watch.loss < 1.1 * losses[0]
        return watch.loss if held else math.inf, losses

    def _train(self, candidate: Candidate, steps: int, seed: int, val_batches: int | None, watch: "StepWatch") -> None:
        trainer, data = self._settings.trainer, self._data
        accumulate = candidate.accumulate_grad_batches
        settings = LoopSettings(
            steps,
            accumulate,
            trainer.gradient_clip_val,
            full_precision_name(trainer.precision),
            val_check_interval=val_batches and steps * accumulate,
            limit_val_batches=val_batches,
            seed=seed,
            deterministic=trainer.deterministic,
        )
        torch.manual_seed(seed)
        module = self.build(candidate, steps).to(self._device)
        own_seed, own_batch_size = data.seed, data.batch_size
        validation = data.val_dataloader()
        try:
            data.seed, data.batch_size = seed, candidate.batch_size
            training = data.train_dataloader()
        finally:
            data.seed, data.batch_size = own_seed, own_batch_size
        reference.train(module, training, validation, settings, watch, should_stop=self._asked)


class StepWatch(Observer):
    """The time and the training loss of each step, and the validation loss at the end."""

    def __init__(self, clock: Callable[[], float], device: str) -> None:
        self.step_s: list[float] = []
        self.loss: float | None = None
        self._clock, self._device = clock, device
        self._window: list[Tensor] = []
        self._losses: list[Tensor] = []
        self._last_s = clock()

    def losses(self) -> list[float]:
        return [float(loss) for loss in self._losses]

    def on_batch_end(self, loss: Tensor, tokens: int) -> None:
        self._window.append(loss)

    def on_step_end(self, step: int, lr: float, grad_norm: Tensor) -> None:
        if self._device == "cuda":
            torch.cuda.synchronize()
        now_s = self._clock()
        self.step_s.append(now_s - self._last_s)
        self._last_s = now_s
        self._losses.append(torch.stack(self._window).mean())
        self._window = []

    def on_validation_end(self, step: int, loss: Tensor) -> None:
        self.loss = float(loss)
