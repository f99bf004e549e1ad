"""The differences between the frameworks that were settled, each with the way to unsettle it again.

A difference is turned off in one loop, and that loop is compared with the reference: what is seen then is what a user
of that framework would have got.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from accelerate import Accelerator  # type: ignore[import-untyped]
from accelerate.scheduler import AcceleratedScheduler  # type: ignore[import-untyped]
from accelerate.utils import AutocastKwargs, DataLoaderConfiguration  # type: ignore[import-untyped]
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision as LightningMixedPrecision
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader

from nanogpt_lit.data.datamodule import TokenDataModule
from nanogpt_lit.loops import accelerate_loop, lightning_observer
from nanogpt_lit.loops.contract import optimizer_and_schedule
from nanogpt_lit.loops.lightning_observer import Observed
from nanogpt_lit.loops.lightning_precision import precision_plugin
from nanogpt_lit.module import LitNanoGPT
from nanogpt_lit.optim.schedule import WarmupDecay
from nanogpt_lit.parity import runs
from nanogpt_lit.parity.compare import earliest
from nanogpt_lit.parity.drift import Drift, Settled
from nanogpt_lit.parity.processes import run_together
from nanogpt_lit.parity.runs import Case, loaders_of, loaders_to_deal_out, quiet, trainer_options
from nanogpt_lit.runtime.processes import rank

OVERFLOWS = {"init_scale": 2.0**26, "backoff_factor": 2.0**-4, "growth_interval": 2}
"""A GradScaler that skips its first steps, then finds a scale that works and soon grows it."""


def drifts_together(processes: int, base: Case, data: TokenDataModule) -> dict[str, Drift]:
    """What happens without each settled difference that takes several processes to be seen, by its name."""
    data.position = None
    names = [settled.name for settled in SETTLED if settled.case(base).processes == processes]
    of_ranks = run_together(processes, drifts, names, base, data)
    return {name: of_all_ranks(drift) for name, *drift in zip(names, *of_ranks, strict=True)}


def drifts(names: Sequence[str], base: Case, data: TokenDataModule) -> list[Drift]:
    quiet()
    by_name = {settled.name: settled for settled in SETTLED}
    return [by_name[name].drift(base, data) for name in names]


def of_all_ranks(drifts: Sequence[Drift]) -> Drift:
    return replace(drifts[0], first=earliest([drift.first for drift in drifts]))


def with_settings(base: Case, /, scaler: Mapping[str, Any] | None = None, **changes: Any) -> Case:
    return replace(base, settings=replace(base.settings, **changes), scaler=dict(scaler or {}))


@contextmanager
def swapped(owner: Any, name: str, stand_in: Any) -> Iterator[None]:
    """What was settled is one name in a loop: for a while it means what a framework would do by itself."""
    settled = getattr(owner, name)
    setattr(owner, name, stand_in)
    try:
        yield
    finally:
        setattr(owner, name, settled)


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
        swapped(accelerate_loop, "optimizer_and_schedule", remember),
        swapped(accelerate_loop, "clipping_order", usual_order),
    ):
        yield


class LossInTwoHalves(LitNanoGPT):
    """Uses every weight twice in a forward, as a loss in chunks does with the head."""

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        first, second = (self.loss(*half) for half in zip(tokens.tensor_split(2), targets.tensor_split(2), strict=True))
        return (first + second) / 2


told = Observed.on_train_batch_end


def told_the_divided_loss(
    self: Observed, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, k: int
) -> None:
    self._loss = outputs["loss"]
    told(self, trainer, module, outputs, batch, k)


def stock_precision(precision: str, scaler: dict[str, Any], device: str) -> LightningMixedPrecision:
    return LightningMixedPrecision("16-mixed", device, GradScaler(device, **scaler))


def prepared_schedule(module: nn.Module) -> tuple[Optimizer, LRScheduler]:
    """What accelerator.prepare makes of a schedule."""
    optimizer, schedule = optimizer_and_schedule(module)
    return optimizer, AcceleratedScheduler(schedule, [])


@contextmanager
def usual_schedule() -> Iterator[None]:
    with (
        swapped(accelerate_loop, "optimizer_and_schedule", prepared_schedule),
        swapped(WarmupDecay, "step", LambdaLR.step),  # ours moves once for each step of the optimizer, whoever calls
    ):
        yield


def the_share_of_this_process(case: Case, data: TokenDataModule) -> tuple[DataLoader, DataLoader]:
    return loaders_of(case, data, rank())


def a_plain_loader(case: Case, data: TokenDataModule, rank: int) -> tuple[DataLoader, DataLoader]:
    """The same samples in the same order, as a data set of one sample each that nobody has dealt out."""
    train, val = loaders_of(replace(case, processes=1), data, rank)
    turns = case.settings.max_steps * case.settings.accumulate_grad_batches
    batches = itertools.islice(train, turns * case.processes)
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
        swapped(accelerate_loop, "DataLoaderConfiguration", lambda **_: DataLoaderConfiguration()),
        swapped(runs, "loaders_to_deal_out", validation_to_deal_out),
    ):
        yield


@contextmanager
def library_sampler() -> Iterator[None]:
    def options(case: Case) -> dict[str, Any]:
        return trainer_options(case) | {"use_distributed_sampler": True}

    with swapped(runs, "loaders_of", a_plain_loader), swapped(runs, "trainer_options", options):
        yield


def without_reseeding(seed: int | None, rank: int = 0) -> None: ...


SETTLED = [
    Settled(
        "order of clipping",
        "accelerate's tutorial clips module.parameters(), Lightning by optimizer group: the norm may round differently",
        "accelerate",
        # Every step is clipped, at a limit that no power of two hides.
        lambda base: with_settings(base, precision="32-true", gradient_clip_val=0.1),
        parameters_in_the_order_of_the_module,
        only_rounds=True,
    ),
    Settled(
        "autocast's weight cache",
        "accelerate leaves it on: the gradients of a weight that is used twice are added in 16 bits",
        "accelerate",
        lambda base: replace(with_settings(base, precision="bf16-mixed"), module=LossInTwoHalves),
        lambda: swapped(accelerate_loop, "AUTOCAST", AutocastKwargs()),
    ),
    Settled(
        "schedule on a skipped step",
        "Lightning moves the learning rate on although the scaler skipped the step, accelerate does not",
        "lightning",
        lambda base: with_settings(base, precision="16-mixed", scaler=OVERFLOWS),
        lambda: swapped(WarmupDecay, "step", LambdaLR.step),
    ),
    Settled(
        "float16 without a GPU (accelerate)",
        "Accelerator(mixed_precision='fp16') trains in float32 there, without a word",
        "accelerate",
        lambda base: with_settings(base, precision="16-mixed"),
        lambda: swapped(runs, "HalfOnProcessors", Accelerator),
    ),
    Settled(
        "float16 without a GPU (Lightning)",
        "Trainer(precision='16-mixed') trains in bfloat16 there",
        "lightning",
        lambda base: with_settings(base, precision="16-mixed"),
        lambda: swapped(runs, "lightning_precision", lambda *_: precision_plugin("bf16-mixed", "cpu")),
    ),
    Settled(
        "clipping with a fused optimizer",
        "Lightning refuses the two together under mixed precision",
        "lightning",
        lambda base: replace(
            with_settings(base, precision="16-mixed", gradient_clip_val=1.0),
            optim=replace(base.optim, implementation="fused"),
        ),
        lambda: swapped(runs, "lightning_precision", stock_precision),
    ),
    Settled(
        "start of dropout's random state",
        "the masks depend on what was drawn while a framework set up",
        "lightning",
        lambda base: replace(with_settings(base, precision="32-true"), gpt=replace(base.gpt, dropout=0.1)),
        lambda: swapped(lightning_observer, "seed_dropout", without_reseeding),
    ),
    Settled(
        "a ragged last window",
        "accelerate sees the end of a loader that it prepared only: the window runs on into the next epoch",
        "accelerate",
        lambda base: replace(with_settings(base, precision="32-true", accumulate_grad_batches=4), batches_per_epoch=6),
        lambda: swapped(Accelerator, "prepare_data_loader", lambda self, loader, **options: loader),
    ),
    Settled(
        "a validation that stops half-way",
        "accelerate goes on to ask the validation loader whether the training loader ends",
        "accelerate",
        lambda base: replace(
            with_settings(
                base, precision="32-true", accumulate_grad_batches=4, val_check_interval=5, limit_val_batches=1
            ),
            batches_per_epoch=6,
        ),
        lambda: swapped(accelerate_loop, "end", lambda loader: None),
    ),
    Settled(
        "the loss that is reported",
        "Lightning hands callbacks the loss divided by the accumulation",
        "lightning",
        lambda base: with_settings(base, precision="32-true", accumulate_grad_batches=4),
        lambda: swapped(Observed, "on_train_batch_end", told_the_divided_loss),
    ),
    Settled(
        "steps of the schedule on two processes",
        "accelerate steps a prepared schedule once per process: the rate rises and falls twice as fast",
        "accelerate",
        lambda base: replace(with_settings(base, precision="32-true"), processes=2),
        usual_schedule,
    ),
    Settled(
        "batches of each process (accelerate)",
        "accelerate deals out every loader that it prepares, also one that is a process's share: half goes unread",
        "accelerate",
        lambda base: replace(with_settings(base, precision="32-true"), processes=2),
        lambda: swapped(runs, "loaders_to_deal_out", the_share_of_this_process),
    ),
    Settled(
        "validation on two processes",
        "accelerate's even_batches fills the last turn with windows that have been read: they count twice",
        "accelerate",
        lambda base: replace(with_settings(base, precision="32-true", limit_val_batches=None), processes=2),
        usual_evenness,
    ),
    Settled(
        "batches of each process (Lightning)",
        "Lightning puts its own sampler into a loader, which shuffles also where shuffle=False was asked for",
        "lightning",
        lambda base: replace(with_settings(base, precision="32-true", val_check_interval=None), processes=2),
        library_sampler,
    ),
]
