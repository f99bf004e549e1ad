"""Every quantity that a loop computes, recorded as it happens, and the first one in which two loops differ."""

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nanogpt_lit.loops.contract import LoopSettings, Observer, Training
from nanogpt_lit.run.metrics import StepMetrics
from nanogpt_lit.runtime.processes import whole

FINAL = "the end"
Curves = list[tuple[int, dict[str, float]]]
"""(optimizer step, tag to value)"""


@dataclass(frozen=True)
class Entry:
    when: str
    """ "step 3", or FINAL."""
    quantity: str
    value: Tensor | float | int | bool | str | None


@dataclass(frozen=True)
class Difference:
    when: str
    quantity: str
    size: float | None
    """Largest absolute difference; None where there is no number to take."""
    position: int = field(default=0, compare=False)
    """The entry's place, counted from the start of the run."""

    def __str__(self) -> str:
        return f"{self.when}: {self.quantity}" + (f" by {self.size:.1e}" if self.size is not None else "")


class Recorder(Observer):
    """Keep a copy of every quantity in the order in which they come about, and beside them the curves and the time.

    The curves are of the first process, whose loss it is; tokens are those of all.
    """

    def __init__(self, settings: LoopSettings) -> None:
        self.settings = settings
        self.entries: list[Entry] = []
        self.curves: Curves = []
        self.seconds_per_step = 0.0
        """The mean, validation included."""
        self._metrics = StepMetrics(self._keep_curves, log_every_n_steps=1, plans=False)
        self._step = self._batch = 0

    def _add(self, when: str, quantity: str, value: Any) -> None:
        kept = whole(value.detach()).cpu().clone() if isinstance(value, Tensor) else value
        self.entries.append(Entry(when, quantity, kept))

    def _keep_curves(self, values: dict[str, float], step: int) -> None:
        if "train/loss" in values:
            # Every loop divides by the whole accumulation; a window that the loader's end cuts short would seem to dip.
            values["train/loss"] *= self.settings.accumulate_grad_batches / self._batch
        self.curves.append((step, values))

    def on_train_start(self, training: Training) -> None:
        self._training = training
        self._metrics.on_train_start(training)
        self._started_s = time.perf_counter()

    def on_batch_end(self, loss: Tensor, tokens: int) -> None:
        self._batch += 1
        self._add(f"step {self._step + 1}", f"loss of micro-batch {self._batch}", loss)
        self._metrics.on_batch_end(loss, tokens)

    def on_step_end(self, step: int, lr: float, grad_norm: Tensor) -> None:
        scale = self._training.loss_scale()
        for quantity, value in (("gradient norm", grad_norm), ("learning rate", lr), ("loss scale", scale)):
            self._add(f"step {step}", quantity, value)
        self._metrics.on_step_end(step, lr, grad_norm)
        self._step, self._batch = step, 0

    def on_validation_start(self) -> None:
        self._metrics.on_validation_start()

    def on_validation_end(self, step: int, loss: Tensor) -> None:
        self._add(f"step {step}", "validation loss", loss)
        self._metrics.on_validation_end(step, loss)

    def on_train_end(self) -> None:
        self.seconds_per_step = (time.perf_counter() - self._started_s) / self.settings.max_steps
        training = self._training
        states: dict[str, Any] = {
            "parameter": dict(training.module.named_parameters()),
            "buffer": dict(training.module.named_buffers()),
            "optimizer": training.optimizer.state_dict(),
            "schedule": training.schedule.state_dict(),
            "scaler": None if training.scaler is None else training.scaler.state_dict(),
            "random state": torch.get_rng_state(),
        }
        for name, value in leaves("", states):
            self._add(FINAL, name, value)


def compare(first: Sequence[Entry], second: Sequence[Entry]) -> Difference | None:
    """The first entry of `first` that `second` has not bit for bit in the same place; None when all are the same."""
    for k, (a, b) in enumerate(itertools.zip_longest(first, second)):
        if a is None or b is None or (a.when, a.quantity) != (b.when, b.quantity):
            present, absent = (a, b) if a is not None else (b, a)
            other = "nothing" if absent is None else f"{absent.quantity} of {absent.when}"
            return Difference(present.when, f"{present.quantity} against {other}", None, k)
        if not same(a.value, b.value):
            return Difference(a.when, a.quantity, distance(a.value, b.value), k)
    return None


def earliest(differences: Sequence[Difference | None]) -> Difference | None:
    """The difference that came first, of those of several processes."""
    found = [difference for difference in differences if difference is not None]
    return min(found, key=lambda difference: difference.position, default=None)


def distance_of_weights(first: Sequence[Entry], second: Sequence[Entry]) -> float | None:
    """The largest difference between the parameters that two runs ended with; None when they are not the same ones."""
    of_both = [
        {e.quantity: e.value for e in entries if e.when == FINAL and e.quantity.startswith("parameter ")}
        for entries in (first, second)
    ]
    if of_both[0].keys() != of_both[1].keys():
        return None
    return max((distance(value, of_both[1][name]) or 0.0 for name, value in of_both[0].items()), default=None)


def same(first: Any, second: Any) -> bool:
    """The same type, shape and bits. Bits rather than values: a norm that overflowed to NaN equals its like."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        if first.dtype != second.dtype or first.shape != second.shape:
            return False
        return torch.equal(*(value.contiguous().flatten().view(torch.uint8) for value in (first, second)))
    return type(first) is type(second) and first == second


def distance(first: Any, second: Any) -> float | None:
    numbers = (Tensor, int, float)
    if not (isinstance(first, numbers) and isinstance(second, numbers)):
        return None
    a, b = torch.as_tensor(first).double(), torch.as_tensor(second).double()
    if a.shape != b.shape or a.numel() == 0:
        return None
    return float((a - b).abs().max())


def leaves(name: str, state: Any) -> Iterator[tuple[str, Any]]:
    """Yield (path, value) of all that a nested state holds."""
    if isinstance(state, Mapping):
        for key, value in state.items():
            yield from leaves(f"{name} {key}".strip(), value)
    elif isinstance(state, (list, tuple)):
        for index, value in enumerate(state):
            yield from leaves(f"{name} {index}", value)
    else:
        yield name, state
