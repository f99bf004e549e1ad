"""What a loop needs of a module, what it is told, and what it tells: the same for plain PyTorch and for accelerate.

A module is anything with `forward(tokens, targets) -> mean loss` and `configure_optimizers()`. The settings are named
as in Lightning's Trainer, which defined the contract.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from nanogpt_lit.errors import UserError
from nanogpt_lit.runtime.precision import IN_ACCELERATE
from nanogpt_lit.runtime.process_settings import Deterministic


@dataclass(frozen=True)
class LoopSettings:
    max_steps: int
    """Optimizer steps of the run; a loader that ends before is started again."""
    accumulate_grad_batches: int = 1
    """Micro-batches per optimizer step. A loader that ends inside such a window closes it with what there is."""
    gradient_clip_val: float | None = None
    """Largest global norm of the gradients; None or 0 leaves them alone."""
    precision: str = "32-true"
    """32-true, bf16-mixed or 16-mixed."""
    val_check_interval: int | None = None
    """Micro-batches between validations, and one after the last step; None never validates."""
    limit_val_batches: int | None = None
    """Validation batches to read; None reads all."""
    seed: int | None = None
    """Of dropout; None goes on with the random state as it is."""
    deterministic: Deterministic = None
    """Whether a GPU, which otherwise adds up in no fixed order, repeats the run to the bit."""

    def __post_init__(self) -> None:
        if self.precision not in IN_ACCELERATE:
            raise UserError(
                f"trainer.precision={self.precision} is for Lightning's Trainer only; "
                f"{', '.join(IN_ACCELERATE)} run in every loop."
            )
        for name in ("max_steps", "accumulate_grad_batches", "val_check_interval", "limit_val_batches"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"trainer.{name}={value} must be at least 1.")

    def validates_after(self, batches: int, step: int) -> bool:
        """Whether to validate, `batches` micro-batches and `step` optimizer steps into the run."""
        if self.val_check_interval is None:
            return False
        return batches % self.val_check_interval == 0 or step == self.max_steps


@dataclass(frozen=True)
class Parts:
    """The objects whose state is the state of a run."""

    module: nn.Module
    optimizer: Optimizer
    schedule: LRScheduler
    scaler: GradScaler | None
    """None unless gradients are scaled."""

    def loss_scale(self) -> float | None:
        return None if self.scaler is None else self.scaler.get_scale()


class Observer:
    """What a loop tells while it runs. Each method may be overridden; none may change the training."""

    def on_train_start(self, parts: Parts) -> None: ...

    def on_batch_end(self, loss: Tensor, tokens: int) -> None:
        """loss: the mean of this process's micro-batch, not divided by the accumulation   tokens: in it"""

    def on_step_end(self, step: int, lr: float, grad_norm: Tensor) -> None:
        """step: optimizer steps so far, skipped ones too   lr: that it was taken with   grad_norm: before clipping"""

    def on_validation_start(self) -> None: ...

    def on_validation_end(self, step: int, loss: Tensor) -> None:
        """loss: the mean over all that was read, on all processes"""

    def on_stop(self, step: int) -> None:
        """The run was asked to stop: this is the last thing that is told."""

    def on_train_end(self) -> None: ...


def never() -> bool:
    """The should_stop of a run that nothing stops."""
    return False


def optimizer_and_schedule(module: nn.Module) -> tuple[Optimizer, LRScheduler]:
    configured: dict[str, Any] = module.configure_optimizers()  # type: ignore[operator]  # nn.Module knows no such method
    return configured["optimizer"], configured["lr_scheduler"]["scheduler"]


def clipping_order(optimizer: Optimizer) -> list[nn.Parameter]:
    """The parameters as Lightning clips them: by group of the optimizer.

    The usual `module.parameters()` has another order. The global norm is a sum, in another order it is rounded
    differently, and every gradient is divided by it: the runs part at the first clipped step.
    """
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes. Its parameters may be elsewhere: see model.memory.weights."""
    device = getattr(module, "device", None)  # a LightningModule's own, which follows module.to()
    return device if isinstance(device, torch.device) else next(module.parameters()).device


def scaler_beside(parameters: list[nn.Parameter], scaler: GradScaler, device: torch.device) -> GradScaler:
    """The scaler, or one with its settings where the gradients are, when they are not on the device that computes.

    A CUDA scaler sends its scale to gradients in host memory without waiting for the copy: they would be divided by
    whatever was there before.
    """
    beside = parameters[0].device.type
    if beside == device.type or not scaler.is_enabled():
        return scaler
    moved = GradScaler(beside)
    moved.load_state_dict(scaler.state_dict())
    return moved


def seed_dropout(seed: int | None, rank: int = 0) -> None:
    """Called by every loop just before its first batch; each process gets masks of its own.

    Frameworks may draw random numbers while they set up (a sanity check, a loader's iterator, a hook of the user's),
    and each draws its own count: without a common start the first dropout masks already differ.
    """
    if seed is not None:
        torch.manual_seed(seed + rank)


class MeanLoss:
    """The mean of micro-batches' mean losses, weighted by their sizes: in float32, in the order they come, as
    Lightning's `self.log(..., batch_size=...)` adds them up."""

    def __init__(self) -> None:
        self.total: Tensor | float = 0.0
        self.sequences = 0

    def add(self, loss: Tensor, sequences: int) -> None:
        self.total = self.total + loss.detach() * sequences
        self.sequences += sequences
