"""Lightning's Trainer, told and seeded as the other loops are."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from nanogpt_lit.loops.contract import Observer, Parts, clipping_order, seed_dropout
from nanogpt_lit.memory.elastic import end_step, start_elastic, stop_elastic
from nanogpt_lit.run.curves import gradient_norm, say


def parts_of(trainer: Trainer, module: LightningModule) -> Parts:
    schedule: Any = trainer.lr_scheduler_configs[0].scheduler
    return Parts(module, trainer.optimizers[0], schedule, getattr(trainer.precision_plugin, "scaler", None))


class DropoutSeed(Callback):
    """Starts the random state of dropout where the other loops start it."""

    def __init__(self, seed: int | None) -> None:
        self.seed = seed

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        seed_dropout(self.seed, trainer.global_rank)


class ElasticSteps(Callback):
    """Does a step that runs out of memory again, in less memory."""

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        start_elastic(
            module,
            accumulate_grad_batches=trainer.accumulate_grad_batches,
            scaler=parts_of(trainer, module).scaler,
            device=trainer.strategy.root_device,
            say=say,
        )

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            end_step(module)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        stop_elastic(module)

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        stop_elastic(module)


class Observed(Callback):
    """Tells an Observer what the Trainer does, in the contract's words."""

    def __init__(self, observer: Observer) -> None:
        self.observer = observer
        self._step = 0
        self._loss: Tensor | None = None
        self._lr = 0.0
        self._grad_norm: Tensor | None = None

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._step = trainer.global_step
        # The loss that callbacks are given is divided by the accumulation: here it is taken where it is made.
        self._hook = module.register_forward_hook(self._note_loss)
        self.observer.on_train_start(parts_of(trainer, module))

    def _note_loss(self, module: nn.Module, batch: Any, loss: Tensor | None) -> None:
        # Under DDP Lightning calls validation_step in the place of forward, and it returns nothing.
        if module.training and loss is not None:
            self._loss = loss.detach()

    def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, optimizer: Optimizer) -> None:
        self._lr = optimizer.param_groups[0]["lr"]  # the schedule has moved on before on_train_batch_end
        self._grad_norm = gradient_norm(clipping_order(optimizer))

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Tensor | Mapping[str, Any] | None, batch: Any, k: int
    ) -> None:
        assert self._loss is not None
        self.observer.on_batch_end(self._loss, batch[0].numel())
        if trainer.global_step > self._step:
            assert self._grad_norm is not None
            self._step = trainer.global_step
            self.observer.on_step_end(self._step, self._lr, self._grad_norm)

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self.observer.on_validation_start()

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self.observer.on_validation_end(trainer.global_step, trainer.callback_metrics["val/loss"])

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._hook.remove()
        self.observer.on_train_end()
