"""What a run shows while Lightning drives it: curves, samples, the progress line."""

from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim import Optimizer

from nanogpt_lit.errors import UserError
from nanogpt_lit.gpt.model import GPT
from nanogpt_lit.gpt.sampling import continue_text
from nanogpt_lit.loops.lightning_precision import MeasuredClipping
from nanogpt_lit.optim.schedule import WarmupDecay
from nanogpt_lit.run.curves import StepMeter, ValidationRecord, code_block, gradient_norm, is_drawn, perplexity
from nanogpt_lit.run.progress import Progress
from nanogpt_lit.runtime.machine import peak_flops_of


class TrainingCurves(Callback):
    """Writes the curves, over optimizer steps, to every logger of the Trainer.

    `self.log` in the module would draw the loss of the last micro-batch of a step, over a count of micro-batches.
    """

    def __init__(self, meter: StepMeter, validations: ValidationRecord) -> None:
        self.meter = meter
        self.validations = validations
        self._step = 0
        self._lr = 0.0
        self._grad_norm: Tensor | None = None
        self._peak_flops: float | None = None
        self._flops_per_token = 0

    def state_dict(self) -> dict[str, Any]:
        return {
            "tokens": self.meter.tokens,
            "trained_s": self.meter.trained_s,
            "validations": self.validations.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.meter.tokens = state_dict["tokens"]
        self.meter.earlier_s = state_dict.get("trained_s", 0.0)
        self.validations.load_state_dict(state_dict["validations"])

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._step = trainer.global_step
        gpt = network(module)
        self._flops_per_token = gpt.flops_per_token(gpt.config.block_size)
        device, precision = trainer.strategy.root_device, str(trainer.precision)
        self._peak_flops = peak_flops_of(device, precision, trainer.world_size)
        self.meter.watch_peak(
            module,
            trainer.optimizers[0],
            device,
            trainer.world_size,
            accumulate_grad_batches=trainer.accumulate_grad_batches,
            precision=precision,
            clips=bool(trainer.gradient_clip_val),
            zeroes_after_forward=True,
            validates=trainer.limit_val_batches != 0,
        )
        self.meter.start()

    def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, optimizer: Optimizer) -> None:
        self._lr = optimizer.param_groups[0]["lr"]  # the schedule has moved on before on_train_batch_end
        # Our clipping measures the norm anyway; without, it is computed for the steps that are drawn, and only those.
        clips = trainer.gradient_clip_val and isinstance(trainer.precision_plugin, MeasuredClipping)
        if not clips and self._is_due(trainer, self._step + 1):
            self._grad_norm = gradient_norm(module.parameters())

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # outputs["loss"] is already divided by the accumulation, so that a window's sum is its mean.
        self.meter.add_batch(outputs["loss"], tokens=batch[0].numel() * trainer.world_size)
        if trainer.global_step == self._step:
            return  # inside an accumulation window
        self._step = trainer.global_step
        self.meter.end_step()
        if self._step >= trainer.max_steps:
            trainer.should_stop = True  # Lightning validates before it stops, and so saves the last step
        if self._is_due(trainer, self._step):
            self._draw(trainer)

    def _is_due(self, trainer: Trainer, step: int) -> bool:
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]  # its connectors set it
        return is_drawn(step, every, trainer.max_steps)

    def _draw(self, trainer: Trainer) -> None:
        clipped_norm: Tensor | None = getattr(trainer.precision_plugin, "grad_norm", None)
        grad_norm = self._grad_norm if clipped_norm is None else clipped_norm
        assert grad_norm is not None
        schedule = trainer.lr_scheduler_configs[0].scheduler
        assert isinstance(schedule, WarmupDecay)
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        log(
            trainer,
            self.meter.curves(
                lr=self._lr,
                grad_norm=grad_norm,
                loss_scale=scaler.get_scale() if scaler is not None else None,
                skipped_steps=schedule.skipped_steps,
                flops_per_token=self._flops_per_token,
                peak_flops=self._peak_flops,
                device=trainer.strategy.root_device,
            ),
        )

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.meter.pause()

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        if not trainer.sanity_checking and "val/loss" in trainer.callback_metrics:
            loss = float(trainer.callback_metrics["val/loss"])
            self.validations.add(trainer.global_step, loss)
            log(trainer, {"val/perplexity": perplexity(loss)})
        if trainer.state.fn == TrainerFn.FITTING:
            self.meter.start()


class TextSamples(Callback):
    """Lets the model write after each validation, into TensorBoard's TEXT tab.

    It draws from a generator of its own: with or without samples, the training is bit for bit the same.

    Args:
        prompt: What the text begins with; empty begins a new document.
        tokens: How many tokens to write.
        temperature: 0 writes the likeliest token each time; higher is bolder.
        seed: The same each time, so that samples of different steps can be compared.
    """

    def __init__(self, prompt: str = "", tokens: int = 300, temperature: float = 0.8, seed: int = 1337) -> None:
        """Raises UserError for what would end the run at its first validation."""
        for name, value, least in (("tokens", tokens, 1), ("temperature", temperature, 0), ("seed", seed, 0)):
            if not least <= value < 2**63:
                raise UserError(f"TextSamples: {name}={value} must be at least {least}, and no more than 64 bits hold.")
        self.prompt = prompt
        self.tokens = tokens
        self.temperature = temperature
        self.seed = seed
        self.latest: str | None = None

    def check(self, data: LightningDataModule) -> None:
        """Raises UserError for a prompt that the tokenizer cannot encode."""
        data.tokenizer.encode(self.prompt)  # type: ignore[attr-defined]  # TokenDataModule's

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        # A sharded network is whole only while all processes compute: then all of them write, and the first one keeps.
        if trainer.sanity_checking or not (trainer.is_global_zero or module.device_mesh is not None):
            return
        self.latest = self.write(module, trainer.datamodule)  # type: ignore[attr-defined]
        add_text(trainer, "sample", self.latest)

    def write(self, module: LightningModule, data: LightningDataModule) -> str:
        """The text, with its prompt; also for loops that have no callbacks."""
        tokenizer = data.tokenizer  # type: ignore[attr-defined]  # TokenDataModule's
        pieces = continue_text(
            network(module), tokenizer, self.prompt, self.tokens, temperature=self.temperature, seed=self.seed
        )
        return self.prompt + "".join(pieces)


class StepProgressBar(ProgressBar):
    """Lightning's own bar counts micro-batches within an epoch; here the unit is the optimizer step of the run."""

    def __init__(self, meter: StepMeter, validations: ValidationRecord) -> None:
        super().__init__()
        self.meter = meter
        self.validations = validations
        self._progress: Progress | None = None
        self._step = 0
        self._enabled = True

    def disable(self) -> None:  # Lightning calls this on every rank but the first
        self._enabled = False

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._step = trainer.global_step
        if self._enabled:
            self._progress = Progress(trainer.max_steps, self._step)

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._progress is not None and trainer.global_step > self._step:
            self._step = trainer.global_step
            self._progress.update(self._step, self.meter.drawn_loss, self.meter.tokens_per_s)

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        if self._progress is not None and not trainer.sanity_checking and self.validations.latest:
            self._progress.say(self.validations.sentence())

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self._progress is not None:
            self._progress.close()


def network(module: LightningModule) -> GPT:
    assert isinstance(module.gpt, GPT)
    return module.gpt


def log(trainer: Trainer, values: dict[str, float]) -> None:
    for logger in trainer.loggers:
        logger.log_metrics(values, step=trainer.global_step)


def add_text(trainer: Trainer, tag: str, text: str) -> None:
    """Into the TEXT tab."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text(tag, code_block(text), trainer.global_step)
