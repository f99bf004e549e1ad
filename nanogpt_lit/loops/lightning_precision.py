"""Lightning's precision plugins, and what every run here needs of them: the gradient norm, and clipping with a fused
optimizer."""

import math
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins import MixedPrecision as LightningMixedPrecision
from lightning.pytorch.plugins import Precision as LightningPrecision
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from nanogpt_lit.loops.contract import clipping_order, scaler_beside
from nanogpt_lit.run.guards import drop_unless_finite


class MeasuredClipping(LightningPrecision):
    """Keeps the norm that clipping computes anyway, and takes gradients away whose norm is not finite."""

    grad_norm: Tensor | None = None
    """Global norm of the gradients before clipping, at the last optimizer step."""

    def clip_gradients(
        self,
        optimizer: Optimizer,
        clip_val: int | float = 0.0,
        gradient_clip_algorithm: GradClipAlgorithmType = GradClipAlgorithmType.NORM,
    ) -> None:
        if clip_val <= 0 or gradient_clip_algorithm != GradClipAlgorithmType.NORM:
            self.clip_grad_by_norm(optimizer, math.inf)  # measures the norm and leaves the gradients alone
        # Not super(), whose MixedPrecision refuses every fused optimizer here: see below.
        LightningPrecision.clip_gradients(self, optimizer, clip_val, gradient_clip_algorithm)
        assert self.grad_norm is not None
        drop_unless_finite(clipping_order(optimizer), self.grad_norm)

    def clip_grad_by_norm(self, optimizer: Optimizer, clip_val: int | float) -> None:
        self.grad_norm = torch.nn.utils.clip_grad_norm_(self.main_params(optimizer), clip_val)


class FullPrecision(MeasuredClipping):
    """32-true."""


class MixedPrecision(MeasuredClipping, LightningMixedPrecision):
    """16-mixed and bf16-mixed.

    Lightning refuses gradient clipping together with a fused optimizer under any mixed precision (Lightning #21435),
    because a fused optimizer can unscale by itself, after the point where clipping happens. Nothing obliges it to:
    when the gradients are unscaled before clipping, GradScaler hands the fused kernel the overflow flag alone.
    """

    def connect(
        self, model: Module, optimizers: list[Optimizer], lr_schedulers: list[Any]
    ) -> tuple[Module, list[Optimizer], list[Any]]:
        if self.scaler is not None and optimizers:
            self.scaler = scaler_beside(clipping_order(optimizers[0]), self.scaler, torch.device(self.device))
        return super().connect(model, optimizers, lr_schedulers)

    def optimizer_step(  # type: ignore[override]
        self, optimizer: Optimizer, model: LightningModule, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        def closure_then_unscale() -> Any:
            result = closure()
            if self.scaler is not None and result is not None and _unscales_in_step(optimizer):
                self.scaler.unscale_(optimizer)  # the other optimizers are unscaled by Lightning at this point
            return result

        return super().optimizer_step(optimizer, model=model, closure=closure_then_unscale, **kwargs)


# A checkpoint files the scaler's state under the plugin's class name: with Lightning's, a stock Trainer finds it.
MixedPrecision.__qualname__ = LightningMixedPrecision.__qualname__


def _unscales_in_step(optimizer: Optimizer) -> bool:
    return getattr(optimizer, "_step_supports_amp_scaling", False)


def precision_plugin(precision: str, device: str) -> LightningPrecision | None:
    """The plugin for a Trainer's precision on "cuda", "mps" or "cpu"; None for those that Lightning handles alone."""
    if precision in ("32-true", "32"):
        return FullPrecision()
    if precision in ("16-mixed", "bf16-mixed"):
        return MixedPrecision(precision, device)  # type: ignore[arg-type]
    return None
