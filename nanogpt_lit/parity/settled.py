"""The differences between the frameworks that were settled, each with the way to unsettle it again.

A difference is turned off in one loop, and that loop is compared with the reference: what is seen then is what a user
of that framework would have got.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

from accelerate import Accelerator  # type: ignore[import-untyped]
from accelerate.utils import AutocastKwargs  # type: ignore[import-untyped]
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision as LightningMixedPrecision
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from nanogpt_lit.data.datamodule import TokenDataModule
from nanogpt_lit.loops import accelerate_loop, lightning_observer
from nanogpt_lit.loops.contract import optimizer_and_schedule
from nanogpt_lit.loops.lightning_observer import Observed
from nanogpt_lit.loops.lightning_precision import precision_plugin
from nanogpt_lit.module import LitNanoGPT
from nanogpt_lit.optim.schedule import WarmupCosine
from nanogpt_lit.parity import runs
from nanogpt_lit.parity.record import Difference, compare
from nanogpt_lit.parity.runs import LOOPS, Case

OVERFLOWS = {"init_scale": 2.0**26, "backoff_factor": 2.0**-4, "growth_interval": 2}
"""A GradScaler that skips its first steps, then finds a scale that works and soon grows it."""


@dataclass(frozen=True)
class Settled:
    name: str
    breaks: str
    """What happens without it."""
    loop: str
    """Where it is turned off."""
    case: Callable[[Case], Case]
    """A case in which it matters."""
    off: Callable[[], Any]
    """A context without it."""

    def drift(self, base: Case, data: TokenDataModule) -> Difference | str | None:
        """The first difference without it; the error where nothing runs; None if it made none."""
        case = self.case(base)
        expected = LOOPS["reference"](case, data).entries
        try:
            with self.off():
                return compare(expected, LOOPS[self.loop](case, data).entries)
        except RuntimeError as error:
            return f"refused: {str(error).split('.')[0]}"


def with_settings(base: Case, /, scaler: Mapping[str, Any] | None = None, **changes: Any) -> Case:
    return replace(base, settings=replace(base.settings, **changes), scaler=dict(scaler or {}))


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
        patch.object(accelerate_loop, "optimizer_and_schedule", remember),
        patch.object(accelerate_loop, "clipping_order", usual_order),
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


def stock_precision(precision: str, scaler: dict[str, Any]) -> LightningMixedPrecision:
    return LightningMixedPrecision("16-mixed", "cpu", GradScaler("cpu", **scaler))


def without_reseeding(seed: int | None, rank: int = 0) -> None: ...


SETTLED = [
    Settled(
        "order of clipping",
        "accelerate's tutorial clips module.parameters(), Lightning by optimizer group: the norm rounds differently",
        "accelerate",
        # Every step is clipped, at a limit that no power of two hides.
        lambda base: with_settings(base, precision="32-true", gradient_clip_val=0.1),
        parameters_in_the_order_of_the_module,
    ),
    Settled(
        "autocast's weight cache",
        "accelerate leaves it on: the gradients of a weight that is used twice are added in 16 bits",
        "accelerate",
        lambda base: replace(with_settings(base, precision="bf16-mixed"), module=LossInTwoHalves),
        lambda: patch.object(accelerate_loop, "AUTOCAST", AutocastKwargs()),
    ),
    Settled(
        "schedule on a skipped step",
        "Lightning moves the learning rate on although the scaler skipped the step, accelerate does not",
        "lightning",
        lambda base: with_settings(base, precision="16-mixed", scaler=OVERFLOWS),
        lambda: patch.object(WarmupCosine, "step", LambdaLR.step),
    ),
    Settled(
        "float16 without a GPU (accelerate)",
        "Accelerator(mixed_precision='fp16') trains in float32 there, without a word",
        "accelerate",
        lambda base: with_settings(base, precision="16-mixed"),
        lambda: patch.object(runs, "HalfOnProcessors", Accelerator),
    ),
    Settled(
        "float16 without a GPU (Lightning)",
        "Trainer(precision='16-mixed') trains in bfloat16 there",
        "lightning",
        lambda base: with_settings(base, precision="16-mixed"),
        lambda: patch.object(runs, "lightning_precision", lambda *_: precision_plugin("bf16-mixed", "cpu")),
    ),
    Settled(
        "clipping with a fused optimizer",
        "Lightning refuses the two together under mixed precision",
        "lightning",
        lambda base: replace(
            with_settings(base, precision="16-mixed", gradient_clip_val=1.0),
            optim=replace(base.optim, implementation="fused"),
        ),
        lambda: patch.object(runs, "lightning_precision", stock_precision),
    ),
    Settled(
        "start of dropout's random state",
        "the masks depend on what was drawn while a framework set up",
        "lightning",
        lambda base: replace(with_settings(base, precision="32-true"), gpt=replace(base.gpt, dropout=0.1)),
        lambda: patch.object(lightning_observer, "seed_dropout", without_reseeding),
    ),
    Settled(
        "a ragged last window",
        "accelerate sees the end of a loader that it prepared only: the window runs on into the next epoch",
        "accelerate",
        lambda base: replace(with_settings(base, precision="32-true", accumulate_grad_batches=4), batches_per_epoch=6),
        lambda: patch.object(Accelerator, "prepare_data_loader", lambda self, loader, **options: loader),
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
        lambda: patch.object(accelerate_loop, "end", lambda loader: None),
    ),
    Settled(
        "the loss that is reported",
        "Lightning hands callbacks the loss divided by the accumulation",
        "lightning",
        lambda base: with_settings(base, precision="32-true", accumulate_grad_batches=4),
        lambda: patch.object(Observed, "on_train_batch_end", told_the_divided_loss),
    ),
]
