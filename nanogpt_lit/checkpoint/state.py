"""All that a run is made of between two optimizer steps: what a checkpoint keeps, whichever loop writes it."""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from nanogpt_lit.errors import UserError
from nanogpt_lit.runtime.process_settings import RandomState
from nanogpt_lit.runtime.processes import any_sharded


@dataclass(frozen=True)
class RunState:
    """Holds the run's own tensors, not copies: write it before the next step, or copy it."""

    weights: dict[str, Tensor]
    """module.state_dict()"""
    hyper_parameters: Mapping[str, Any]
    """Arguments that the module is made from: LitNanoGPT's gpt, optim, schedule, compile."""
    data: Mapping[str, Any]
    """The tokenizer's files, and what the order of samples is a function of (TokenDataModule.state_dict)."""
    optimizer: dict[str, Any]
    schedule: dict[str, Any]
    scaler: dict[str, Any] | None
    """GradScaler's; None unless gradients are scaled."""
    random: list[RandomState]
    """One per process, in the order of their ranks; empty where it was not kept."""
    step: int
    """Optimizer steps so far, skipped ones too."""
    batches: int
    """Micro-batches so far, of one process."""
    processes: int
    accumulate_grad_batches: int
    tokens: int = 0
    """Trained on so far, by all processes and since the run's first start."""
    trained_s: float = 0.0
    """Seconds of training since the run's first start, without what the machine slept."""
    validations: Mapping[str, Any] = field(default_factory=lambda: {"latest": None, "best": None})
    """(step, loss) of the latest and of the best validation."""
    elastic: Mapping[str, Any] = field(default_factory=dict)
    """Micro-batches that did not fit, and how the run went on: see memory/elastic.py. Empty while everything fits."""
    spikes: Mapping[str, Any] = field(default_factory=dict)
    """The recent losses that a jump is measured by: see run/guards.py. Empty unless it is guarded against."""
    lightning: Mapping[str, Any] | None = None
    """The rest of Lightning's checkpoint: its callbacks' states and its counters. None from the other loops."""

    @property
    def is_sharded(self) -> bool:
        """True where each process holds a part of the weights or of the optimizer's state, and all save it together."""
        moments = (tensor for kept in self.optimizer.get("state", {}).values() for tensor in kept.values())
        return any_sharded(itertools.chain(self.weights.values(), moments))

    def batches_on(self, processes: int, accumulate_grad_batches: int, dropout: float) -> int:
        """Micro-batches of each of `processes` processes that go on with the sample that follows.

        Raises UserError where the samples of a step, or the masks of dropout, would be others than without the stop.
        """
        if (processes, accumulate_grad_batches) == (self.processes, self.accumulate_grad_batches):
            return self.batches
        batches, inside_a_step = divmod(self.batches * self.processes, processes)
        if processes != self.processes:
            if dropout > 0:
                raise UserError(
                    f"the checkpoint was trained by {self.processes} processes, each with dropout masks of its own, "
                    f"and cannot go on by {processes} with dropout={dropout}; start {self.processes}, or set the "
                    "dropout of the network to 0: model.llama.dropout=0, or model.gpt.dropout=0 of GPT-2."
                )
            then = f"{self.processes} x trainer.accumulate_grad_batches={self.accumulate_grad_batches}"
            per_step = self.processes * self.accumulate_grad_batches
            if processes * accumulate_grad_batches != per_step:
                works = f"trainer.accumulate_grad_batches={per_step // processes} does here"
                if per_step % processes:
                    works = f"a number of processes that divides {per_step} can"
                raise UserError(
                    f"the checkpoint was trained by {then} micro-batches a step and cannot go on by {processes} x "
                    f"trainer.accumulate_grad_batches={accumulate_grad_batches}, whose steps have other samples; "
                    f"{works}."
                )
        if inside_a_step or batches % accumulate_grad_batches:
            divisors = [n for n in range(1, batches + 1) if batches % n == 0]
            nearest = min(divisors, key=lambda n: (abs(n - accumulate_grad_batches), n))
            raise UserError(
                f"the checkpoint stands after {batches} micro-batches, which trainer.accumulate_grad_batches="
                f"{accumulate_grad_batches} cuts inside a step; {nearest} does not."
            )
        return batches


@dataclass(frozen=True, kw_only=True)
class UnreadRun(RunState):
    """A run whose weights and moments are still in its checkpoint: a sharded network reads its part of them
    (sharded_network.py)."""

    path: Path


# The validation losses so far, and what a loss says in other units.


class ValidationRecord:
    """The validation losses of a run: the latest and the best, each with its step.

    text: what identifies the text that they are measured on; None compares with any
    """

    def __init__(self, text: str | None = None) -> None:
        self.text = text
        self.latest: tuple[int, float] | None = None
        """(step, mean loss in nats per token)"""
        self.best: tuple[int, float] | None = None
        self.since_best = 0
        """Validations."""

    def add(self, step: int, loss: float) -> None:
        self.latest = (step, loss)
        self.since_best += 1
        if self.best is None or loss < self.best[1]:
            self.best, self.since_best = self.latest, 0

    def sentence(self) -> str:
        assert self.latest is not None, "sentence() before the first validation"
        assert self.best is not None
        step, loss = self.latest
        best = "the best so far" if self.best[0] == step else f"best {self.best[1]:.4f} at step {self.best[0]}"
        return f"step {step}  validation loss {loss:.4f}  perplexity {perplexity(loss):.2f}  ({best})"

    def state_dict(self) -> dict[str, Any]:
        return {"latest": self.latest, "best": self.best, "since_best": self.since_best, "text": self.text}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Losses on another text are no measure of those to come: they begin anew."""
        if self.text is None or state.get("text") in (None, self.text):
            self.latest, self.best = state["latest"], state["best"]
            self.since_best = state.get("since_best", 0)


def perplexity(loss: float) -> float:
    """exp of a mean loss in nats per token; infinite where that overflows, as it may in a run that has blown up."""
    return math.exp(loss) if loss < 700 else math.inf


def bits_per_byte(loss: float, tokens_per_byte: float) -> float:
    """loss: mean in nats per token   tokens_per_byte: of the text

    As `eval` measures it, but that end-of-text counts here as a token like any other.
    """
    return loss / math.log(2) * tokens_per_byte
