"""Short training runs of the user's network on the user's text, in this process, with nothing kept of them."""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from nanogpt_lit.data.datamodule import TokenDataModule
from nanogpt_lit.loops import reference
from nanogpt_lit.loops.contract import LoopSettings, Observer
from nanogpt_lit.memory.techniques import MemoryConfig
from nanogpt_lit.module import LitNanoGPT
from nanogpt_lit.optim.adamw import AdamWConfig
from nanogpt_lit.optim.schedule import ScheduleConfig
from nanogpt_lit.run.guards import NotFinite
from nanogpt_lit.run.observers import always
from nanogpt_lit.runtime.precision import full_precision_name

SPEED_STEPS = 4
"""Steps of a measurement of speed; the first, which sets up, is not counted."""


class Tried(Protocol):
    """A setting that can be tried: the size of its steps, and what a subclass of ShortRuns builds its module from."""

    @property
    def batch_size(self) -> int: ...

    @property
    def accumulate_grad_batches(self) -> int: ...


T = TypeVar("T", bound=Tried)


class ShortRuns(Generic[T]):
    """Short runs of settings that are tried.

    settings: the sections of the YAML, completed   asked: after each step, whether to stop
    """

    def __init__(self, settings: Any, device: str, clock: Callable[[], float], asked: Callable[[], bool]) -> None:
        self.settings, self._device = settings, device
        self._clock, self._asked = clock, asked
        self.data = TokenDataModule(**settings.data)
        self.data.setup()
        there_are = len(self.data.val_dataloader())
        limit = settings.trainer.limit_val_batches
        if isinstance(limit, float):  # a share, as Lightning counts it
            limit = int(there_are * limit)
        self.val_batches = min(there_are, limit or there_are)
        """Batches of a validation of the run itself; all where it makes none."""

    def build(self, tried: T, steps: int) -> LitNanoGPT:
        """The module of a run of so many steps."""
        raise NotImplementedError

    def module(self, changed: dict[str, Any], network: dict[str, Any], steps: int) -> LitNanoGPT:
        """The module of the YAML with other optim and schedule, and another network.

        The schedule has the run's own shape, and is as short as this one. Without torch.compile, which every run would
        wait for.
        """
        model = self.settings.model
        warmup = model.schedule["warmup_steps"] * steps / self.settings.trainer.max_steps
        schedule = {**changed["schedule"], "warmup_steps": round(warmup), "total_steps": steps}
        return LitNanoGPT(
            optim=AdamWConfig(**changed["optim"]),
            schedule=ScheduleConfig(**schedule),
            memory=MemoryConfig(**model.memory),
            **network,
        )

    def speeds(self, several: Sequence[T], budget_s: float) -> dict[T, float]:
        """Seconds per optimizer step, medians of steps taken by turns: what slows the machine slows them all."""
        started_s, times = self._clock(), {tried: list[float]() for tried in several}
        while True:
            for tried, found in times.items():
                watch = StepWatch(self._clock, self._device, self._asked)
                self._train(tried, SPEED_STEPS, self.data.seed, None, watch)
                found += watch.step_s[1:] or watch.step_s  # the first alone where the run was stopped
            if self._asked() or self._clock() - started_s > budget_s:
                break
        return {tried: statistics.median(found) for tried, found in times.items()}

    def run(self, tried: T, steps: int, seed: int, val_batches: int) -> tuple[float, list[float]] | None:
        """The validation loss after so many steps, infinite where the run diverged, and the training loss of each.

        None where the run was stopped. The validation reads the same windows for all that is tried.
        """
        watch = StepWatch(self._clock, self._device, self._asked)
        try:
            self._train(tried, steps, seed, val_batches, watch)
        except NotFinite:
            return math.inf, watch.losses()
        if watch.loss is None:
            return None
        losses = watch.losses()
        # Above where it began, by more than one batch differs from the validation: it went astray.
        held = math.isfinite(watch.loss) and all(map(math.isfinite, losses)) and watch.loss < 1.1 * losses[0]
        return watch.loss if held else math.inf, losses

    def _train(self, tried: T, steps: int, seed: int, val_batches: int | None, watch: "StepWatch") -> None:
        trainer, data = self.settings.trainer, self.data
        accumulate = tried.accumulate_grad_batches
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
        module = self.build(tried, steps).to(self._device)
        own_seed, own_batch_size = data.seed, data.batch_size
        validation = data.val_dataloader()
        try:
            data.seed, data.batch_size = seed, tried.batch_size
            training = data.train_dataloader()
        finally:
            data.seed, data.batch_size = own_seed, own_batch_size
        reference.train(module, training, validation, settings, [*always(), watch])


class StepWatch(Observer):
    """The time and the training loss of each step, and the validation loss at the end.   asked: whether to stop"""

    def __init__(self, clock: Callable[[], float], device: str, asked: Callable[[], bool]) -> None:
        self.step_s: list[float] = []
        self.loss: float | None = None
        self._clock, self._device, self._asked = clock, device, asked
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

    def between_steps(self, step: int) -> bool:
        return self._asked()

    def on_validation_end(self, step: int, loss: Tensor) -> None:
        self.loss = float(loss)
