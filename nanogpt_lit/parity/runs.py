"""One case of the grid, run by each of the three loops from the same start."""

import itertools
import logging
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState  # type: ignore[import-untyped]
from accelerate.utils import GradScalerKwargs  # type: ignore[import-untyped]
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import Precision
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch.amp import GradScaler
from torch.utils.data import DataLoader

from nanogpt_lit.data.datamodule import TokenDataModule
from nanogpt_lit.data.sampler import StreamPosition, interleave, with_batches
from nanogpt_lit.gpt.network import NetworkConfig
from nanogpt_lit.gpt.networks import described
from nanogpt_lit.loops import accelerate, reference
from nanogpt_lit.loops.contract import LoopSettings
from nanogpt_lit.loops.lightning import MixedPrecision, Observed, precision_plugin
from nanogpt_lit.loops.sharded import compute_on, shard_over_all, zero_config
from nanogpt_lit.module import LitNanoGPT
from nanogpt_lit.optim.adamw import AdamWConfig
from nanogpt_lit.optim.schedule import ScheduleConfig
from nanogpt_lit.parity.record import Recorder
from nanogpt_lit.run.observers import always
from nanogpt_lit.runtime.process_settings import restored_process_settings, set_for_process
from nanogpt_lit.runtime.processes import rank

OVERFLOWS = {"init_scale": 2.0**26, "backoff_factor": 2.0**-4, "growth_interval": 2}
"""A GradScaler that skips its first steps, then finds a scale that works and soon grows it."""


@dataclass(frozen=True)
class Case:
    settings: LoopSettings
    gpt: NetworkConfig
    optim: AdamWConfig
    schedule: ScheduleConfig
    scaler: dict[str, Any] = field(default_factory=dict)
    """Arguments of GradScaler that differ from its defaults: a scale that overflows, or one that grows soon."""
    batches_per_epoch: int | None = None
    """Ends the training loader there, inside an accumulation window; None leaves it endless."""
    processes: int = 1
    """More than one train together under DistributedDataParallel, inside processes.run_together."""
    sharded: bool = False
    """True where they train under FSDP2 instead."""
    zero: Mapping[str, Any] | None = None
    """Or under DeepSpeed's ZeRO: its configuration."""
    device: str = "cpu"
    """Or "cuda": one process then."""
    module: type[LitNanoGPT] = LitNanoGPT
    module_options: dict[str, Any] = field(default_factory=dict)
    """Other arguments of the module."""

    def make_module(self) -> LitNanoGPT:
        torch.manual_seed(self.settings.seed or 0)
        options = {"optim": self.optim, "schedule": self.schedule, **self.module_options}
        return self.module(**described(self.gpt), **options)


def quiet() -> None:
    """Silence what the frameworks print of themselves at every run."""
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)


def loaders_of(case: Case, data: TokenDataModule, rank: int) -> tuple[DataLoader, DataLoader]:
    """The training and the validation loader of one process: its share of the one global order."""
    data.position = StreamPosition(rank, case.processes)
    train, val = data.train_dataloader(), data.val_dataloader(case.settings.limit_val_batches)
    if case.batches_per_epoch is not None:
        assert train.batch_sampler is not None
        train = with_batches(train, list(itertools.islice(train.batch_sampler, case.batches_per_epoch)))
    return train, val


def loaders_to_deal_out(case: Case, data: TokenDataModule) -> tuple[DataLoader, DataLoader]:
    """The loaders whose batches accelerate deals out, one to each process in turn: each then gets its share."""
    train, val = zip(*(loaders_of(case, data, rank) for rank in range(case.processes)), strict=True)
    return interleave(train), interleave(val)


def run_reference(case: Case, data: TokenDataModule) -> Recorder:
    recorder = Recorder(case.settings)
    scaler = GradScaler(case.device, **case.scaler) if case.settings.precision == "16-mixed" else None
    module = case.make_module().to(case.device)
    if case.sharded:
        shard_over_all(module, case.device, case.processes)
    reference.train(module, *loaders_of(case, data, rank()), case.settings, [*always(), recorder], scaler)
    return recorder


def run_accelerate(case: Case, data: TokenDataModule) -> Recorder:
    # accelerate keeps its state for the whole process: it refuses a second Accelerator of another precision, and one of
    # another accumulation goes on with the loaders of the first.
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    for engine in ("FSDP", "DEEPSPEED"):
        os.environ.pop(f"ACCELERATE_USE_{engine}", None)  # which an Accelerator leaves behind for the next one
    recorder = Recorder(case.settings)
    zero = None
    if case.zero is not None:
        compute_on(case.device)
        zero = zero_config(case.zero)
    options = accelerate.accelerator_options(case.settings, case.device, case.sharded, zero)
    if case.settings.precision == "16-mixed":
        options["kwargs_handlers"].append(GradScalerKwargs(**case.scaler))
    accelerator = HalfOnCpu(**options)
    module = case.make_module()
    if case.sharded:
        shard_over_all(module, case.device, case.processes)
    accelerate.train(accelerator, module, *loaders_to_deal_out(case, data), case.settings, [*always(), recorder])
    return recorder


class HalfOnCpu(accelerate.ShardingAccelerator):
    """fp16 with its GradScaler also without a GPU, where Accelerator trains in float32 without a word: float16 would be
    compared with float32."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if self.mixed_precision == "fp16" and self.device.type == "cpu":
            self.native_amp = True
            self.scaler = GradScaler("cpu", **(self.scaler_handler.to_kwargs() if self.scaler_handler else {}))


@restored_process_settings()
def run_lightning(case: Case, data: TokenDataModule) -> Recorder:
    recorder = Recorder(case.settings)
    trainer = Trainer(**trainer_options(case), callbacks=[Observed([*always(), recorder], case.settings.seed)])
    module = case.make_module()
    set_for_process(module, torch.device(case.device), case.settings.deterministic)  # as fit does
    trainer.fit(module, *loaders_of(case, data, rank()))
    return recorder


def trainer_options(case: Case) -> dict[str, Any]:
    settings = case.settings
    validates = settings.val_check_interval is not None
    return {
        "accelerator": case.device,
        "devices": case.processes,
        "strategy": strategy_of(case),
        # Named, or a cluster's job that this happens to run in would be taken for the launcher.
        "plugins": [precision_of(case), LightningEnvironment()],
        "deterministic": settings.deterministic,
        "max_steps": settings.max_steps,
        "accumulate_grad_batches": settings.accumulate_grad_batches,
        "gradient_clip_val": settings.gradient_clip_val,
        "val_check_interval": settings.val_check_interval,
        "check_val_every_n_epoch": None,
        "limit_val_batches": settings.limit_val_batches if validates else 0,
        "num_sanity_val_steps": 0,
        # It would shuffle anew what is dealt out already.
        "use_distributed_sampler": False,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }


def strategy_of(case: Case) -> str | Strategy:
    if case.zero is not None:
        from nanogpt_lit.loops.lightning_sharded import ZeroStrategy  # late, for it needs deepspeed

        compute_on(case.device)
        return ZeroStrategy(config=dict(case.zero))
    if case.sharded:
        return ModelParallelStrategy(data_parallel_size=case.processes, tensor_parallel_size=1)
    return "auto" if case.processes == 1 else "ddp"


def precision_of(case: Case) -> Precision:
    if case.zero is not None:
        from nanogpt_lit.loops.lightning_sharded import ZeroPrecision

        return ZeroPrecision(case.settings.precision)  # type: ignore[arg-type]
    return lightning_precision(case.settings.precision, case.scaler, case.device)


def lightning_precision(precision: str, scaler: dict[str, Any], device: str = "cpu") -> Precision:
    """fit's plugin; without a GPU Lightning would turn 16-mixed into bf16-mixed, a plugin keeps its word."""
    if precision == "16-mixed":
        return MixedPrecision("16-mixed", device, GradScaler(device, **scaler))
    plugin = precision_plugin(precision, device)
    assert plugin is not None
    return plugin


LOOPS: dict[str, Callable[[Case, TokenDataModule], Recorder]] = {
    "lightning": run_lightning,
    "accelerate": run_accelerate,
    "reference": run_reference,
}
