"""One case of the grid, run by each of the three loops from the same start."""

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from accelerate.state import AcceleratorState, GradientState  # type: ignore[import-untyped]
from accelerate.utils import GradScalerKwargs  # type: ignore[import-untyped]
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import Precision
from torch.amp import GradScaler
from torch.utils.data import DataLoader

from nanogpt_lit.data.datamodule import TokenDataModule
from nanogpt_lit.data.sampler import Position
from nanogpt_lit.gpt.model import GPTConfig
from nanogpt_lit.loops import accelerate_loop, reference
from nanogpt_lit.loops.contract import LoopSettings, Parts
from nanogpt_lit.loops.curves import StepMeter, ValidationRecord
from nanogpt_lit.loops.lightning_callbacks import TrainingCurves
from nanogpt_lit.loops.lightning_observer import DropoutSeed, Observed
from nanogpt_lit.loops.lightning_precision import MixedPrecision, precision_plugin
from nanogpt_lit.module import LitNanoGPT
from nanogpt_lit.optim.adamw import AdamWConfig
from nanogpt_lit.optim.schedule import ScheduleConfig
from nanogpt_lit.parity.record import Entry, Recorder


@dataclass(frozen=True)
class Case:
    settings: LoopSettings
    gpt: GPTConfig
    optim: AdamWConfig
    schedule: ScheduleConfig
    scaler: dict[str, Any] = field(default_factory=dict)
    """Arguments of GradScaler that differ from its defaults: a scale that overflows, or one that grows soon."""
    batches_per_epoch: int | None = None
    """Ends the training loader there, inside an accumulation window; None leaves it endless."""
    module: Callable[[GPTConfig, AdamWConfig, ScheduleConfig], LitNanoGPT] = LitNanoGPT

    def make_module(self) -> LitNanoGPT:
        torch.manual_seed(self.settings.seed or 0)
        return self.module(self.gpt, self.optim, self.schedule)

    def loaders(self, data: TokenDataModule) -> tuple[DataLoader, DataLoader]:
        data.position = Position()
        train, val = data.train_dataloader(), data.val_dataloader()
        if self.batches_per_epoch is not None:
            assert train.batch_sampler is not None
            batches = list(itertools.islice(train.batch_sampler, self.batches_per_epoch))
            train = DataLoader(
                train.dataset, batch_sampler=batches, collate_fn=train.collate_fn, generator=train.generator
            )
        return train, val


@dataclass(frozen=True)
class Run:
    entries: list[Entry]
    seconds_per_step: float


class TimedRecorder(Recorder):
    def on_train_start(self, parts: Parts) -> None:
        super().on_train_start(parts)
        self._started_s = time.perf_counter()

    def on_train_end(self) -> None:
        self.elapsed_s = time.perf_counter() - self._started_s
        super().on_train_end()

    def run(self) -> Run:
        return Run(self.entries, self.elapsed_s / max(1, self._step))


def run_reference(case: Case, data: TokenDataModule) -> Run:
    recorder = TimedRecorder()
    scaler = GradScaler("cpu", **case.scaler) if case.settings.precision == "16-mixed" else None
    reference.train(case.make_module(), *case.loaders(data), case.settings, recorder, scaler)
    return recorder.run()


def run_accelerate(case: Case, data: TokenDataModule) -> Run:
    # accelerate keeps its state for the whole process: it refuses a second Accelerator of another precision, and one of
    # another accumulation goes on with the loaders of the first.
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    recorder = TimedRecorder()
    options = accelerate_loop.accelerator_options(case.settings, "cpu")
    if case.settings.precision == "16-mixed":
        options["kwargs_handlers"].append(GradScalerKwargs(**case.scaler))
    accelerator = HalfOnProcessors(**options)
    accelerate_loop.train(accelerator, case.make_module(), *case.loaders(data), case.settings, recorder)
    return recorder.run()


class HalfOnProcessors(Accelerator):
    """fp16 with its GradScaler also without a GPU, where Accelerator trains in float32 without a word: float16 would be
    compared with float32."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if self.mixed_precision == "fp16" and self.device.type == "cpu":
            self.native_amp = True
            self.scaler = GradScaler("cpu", **(self.scaler_handler.to_kwargs() if self.scaler_handler else {}))


def run_lightning(case: Case, data: TokenDataModule) -> Run:
    recorder = TimedRecorder()
    settings = case.settings
    validates = settings.val_check_interval is not None
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=settings.max_steps,
        accumulate_grad_batches=settings.accumulate_grad_batches,
        gradient_clip_val=settings.gradient_clip_val,
        plugins=[lightning_precision(settings.precision, case.scaler)],
        val_check_interval=settings.val_check_interval,
        check_val_every_n_epoch=None,
        limit_val_batches=settings.limit_val_batches if validates else 0,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        callbacks=[
            # As in fit: it makes the Trainer validate after the last step.
            TrainingCurves(StepMeter(), ValidationRecord()),
            DropoutSeed(settings.seed),
            Observed(recorder),
        ],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    train_loader, val_loader = case.loaders(data)
    trainer.fit(case.make_module(), train_loader, val_loader)
    return recorder.run()


def lightning_precision(precision: str, scaler: dict[str, Any]) -> Precision:
    """fit's plugin; without a GPU Lightning would turn 16-mixed into bf16-mixed, a plugin keeps its word."""
    if precision == "16-mixed":
        return MixedPrecision("16-mixed", "cpu", GradScaler("cpu", **scaler))
    plugin = precision_plugin(precision, "cpu")
    assert plugin is not None
    return plugin


LOOPS: dict[str, Callable[[Case, TokenDataModule], Run]] = {
    "lightning": run_lightning,
    "accelerate": run_accelerate,
    "reference": run_reference,
}
