"""Lightning's Trainer as a loop of the contract: one callback turns its hooks into the moments that observers know.

With it come the precision plugins, which measure the gradients' norm where Lightning clips them.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision as LightningMixedPrecision
from lightning.pytorch.plugins import Precision as LightningPrecision
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch import Tensor, nn
from torch.optim import Optimizer

from nanogpt_lit.loops.contract import LoopSettings, Observer, Training, clipping_order, running, scaler_beside
from nanogpt_lit.loops.trainer_section import PLANNED, named_strategy
from nanogpt_lit.run.curves import SampleConfig
from nanogpt_lit.runtime.process_settings import RandomState


class Ended(Exception):  # noqa: N818 - it is no error
    """Raised out of a Trainer between two steps, where an observer has asked for the end."""


class Observed(Callback):
    """Callback that calls observers at the Trainer's moments, and raises `ended()` where one of them asks for the end.

    The user's own callbacks and loggers work beside it, as with any callback.
    seed: of dropout
    """

    def __init__(self, observers: Sequence[Observer], seed: int | None = None) -> None:
        self.observers = observers
        self.seed = seed
        self.random: RandomState | None = None
        self._run = ExitStack()
        self._step_ended = False
        self._loss: Tensor | None = None
        self.has_begun = False
        """True once it has trained: a Trainer that has all its steps already does not begin."""
        self._lr = 0.0
        self._grad_norm: Tensor | None = None

    def ended(self, trainer: Trainer) -> BaseException:
        # Not trainer.should_stop, which would validate after any step.
        return Ended()

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.has_begun = True
        self._training = training_of(trainer, module, self.seed)
        self._training.random = self.random
        self._plugin = trainer.precision_plugin if isinstance(trainer.precision_plugin, MeasuredClipping) else None
        self._drops = isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy)
        # The loss that callbacks are given is divided by the accumulation: here it is taken where it is made.
        self._run.callback(module.register_forward_hook(self._note_loss).remove)
        self._observer = self._run.enter_context(running(self._training, self.observers))
        if self._plugin is not None:
            self._plugin.listeners = self._observer.listeners("on_before_step")

    def _note_loss(self, module: nn.Module, batch: Any, loss: Tensor | None) -> None:
        # Under DDP Lightning calls validation_step in the place of forward, and it returns nothing.
        if module.training and loss is not None:
            self._loss = loss.detach()

    def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, optimizer: Optimizer) -> None:
        self._lr = optimizer.param_groups[0]["lr"]  # the schedule has moved on before on_train_batch_end
        if self._plugin is None:
            # The engines of FSDP and DeepSpeed, and a plugin of the user's, clip by themselves.
            self._grad_norm = nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None])
            if self._drops:  # the processes of other engines hold different gradients
                self._observer.on_before_step(self._grad_norm)

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        training, observer = self._training, self._observer
        assert self._loss is not None
        training.batches += 1
        observer.on_batch_end(self._loss, batch[0].numel())
        self._step_ended = trainer.global_step > training.step
        if not self._step_ended:
            return  # inside an accumulation window
        training.step = trainer.global_step
        grad_norm = self._grad_norm if self._plugin is None else self._plugin.grad_norm
        assert grad_norm is not None
        observer.on_step_end(training.step, self._lr, grad_norm)
        if training.step >= trainer.max_steps:
            trainer.should_stop = True  # Lightning validates before it stops

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        if self._is_training(trainer):
            self._observer.on_validation_start()

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        if self._is_training(trainer) and "val/loss" in trainer.callback_metrics:
            self._observer.on_validation_end(trainer.global_step, trainer.callback_metrics["val/loss"])

    def _is_training(self, trainer: Trainer) -> bool:
        return trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        # Not where the step ends: its validation follows there, and what the user's callbacks do with it.
        if self._step_ended and self._observer.between_steps(self._training.step):
            self._training.is_stopped = True
            self._run.close()
            raise self.ended(trainer)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._run.close()

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        self._run.__exit__(type(exception), exception, exception.__traceback__)


class TextSamples(Callback):
    """Lets the model write after each validation, into TensorBoard's TEXT tab.

    A YAML's callback that holds the settings; run/curves.py is what writes.

    Args:
        prompt: What the text begins with; None takes how your text begins, its validation part, and empty begins a new
            document. Of a model that learns conversations, a question for it to answer.
        tokens: How many tokens to write.
        temperature: 0 writes the likeliest token each time; higher is bolder.
        seed: The same each time, so that samples of different steps can be compared.
    """

    def __init__(
        self, prompt: str | None = None, tokens: int = 300, temperature: float = 0.8, seed: int = 1337
    ) -> None:
        self.config = SampleConfig(prompt, tokens, temperature, seed)


def training_of(trainer: Trainer, module: LightningModule, seed: int | None = None) -> Training:
    schedule: Any = trainer.lr_scheduler_configs[0].scheduler
    validates = trainer.limit_val_batches != 0
    settings = LoopSettings(
        max_steps=max(1, trainer.max_steps),
        accumulate_grad_batches=trainer.accumulate_grad_batches,
        gradient_clip_val=trainer.gradient_clip_val,
        precision=str(trainer.precision),
        val_check_interval=max(1, int(min(trainer.val_check_batch or 1, 2**62))) if validates else None,
        seed=seed,
    )
    return Training(
        module,
        getattr(trainer.strategy, "zero", None) or trainer.optimizers[0],
        schedule,
        getattr(trainer.precision_plugin, "scaler", None),
        settings,
        trainer.strategy.root_device,
        trainer.global_rank,
        trainer.world_size,
        step=trainer.global_step,
        batches=trainer.fit_loop.epoch_loop.batch_progress.total.processed,  # type: ignore[attr-defined]
        save=trainer.save_checkpoint,
        zeroes_after_forward=True,
        strategy=PLANNED.get(named_strategy(trainer.strategy) or ""),
        strategy_options=getattr(trainer.strategy, "_ddp_kwargs", {}),
    )


class MeasuredClipping(LightningPrecision):
    """Precision plugin that passes the norm of the gradients, which clipping computes anyway, to its listeners."""

    grad_norm: Tensor | None = None
    """Global norm of the gradients before clipping, at the last optimizer step."""
    listeners: Sequence[Callable[[Tensor], None]] = ()
    """Called with the norm before the step."""

    def clip_gradients(
        self,
        optimizer: Optimizer,
        clip_val: int | float = 0.0,
        gradient_clip_algorithm: GradClipAlgorithmType = GradClipAlgorithmType.NORM,
    ) -> None:
        # Not super(), whose MixedPrecision refuses every fused optimizer here: see below.
        by_norm = clip_val > 0 and gradient_clip_algorithm == GradClipAlgorithmType.NORM
        # An infinite limit measures the norm and leaves the gradients alone.
        norm = nn.utils.clip_grad_norm_(self.main_params(optimizer), clip_val if by_norm else math.inf)
        self.grad_norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # FSDP2's is a share of it
        if not by_norm:
            LightningPrecision.clip_gradients(self, optimizer, clip_val, gradient_clip_algorithm)
        for tell in self.listeners:
            tell(self.grad_norm)


class FullPrecision(MeasuredClipping):
    """32-true."""


class MixedPrecision(MeasuredClipping, LightningMixedPrecision):
    """16-mixed and bf16-mixed.

    Lightning refuses gradient clipping together with a fused optimizer under any mixed precision (Lightning #21435),
    because a fused optimizer can unscale by itself, after the point where clipping happens. Nothing obliges it to:
    when the gradients are unscaled before clipping, GradScaler hands the fused kernel the overflow flag alone.
    """

    def connect(
        self, model: nn.Module, optimizers: list[Optimizer], lr_schedulers: list[Any]
    ) -> tuple[nn.Module, list[Optimizer], list[Any]]:
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
