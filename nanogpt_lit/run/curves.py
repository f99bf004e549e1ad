"""The numbers behind the curves, counted alike by every loop."""

import math
import sys
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from nanogpt_lit.plan.peak_watch import PeakWatch
from nanogpt_lit.plan.step import StepShape
from nanogpt_lit.runtime.clock import awake_s
from nanogpt_lit.runtime.gpu_health import GpuHealth
from nanogpt_lit.runtime.processes import mean_of_processes
from nanogpt_lit.runtime.supervised import Position

MIB = 2**20


class StepMeter:
    """Adds up micro-batches into optimizer steps and steps into curves.

    A loop calls `add_batch` after each micro-batch, `end_step` after each optimizer step, and `curves` when it
    wants the numbers. Losses stay on their device until then: no micro-batch waits for the card.
    """

    def __init__(self, clock: Callable[[], float] = awake_s) -> None:
        self.tokens = 0
        """Tokens trained on since the run began, over all processes and all resumes."""
        self.earlier_s = 0.0
        """Trained by the pieces of the run before this one."""
        self.loss: Tensor | None = None
        """Mean loss of this process's share of the last whole accumulation window, a scalar on the training device."""
        self.tokens_per_s: float | None = None
        """Over the steps between the last two calls of `curves`, without validation, sampling and sleep."""
        self.drawn_loss: float | None = None
        """The loss that `curves` read last: reading it again costs no wait."""
        self.went_back: Callable[[], int] | None = None
        """How often the run went back from a spike; None where it is not guarded."""
        self._peak_watch: PeakWatch | None = None
        self._window_loss: Tensor | None = None
        self._position = Position()
        self._card_health: GpuHealth | None = None
        self._clock = clock
        self._began_s: float | None = None
        self._counting_since_s: float | None = None
        self._interval_tokens = self._interval_steps = 0
        self._interval_s = 0.0

    def watch_peak(
        self, module: nn.Module, optimizer: Optimizer, device: torch.device, processes: int, **shape: Any
    ) -> None:
        """Has peak and time of a run on one card planned at its first micro-batch, and told beside the measured ones.

        shape: what the loop knows of memory.step.StepShape. What several processes exchange and shard is in no plan.
        """
        if device.type == "cuda" and processes == 1:
            self._peak_watch = PeakWatch(module, optimizer, partial(StepShape, **shape), say)

    @property
    def trained_s(self) -> float:
        """Seconds of the whole run, all its pieces, with validation, sampling and saving, without sleep."""
        return self.earlier_s + (0.0 if self._began_s is None else self._clock() - self._began_s)

    def start(self) -> None:
        """The clock of tokens_per_s runs from here until `pause`."""
        self._counting_since_s = self._clock()
        if self._began_s is None:
            self._began_s = self._counting_since_s

    def pause(self) -> None:
        if self._counting_since_s is not None:
            self._interval_s += self._clock() - self._counting_since_s
            self._counting_since_s = None

    def add_batch(self, loss_share: Tensor, tokens: int) -> None:
        """loss_share: the micro-batch's mean loss divided by the accumulation; tokens: of all processes together."""
        share = loss_share.detach()
        self._window_loss = share if self._window_loss is None else self._window_loss + share
        self.tokens += tokens
        self._interval_tokens += tokens
        if self._peak_watch is not None and not self._peak_watch.is_planned:
            self.pause()
            self._peak_watch.plan(tokens)
            self.start()

    def end_step(self) -> None:
        self.loss, self._window_loss = self._window_loss, None
        self._interval_steps += 1
        self._position.write(self.tokens)
        if self._peak_watch is not None:
            self._peak_watch.end_step()

    def share_loss(self) -> Tensor:
        """The loss of the last window, as the mean over all processes."""
        assert self.loss is not None, "share_loss() before the first end_step()"
        return mean_of_processes(self.loss)

    def curves(
        self,
        *,
        lr: float,
        grad_norm: Tensor | float,
        loss_scale: float | None,
        skipped_steps: int,
        flops_per_token: float,
        peak_flops: float | None,
        device: torch.device,
    ) -> dict[str, float]:
        """The tags of one step. Reads the loss from the device, so the card is waited for here. Where there are several
        processes, all call it at the same steps, or `share_loss` in its place: the loss is the mean of theirs.

        lr: the rate that the step was taken with   grad_norm: before clipping
        flops_per_token: forward and backward   peak_flops: of all processes' devices together, None when unknown
        loss_scale: GradScaler's, None without one
        """
        if self._card_health is None:
            self._card_health = GpuHealth(device)
        gpu_health = self._card_health.curves()  # before the wait: the card is still at work
        self.drawn_loss = float(self.share_loss())
        values = {
            "train/loss": self.drawn_loss,
            "train/lr": lr,
            "train/grad_norm": float(grad_norm),
            "train/skipped_steps": float(skipped_steps),
            "train/tokens": float(self.tokens),
            "throughput/trained_hours": self.trained_s / 3600,
            **gpu_health,
        }
        if self.went_back is not None:
            values["train/rollbacks"] = float(self.went_back())
        if loss_scale is not None:
            values["train/loss_scale"] = loss_scale
        self.pause()
        if self._interval_s > 0 and self._interval_tokens:
            self.tokens_per_s = self._interval_tokens / self._interval_s
            values["throughput/tokens_per_s"] = self.tokens_per_s
            if self._peak_watch is not None:
                self._peak_watch.compare_time(self._interval_s / self._interval_steps, self._interval_steps)
            if peak_flops is not None:
                values["throughput/mfu"] = self.tokens_per_s * flops_per_token / peak_flops
        self._interval_tokens, self._interval_steps, self._interval_s = 0, 0, 0.0
        self.start()
        if device.type == "cuda":
            allocated_mib, reserved_mib = peaks_mib(device)
            values["memory/peak_allocated_mib"] = allocated_mib
            values["memory/peak_reserved_mib"] = reserved_mib
            if self._peak_watch is not None and self._peak_watch.planned_mib is not None:
                values["memory/planned_mib"] = self._peak_watch.planned_mib
                self._peak_watch.compare(allocated_mib, reserved_mib)
        return values


def say(line: str) -> None:
    """Beside a progress bar, if there is one."""
    tqdm.write(line, file=sys.stderr)


def peaks_mib(device: torch.device) -> tuple[float, float]:
    """Of the memory that PyTorch has allocated on a CUDA card, and of what it has reserved there."""
    return torch.cuda.max_memory_allocated(device) / MIB, torch.cuda.max_memory_reserved(device) / MIB


class ValidationRecord:
    """The validation losses of a run: the latest and the best, each with its step."""

    def __init__(self) -> None:
        self.latest: tuple[int, float] | None = None
        """(step, mean loss in nats per token)"""
        self.best: tuple[int, float] | None = None

    def add(self, step: int, loss: float) -> None:
        self.latest = (step, loss)
        if self.best is None or loss < self.best[1]:
            self.best = self.latest

    def sentence(self) -> str:
        assert self.latest is not None, "sentence() before the first validation"
        assert self.best is not None
        step, loss = self.latest
        best = "the best so far" if self.best[0] == step else f"best {self.best[1]:.4f} at step {self.best[0]}"
        return f"step {step}  validation loss {loss:.4f}  perplexity {perplexity(loss):.2f}  ({best})"

    def state_dict(self) -> dict[str, Any]:
        return {"latest": self.latest, "best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.latest, self.best = state["latest"], state["best"]


def is_drawn(step: int, log_every_n_steps: int, last_step: int) -> bool:
    """Whether the curves have a point at an optimizer step: at every n-th, and at both ends."""
    return step % log_every_n_steps == 0 or step in (1, last_step)


def code_block(text: str) -> str:
    """For TensorBoard's TEXT tab, which reads Markdown: it then leaves line breaks and signs alone."""
    return "\n".join("    " + line for line in text.splitlines())


def perplexity(loss: float) -> float:
    """exp of a mean loss in nats per token; infinite where that overflows, as it may in a run that has blown up."""
    return math.exp(loss) if loss < 700 else math.inf


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The norm that clip_grad_norm_ would report, without clipping."""
    return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
