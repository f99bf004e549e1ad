"""The curves of a run that is compared: counted as training counts them, kept in memory, and drawn in TensorBoard."""

import time
from pathlib import Path

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from nanogpt_lit.loops.contract import LoopSettings, Parts
from nanogpt_lit.parity.record import Recorder
from nanogpt_lit.run.curves import StepMeter, perplexity

Curves = list[tuple[int, dict[str, float]]]
"""(optimizer step, tag to value)"""


class CurveRecorder(Recorder):
    """Keeps the curves beside everything else, and the time.

    The curves are of the first process, whose loss it is; tokens are those of all.
    """

    def __init__(self, settings: LoopSettings, processes: int) -> None:
        super().__init__()
        self.settings = settings
        self.processes = processes
        self.curves: Curves = []
        self.elapsed_s = 0.0
        self._meter = StepMeter()

    def on_train_start(self, parts: Parts) -> None:
        super().on_train_start(parts)
        self._meter.start()
        self._started_s = time.perf_counter()

    def on_batch_end(self, loss: Tensor, tokens: int) -> None:
        super().on_batch_end(loss, tokens)
        self._meter.add_batch(loss / self.settings.accumulate_grad_batches, tokens * self.processes)

    def on_step_end(self, step: int, lr: float, grad_norm: Tensor) -> None:
        batches = self._batch
        super().on_step_end(step, lr, grad_norm)
        self._meter.end_step()
        curves = self._meter.curves(
            lr=lr,
            grad_norm=grad_norm,
            loss_scale=self._parts.loss_scale(),
            skipped_steps=getattr(self._parts.schedule, "skipped_steps", 0),
            flops_per_token=0,
            peak_flops=None,
            device=next(self._parts.module.parameters()).device,
        )
        # Every loop divides by the whole accumulation; a window that the loader's end cuts short would seem to dip.
        curves["train/loss"] *= self.settings.accumulate_grad_batches / batches
        self.curves.append((step, curves))

    def on_validation_start(self) -> None:
        self._meter.pause()

    def on_validation_end(self, step: int, loss: Tensor) -> None:
        super().on_validation_end(step, loss)
        self.curves.append((step, {"val/loss": float(loss), "val/perplexity": perplexity(float(loss))}))
        self._meter.start()

    def on_train_end(self) -> None:
        self.elapsed_s = time.perf_counter() - self._started_s
        super().on_train_end()


def draw_in_tensorboard(curves: Curves, folder: Path) -> None:
    """Writes a run of TensorBoard, with the tags of training."""
    with SummaryWriter(str(folder)) as writer:
        for step, values in curves:
            for tag, value in values.items():
                writer.add_scalar(tag, value, step)


def points(curves: Curves, tag: str) -> list[tuple[int, float]]:
    return [(step, values[tag]) for step, values in curves if tag in values]
