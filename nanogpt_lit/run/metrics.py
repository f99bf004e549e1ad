"""The numbers of a run and their curves, counted alike by every loop. A curve is added here."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from nanogpt_lit.checkpoint.state import ValidationRecord, bits_per_byte, perplexity
from nanogpt_lit.gpt.network import Network
from nanogpt_lit.loops.contract import Observer, Training
from nanogpt_lit.runtime.clock import awake_s
from nanogpt_lit.runtime.launch import TokensReport
from nanogpt_lit.runtime.machine import peak_flops_of
from nanogpt_lit.runtime.processes import mean_of_processes

if TYPE_CHECKING:
    from nanogpt_lit.plan.peak_watch import PeakWatch

MIB = 2**20
CURVES = {
    "train/loss": "Mean cross-entropy in nats per token, over all micro-batches and processes of the optimizer step.",
    "train/lr": "The learning rate that the step was taken with.",
    "train/grad_norm": "Norm of all gradients together, before they are clipped.",
    "train/loss_scale": "The factor that keeps small float16 gradients above zero; halved where one is not finite.",
    "train/skipped_steps": "Steps so far that left the weights alone, for their gradients were not finite.",
    "train/rollbacks": "Times that the run went back to a checkpoint from a spike of the loss.",
    "train/tokens": "Tokens trained on since the run began, over all processes and resumes.",
    "val/loss": "Mean cross-entropy of the validation part in nats per token.",
    "val/perplexity": "exp(val/loss): the number of tokens that the network hesitates between, so to speak.",
    "val/bits_per_byte": "val/loss for each byte of text, which can be compared between tokenizers.",
    "throughput/tokens_per_s": "Since the point before, without validation, samples, saving and sleep.",
    "throughput/mfu": "Share of the GPU's peak that the network's own arithmetic comes to (model FLOPs utilization).",
    "throughput/trained_hours": "Hours of the run over all its processes, without sleep.",
    "memory/peak_allocated_mib": "The most that tensors have held on the GPU.",
    "memory/peak_reserved_mib": "The most that PyTorch has taken of the GPU for them.",
    "memory/planned_mib": "What the plan says that PyTorch takes.",
    "gpu/temperature_c": "Temperature of the GPU in degrees Celsius.",
    "gpu/power_w": "Power that the GPU draws, in watts.",
    "gpu/clock_mhz": "Clock of the GPU's multiprocessors.",
    "gpu/slowed_by_heat": "1 where the GPU's driver has lowered the clock because of heat.",
    "gpu/slowed_by_power": "1 where the GPU's driver has lowered the clock because of a limit of power.",
}
"""Descriptions of the tags, drawn over optimizer steps; TensorBoard shows them beside the curves."""


class StepMetrics(Observer):
    """Adds up micro-batches into optimizer steps and steps into curves.

    Losses stay on their device until a step is logged: no micro-batch waits for the GPU.

    log: takes the values of a step by their tags, and the step, on every process
    log_every_n_steps: besides the first and the last one   rollbacks: how often the run went back from a spike; None
    where it is not guarded   plans: whether to hold the first GPU's peak memory against its plan
    text: what identifies the text   tokens_per_byte: of its validation part; None draws no bits per byte
    """

    def __init__(
        self,
        log: Callable[[dict[str, float], int], None],
        log_every_n_steps: int,
        rollbacks: Callable[[], int] | None = None,
        plans: bool = True,
        text: str | None = None,
        tokens_per_byte: float | None = None,
        clock: Callable[[], float] = awake_s,
    ) -> None:
        self.tokens = 0
        """Tokens trained on since the run began, over all processes and all resumes."""
        self.earlier_s = 0.0
        """Trained by earlier processes of the run, which this one goes on with."""
        self.logged_loss: float | None = None
        """Mean loss of the step that was logged last, over its whole window and all processes."""
        self.tokens_per_s: float | None = None
        """Over the steps between the last two that were logged, without validation, sampling, saving and sleep."""
        self.validations = ValidationRecord(text)
        self.of_answers = False
        """True where the losses are of answers in conversations."""
        self._tokens_per_byte = tokens_per_byte
        self._log, self._every, self._rollbacks, self._plans = log, log_every_n_steps, rollbacks, plans
        self._window_loss: Tensor | None = None
        self._report = TokensReport()
        self._peak_watch: PeakWatch | None = None
        self._gpu_curves: Callable[[], dict[str, float]] = dict
        self._clock = clock
        self._began_s: float | None = None
        self._counting_since_s: float | None = None
        self._interval_tokens = self._interval_steps = 0
        self._interval_s = 0.0

    @property
    def step(self) -> int:
        """Optimizer steps of the run so far."""
        return self._training.step

    @property
    def trained_s(self) -> float:
        """Seconds of the whole run, over all its processes, with validation, sampling and saving, without sleep."""
        return self.earlier_s + (0.0 if self._began_s is None else self._clock() - self._began_s)

    def on_train_start(self, training: Training) -> None:
        self._training = training
        settings, device, gpt = training.settings, training.device, getattr(training.module, "gpt", None)
        self._share, self._processes, self._max_steps = (
            settings.accumulate_grad_batches,
            training.processes,
            settings.max_steps,
        )
        self.of_answers = isinstance(gpt, Network) and gpt.config.document_end is not None
        self._flops_per_token = gpt.flops_per_token(gpt.config.block_size) if isinstance(gpt, Network) else 0
        self._peak_flops = peak_flops_of(device, settings.precision, training.processes)
        if device.type == "cuda":
            from nanogpt_lit.runtime.gpus import GpuHealth  # late, as is the plan: a run on a CPU has neither

            self._gpu_curves = GpuHealth(device).curves
        if self._plans and device.type == "cuda" and training.rank == 0 and training.strategy is not None:
            self._peak_watch = peak_watch_of(training)
        self._start()

    def on_batch_end(self, loss: Tensor, tokens: int) -> None:
        share = loss / self._share
        self._window_loss = share if self._window_loss is None else self._window_loss + share
        self.tokens += tokens * self._processes
        self._interval_tokens += tokens * self._processes
        if self._peak_watch is not None and not self._peak_watch.is_planned:
            with self.paused():
                self._peak_watch.plan(tokens)

    def on_step_end(self, step: int, lr: float, grad_norm: Tensor) -> None:
        window_loss, self._window_loss = self._window_loss, None
        self._interval_steps += 1
        if self._report.is_read:
            self._report.write(self.tokens)
        if self._peak_watch is not None:
            self._peak_watch.end_step()
        if step % self._every == 0 or step in (1, self._max_steps):
            assert window_loss is not None, "a step of no micro-batch"
            self._log_step(step, lr, grad_norm, window_loss)

    def _log_step(self, step: int, lr: float, grad_norm: Tensor, window_loss: Tensor) -> None:
        """Waits for the device. Where there are several processes, all come here together: the loss is theirs."""
        gpu_curves = self._gpu_curves()  # before the wait: the GPU is still at work
        self.logged_loss = float(mean_of_processes(window_loss))
        values = self.curves(loss=self.logged_loss, lr=lr, grad_norm=float(grad_norm))
        self._log(values | gpu_curves, step)

    def curves(self, *, loss: float, lr: float, grad_norm: float) -> dict[str, float]:
        """The values of a step that is logged, by their tags."""
        loss_scale = self._training.loss_scale()
        return {
            "train/loss": loss,
            "train/lr": lr,
            "train/grad_norm": grad_norm,
            "train/skipped_steps": float(getattr(self._training.schedule, "skipped_steps", 0)),
            "train/tokens": float(self.tokens),
            "throughput/trained_hours": self.trained_s / 3600,
            **({"train/rollbacks": float(self._rollbacks())} if self._rollbacks is not None else {}),
            **({"train/loss_scale": loss_scale} if loss_scale is not None else {}),
            **self._throughput(),
            **self._memory(),
        }

    def _throughput(self) -> dict[str, float]:
        values: dict[str, float] = {}
        self._pause()
        if self._interval_s > 0 and self._interval_tokens:
            self.tokens_per_s = self._interval_tokens / self._interval_s
            values["throughput/tokens_per_s"] = self.tokens_per_s
            if self._peak_watch is not None:
                self._peak_watch.compare_time(self._interval_s / self._interval_steps, self._interval_steps)
            if self._peak_flops is not None:
                values["throughput/mfu"] = self.tokens_per_s * self._flops_per_token / self._peak_flops
        self._interval_tokens, self._interval_steps, self._interval_s = 0, 0, 0.0
        self._start()
        return values

    def _memory(self) -> dict[str, float]:
        if self._training.device.type != "cuda":
            return {}
        allocated_mib, reserved_mib = peaks_mib(self._training.device)
        values = {"memory/peak_allocated_mib": allocated_mib, "memory/peak_reserved_mib": reserved_mib}
        if self._peak_watch is not None and self._peak_watch.planned_mib is not None:
            values["memory/planned_mib"] = self._peak_watch.planned_mib
            self._peak_watch.compare(allocated_mib, reserved_mib)
        return values

    def on_validation_start(self) -> None:
        self._pause()

    def on_validation_end(self, step: int, loss: Tensor) -> None:
        mean = float(loss)
        self.validations.add(step, mean)
        self._log(validation_curves(mean, self._tokens_per_byte), step)
        self._start()

    # The clock of tokens_per_s.

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of the block out of the speed of training."""
        self._pause()
        yield
        self._start()

    def _start(self) -> None:
        self._counting_since_s = self._clock()
        if self._began_s is None:
            self._began_s = self._counting_since_s

    def _pause(self) -> None:
        if self._counting_since_s is not None:
            self._interval_s += self._clock() - self._counting_since_s
            self._counting_since_s = None

    # What a checkpoint keeps.

    def state_dict(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "trained_s": self.trained_s, "validations": self.validations.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tokens, self.earlier_s = state["tokens"], state["trained_s"]
        self.validations.load_state_dict(state["validations"])


def validation_curves(loss: float, tokens_per_byte: float | None = None) -> dict[str, float]:
    """The values of a validation, by their tags."""
    values = {"val/loss": loss, "val/perplexity": perplexity(loss)}
    if tokens_per_byte is not None:
        values["val/bits_per_byte"] = bits_per_byte(loss, tokens_per_byte)
    return values


def peak_watch_of(training: Training) -> "PeakWatch":
    """A PeakWatch with what the loop knows of the step that it plans."""
    from nanogpt_lit.plan.peak_watch import PeakWatch  # late, for a run without a GPU plans nothing
    from nanogpt_lit.plan.step import StepShape

    settings = training.settings
    shape = partial(
        StepShape,
        accumulate_grad_batches=settings.accumulate_grad_batches,
        precision=settings.precision,
        clips=bool(settings.gradient_clip_val),
        zeroes_after_forward=training.zeroes_after_forward,
        validates=settings.val_check_interval is not None,
        strategy=training.strategy if training.processes > 1 and training.strategy is not None else "single",
        devices=training.processes,
        strategy_options=tuple(training.strategy_options.items()) if training.strategy == "ddp" else (),
    )
    return PeakWatch(training.module, training.optimizer, shape, say)


def say(line: str) -> None:
    """Print a line beside a progress bar, if there is one."""
    tqdm.write(line, file=sys.stderr)


def peaks_mib(device: torch.device) -> tuple[float, float]:
    """Peak MiB that PyTorch has allocated on a CUDA GPU, and that it has reserved there."""
    return torch.cuda.max_memory_allocated(device) / MIB, torch.cuda.max_memory_reserved(device) / MIB
