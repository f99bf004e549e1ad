"""Contexts in which a loop here does what its framework does by itself, in place of what it does about that."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from accelerate.scheduler import AcceleratedScheduler  # type: ignore[import-untyped]
from accelerate.utils import (  # type: ignore[import-untyped]
    DataLoaderConfiguration,
    FullyShardedDataParallelPlugin,
    GradientAccumulationPlugin,
)
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision as LightningMixedPrecision
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader

from nanogpt_lit.data.datamodule import TokenDataModule
from nanogpt_lit.loops import accelerate
from nanogpt_lit.loops.contract import optimizer_and_schedule
from nanogpt_lit.loops.lightning import Observed
from nanogpt_lit.module import LitNanoGPT
from nanogpt_lit.optim.schedule import WarmupDecay
from nanogpt_lit.parity import runs
from nanogpt_lit.parity.runs import Case, loaders_of, loaders_to_deal_out, trainer_options
from nanogpt_lit.runtime.processes import rank


@contextmanager
def swapped(owner: Any, name: str, stand_in: Any) -> Iterator[None]:
    """Each difference is dealt with by one name in a loop: for a while it means what the framework does by itself."""
    ours = getattr(owner, name)
    setattr(owner, name, stand_in)
    try:
        yield
    finally:
        setattr(owner, name, ours)


@contextmanager
def parameters_in_the_order_of_the_module() -> Iterator[None]:
    module: nn.Module

    def remember(its_module: nn.Module) -> tuple[Optimizer, LRScheduler]:
        nonlocal module
        module = its_module
        return optimizer_and_schedule(module)

    def usual_order(optimizer: Optimizer) -> list[nn.Parameter]:
        return list(module.parameters())

    with (
        swapped(accelerate, "optimizer_and_schedule", remember),
        swapped(accelerate, "clipping_order", usual_order),
    ):
        yield


class LossInTwoHalves(LitNanoGPT):
    """Uses every weight twice in a forward, as a loss in chunks does with the head."""

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        halves = zip(tokens.tensor_split(2), targets.tensor_split(2), strict=True)
        first, second = (self.gpt.loss(*half) for half in halves)
        return (first + second) / 2


reported = Observed.on_train_batch_end


def reported_divided(
    self: Observed, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, k: int
) -> None:
    self._loss = outputs["loss"]
    reported(self, trainer, module, outputs, batch, k)


def stock_precision(precision: str, scaler: dict[str, Any], device: str) -> LightningMixedPrecision:
    return LightningMixedPrecision("16-mixed", device, GradScaler(device, **scaler))


def prepared_schedule(module: nn.Module) -> tuple[Optimizer, LRScheduler]:
    """A schedule as accelerator.prepare wraps it."""
    optimizer, schedule = optimizer_and_schedule(module)
    return optimizer, AcceleratedScheduler(schedule, [])


@contextmanager
def usual_schedule() -> Iterator[None]:
    with (
        swapped(accelerate, "optimizer_and_schedule", prepared_schedule),
        swapped(WarmupDecay, "step", LambdaLR.step),  # ours moves once for each step of the optimizer, whoever calls
    ):
        yield


def the_share_of_this_process(case: Case, data: TokenDataModule) -> tuple[DataLoader, DataLoader]:
    return loaders_of(case, data, rank())


def a_plain_loader(case: Case, data: TokenDataModule, rank: int) -> tuple[DataLoader, DataLoader]:
    """The same samples in the same order, as a data set of one sample each that nobody has dealt out."""
    train, val = loaders_of(replace(case, processes=1), data, rank)
    rounds = case.settings.max_steps * case.settings.accumulate_grad_batches
    batches = itertools.islice(train, rounds * case.processes)
    samples: Any = [sample for tokens, targets in batches for sample in zip(tokens, targets, strict=True)]
    return DataLoader(samples, batch_size=data.batch_size), val


def validation_to_deal_out(case: Case, data: TokenDataModule) -> tuple[DataLoader, DataLoader]:
    """The validation windows as one process reads them, whose batches come out even only by chance."""
    train, _ = loaders_to_deal_out(case, data)
    _, val = loaders_of(replace(case, processes=1), data, 0)
    return train, val


@contextmanager
def usual_evenness() -> Iterator[None]:
    with (
        swapped(accelerate, "DataLoaderConfiguration", lambda **_: DataLoaderConfiguration()),
        swapped(runs, "loaders_to_deal_out", validation_to_deal_out),
    ):
        yield


@contextmanager
def library_sampler() -> Iterator[None]:
    def options(case: Case) -> dict[str, Any]:
        return trainer_options(case) | {"use_distributed_sampler": True}

    with swapped(runs, "loaders_of", a_plain_loader), swapped(runs, "trainer_options", options):
        yield


def whole_windows(num_steps: int, sync_each_batch: bool) -> GradientAccumulationPlugin:
    return GradientAccumulationPlugin(num_steps=num_steps)


@contextmanager
def sharded_by_accelerate() -> Iterator[None]:
    """Context in which accelerate itself shards, as by `accelerate launch` with a file that says FSDP, version 2, and
    bf16."""
    with (
        swapped(runs, "shard_over_all", lambda *_: None),
        swapped(accelerate, "fsdp2", lambda: FullyShardedDataParallelPlugin(fsdp_version=2)),
    ):
        yield


def without_reseeding(seed: int | None, rank: int = 0) -> None: ...
