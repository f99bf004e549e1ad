"""The contract between a loop, its module and its observers, the same for every loop.

A module is anything with `forward(tokens, targets) -> mean loss` and `configure_optimizers()`. A loop holds what a
framework's users expect to read: batches, accumulation, backward, clipping, step, schedule, validation. All else that a
run does, curves and checkpoints and guards, is an `Observer` (run/). The settings are named as in Lightning's Trainer.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from nanogpt_lit.errors import UserError
from nanogpt_lit.runtime.precision import IN_ACCELERATE, PRECISIONS, dtype_of, scales_gradients
from nanogpt_lit.runtime.process_settings import (
    Deterministic,
    RandomState,
    restored_process_settings,
    set_for_process,
    set_random_state,
)
from nanogpt_lit.runtime.processes import any_sharded as any_sharded
from nanogpt_lit.runtime.processes import whole as whole

Batch = tuple[Tensor, Tensor]
"""tokens, targets: each (B, T) int64"""
EMPTY_LOADER = "the training loader is empty; its data needs at least one batch."


@dataclass(frozen=True)
class LoopSettings:
    max_steps: int
    """Optimizer steps of the run; a loader that ends before is started again."""
    accumulate_grad_batches: int = 1
    """Micro-batches per optimizer step. A loader that ends inside such a window closes it with what there is."""
    gradient_clip_val: float | None = None
    """Largest global norm of the gradients; None or 0 leaves them alone."""
    precision: str = "32-true"
    """32-true, bf16-mixed or 16-mixed; Lightning's Trainer knows more."""
    val_check_interval: int | None = None
    """Micro-batches between validations, and one after the last step; None never validates."""
    limit_val_batches: int | None = None
    """Batches of a process's validation loader to read; None reads all. Where a run's are limited, the loader of
    TokenDataModule.val_dataloader(limit) has a process's share of them."""
    seed: int | None = None
    """Seed of dropout; None goes on with the random state as it is."""
    deterministic: Deterministic = None
    """True has a GPU, which otherwise adds up in no fixed order, repeat the run to the bit."""

    def __post_init__(self) -> None:
        for name in ("max_steps", "accumulate_grad_batches", "val_check_interval", "limit_val_batches"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, int):
                raise UserError(f"trainer.{name}={value} should be an integer.")
            if value is not None and value < 1:
                raise UserError(f"trainer.{name}={value} must be at least 1.")

    def validates_after(self, batches: int, step: int) -> bool:
        """Tell whether to validate, `batches` micro-batches and `step` optimizer steps into the run."""
        if self.val_check_interval is None:
            return False
        return batches % self.val_check_interval == 0 or step == self.max_steps


@dataclass
class Training:
    """The objects that a loop trains, and how far it is. The loop keeps them up to date; observers may read them."""

    module: nn.Module
    optimizer: Optimizer
    schedule: LRScheduler
    scaler: GradScaler | None
    """The scaler of gradients; None unless they are scaled."""
    settings: LoopSettings
    device: torch.device
    """The device that the module computes on."""
    rank: int = 0
    processes: int = 1
    step: int = 0
    """Optimizer steps so far, skipped ones too."""
    batches: int = 0
    """Micro-batches so far, of this process."""
    is_stopped: bool = False
    """True once an observer has asked for the end."""
    random: RandomState | None = None
    """The state that dropout goes on from; None begins at the seed."""
    save: Callable[[Path], None] | None = None
    """Writes a checkpoint, where the framework has to do it; None where this object holds all that there is to save."""
    zeroes_after_forward: bool = False
    """True where the gradients of a step live until the next one's first forward is done, as under Lightning."""
    strategy: Literal["single", "ddp", "fsdp2"] | None = "single"
    """Kind of the strategy; None is one of which no plan can tell what a device holds."""
    strategy_options: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of DistributedDataParallel."""

    def loss_scale(self) -> float | None:
        """The scaler's. To read it is to wait for the device."""
        return None if self.scaler is None else self.scaler.get_scale()


class Observer:
    """Listener to the moments of a run, at some of which it may change the run's course. Any may be overridden."""

    def on_train_start(self, training: Training) -> None:
        """Called before the first batch. May put another state, step and random state into `training`, to go on with a
        run."""

    def on_batch_end(self, loss: Tensor, tokens: int) -> None:
        """loss: the mean of this process's micro-batch, not divided by the accumulation   tokens: in it"""

    def on_before_step(self, grad_norm: Tensor) -> None:
        """Called when the gradients are complete and clipped. May take them away: without any, a step changes nothing.

        grad_norm: before clipping
        """

    def on_step_end(self, step: int, lr: float, grad_norm: Tensor) -> None:
        """Called before the validation that may follow. May put weights and moments back to what they were.

        step: optimizer steps so far, skipped ones too   lr: that it was taken with   grad_norm: before clipping
        """

    def on_validation_start(self) -> None: ...

    def on_validation_end(self, step: int, loss: Tensor) -> None:
        """loss: the mean over all that was read, on all processes"""

    def between_steps(self, step: int) -> bool:
        """Called after each step and its validation, except the last. Returns whether to end the run here."""
        return False

    def on_train_end(self) -> None:
        """Called after the last step, or where an observer has asked for the end."""

    def on_exit(self) -> None:
        """Called however the run ends, by an error too, even one before its start: gives back what was taken."""


class Observers(Observer):
    """Several observers as one, called in their order; one that does not listen to a moment is not called at it."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self._observers = observers
        self._batch_end, self._before_step = self.listeners("on_batch_end"), self.listeners("on_before_step")
        self._step_end, self._between_steps = self.listeners("on_step_end"), self.listeners("between_steps")

    def listeners(self, moment: str) -> list[Callable[..., Any]]:
        """The observers' methods to call at a moment."""
        listening = (o for o in self._observers if getattr(type(o), moment) is not getattr(Observer, moment))
        return [getattr(observer, moment) for observer in listening]

    def on_train_start(self, training: Training) -> None:
        for observer in self._observers:
            observer.on_train_start(training)

    def on_batch_end(self, loss: Tensor, tokens: int) -> None:
        for tell in self._batch_end:
            tell(loss, tokens)

    def on_before_step(self, grad_norm: Tensor) -> None:
        for tell in self._before_step:
            tell(grad_norm)

    def on_step_end(self, step: int, lr: float, grad_norm: Tensor) -> None:
        for tell in self._step_end:
            tell(step, lr, grad_norm)

    def on_validation_start(self) -> None:
        for observer in self._observers:
            observer.on_validation_start()

    def on_validation_end(self, step: int, loss: Tensor) -> None:
        for observer in self._observers:
            observer.on_validation_end(step, loss)

    def between_steps(self, step: int) -> bool:
        asks_for_the_end = False
        for ask in self._between_steps:  # all of them: where there are several processes, they do it together
            asks_for_the_end |= ask(step)
        return asks_for_the_end

    def on_train_end(self) -> None:
        for observer in self._observers:
            observer.on_train_end()

    def on_exit(self) -> None:
        with ExitStack() as stack:  # one that fails keeps no other from it
            for observer in reversed(self._observers):
                stack.callback(observer.on_exit)


@contextmanager
def running(training: Training, observers: Sequence[Observer]) -> Iterator[Observers]:
    """Context of a run: sets up the process, tells the observers of the start and the end, and puts all back."""
    observer = Observers(observers)
    with restored_process_settings():
        try:
            set_for_process(training.module, training.device, training.settings.deterministic)
            observer.on_train_start(training)
            seed_dropout(training.settings.seed, training.rank)
            if training.random is not None:
                set_random_state(training.random, training.device)
            yield observer
            observer.on_train_end()
        finally:
            observer.on_exit()


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
    """The device that a module computes on. Its parameters may be elsewhere: see model.memory.weights."""
    device = getattr(module, "device", None)  # a LightningModule's own, which follows module.to()
    return device if isinstance(device, torch.device) else next(module.parameters()).device


def autocast_for(settings: LoopSettings, device: torch.device) -> torch.autocast:
    """Autocast at the settings' precision. Raises UserError for one that needs another framework.

    Without a cache of casted weights, as Lightning has it: with it, the gradients of a weight that a forward uses twice
    (a head that takes the loss in chunks) are summed in 16 bits; without it, in float32.
    """
    check_precision(settings)
    dtype = dtype_of(PRECISIONS[settings.precision].autocast)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None, cache_enabled=False)


def scaler_for(settings: LoopSettings, device: torch.device) -> GradScaler:
    return GradScaler(device.type, enabled=scales_gradients(settings.precision))


def check_precision(settings: LoopSettings) -> None:
    if settings.precision not in IN_ACCELERATE:
        raise UserError(
            f"trainer.precision={settings.precision} is for Lightning's Trainer only; "
            f"{', '.join(IN_ACCELERATE)} run in every loop."
        )


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
    moved.scale(torch.ones((), device=beside))  # its scale stays where the first one that it scales is
    return moved


def seed_dropout(seed: int | None, rank: int = 0) -> None:
    """Seed dropout, just before the first batch of every loop; each process gets masks of its own.

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


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to the device; a GPU copies pinned memory while this process goes on, as in both frameworks."""
    return tensor.to(device, non_blocking=device.type == "cuda")


def with_last(loader: Iterable[Batch]) -> Iterator[tuple[Batch, bool]]:
    """Yield each batch, and whether the loader ends with it. Raises UserError for a loader that has none."""
    batches = iter(loader)
    batch = next(batches, None)
    if batch is None:
        raise UserError(EMPTY_LOADER)
    for following in batches:
        yield batch, False
        batch = following
    yield batch, True
