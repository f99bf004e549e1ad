"""What a run shows while a loop other than Lightning's drives it: the same curves, samples, progress line and files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanogpt_lit.checkpoint.disk import PatientSaver
from nanogpt_lit.checkpoint.run_file import SUFFIX
from nanogpt_lit.checkpoint.state import RunState
from nanogpt_lit.gpt.model import GPT
from nanogpt_lit.loops.contract import LoopSettings, Observer, Parts
from nanogpt_lit.run.curves import StepMeter, ValidationRecord, code_block, is_drawn, perplexity, say
from nanogpt_lit.run.patient_writer import PatientWriter
from nanogpt_lit.run.pieces import tidied
from nanogpt_lit.run.progress import Progress
from nanogpt_lit.run.resume import capture, random_states
from nanogpt_lit.run.save_times import SaveTimes
from nanogpt_lit.run.spikes import SpikeGuard
from nanogpt_lit.runtime.machine import peak_flops_of


class Journal(Observer):
    """Keeps a run's folder: TensorBoard curves over optimizer steps, text samples, the checkpoints best and last.

    processes: whose tokens and floating-point operations are counted   device: of this one
    write_sample: a text by the network as it is
    data_state: what a checkpoint keeps of the data; None saves none   start: the checkpoint that the run goes on from
    Where there are several processes, each of the others observes as an OtherProcess.
    spikes: the loop's, if it has one   save_times: by default every 15 minutes
    """

    def __init__(
        self,
        folder: Path,
        settings: LoopSettings,
        *,
        log_every_n_steps: int,
        processes: int,
        device: torch.device,
        show_progress: bool,
        write_sample: Callable[[], str],
        data_state: Callable[[], dict[str, Any]] | None,
        start: RunState | None = None,
        spikes: SpikeGuard | None = None,
        save_times: SaveTimes | None = None,
    ) -> None:
        self.folder = folder
        self.settings = settings
        self.log_every_n_steps = log_every_n_steps
        self.processes = processes
        self.device = device
        self.meter = StepMeter()
        self._spikes = spikes
        if spikes is not None:
            self.meter.went_back = lambda: spikes.went_back
        self.validations = ValidationRecord()
        self.step = 0
        self.batches = 0
        if start is not None:
            self.step = start.step
            self.batches = start.batches * start.processes // processes
            self.meter.tokens = start.tokens
            self.meter.earlier_s = start.trained_s
            self.validations.load_state_dict(dict(start.validations))
        self.sample: str | None = None
        for stray in tidied(folder, folder / "checkpoints"):
            say(stray)
        self._write_sample = write_sample
        self._data_state = data_state
        self.saver = PatientSaver()
        self._save_times = save_times or SaveTimes()
        self._saved_step: int | None = None
        self._progress = Progress(settings.max_steps, self.step) if show_progress else None
        # What the piece before this one drew past its checkpoint is drawn again: TensorBoard forgets it.
        purge_step = None if start is None else start.step + 1
        self._writer = PatientWriter(str(folder), purge_step=purge_step)

    def on_train_start(self, parts: Parts) -> None:
        self._parts = parts
        self.saver.in_background = True
        parts.optimizer.register_step_pre_hook(lambda *_: self.saver.let_go())
        gpt = parts.module.gpt
        assert isinstance(gpt, GPT)
        self._flops_per_token = gpt.flops_per_token(gpt.config.block_size)
        self._peak_flops = peak_flops_of(self.device, self.settings.precision, self.processes)
        self.meter.watch_peak(
            parts.module,
            parts.optimizer,
            self.device,
            self.processes,
            accumulate_grad_batches=self.settings.accumulate_grad_batches,
            precision=self.settings.precision,
            clips=bool(self.settings.gradient_clip_val),
            validates=self.settings.val_check_interval is not None,
        )
        self.meter.start()

    def on_batch_end(self, loss: Tensor, tokens: int) -> None:
        self.batches += 1
        self.meter.add_batch(loss / self.settings.accumulate_grad_batches, tokens * self.processes)

    def on_step_end(self, step: int, lr: float, grad_norm: Tensor) -> None:
        self.step = step
        self.meter.end_step()
        if is_drawn(step, self.log_every_n_steps, self.settings.max_steps):
            curves = self.meter.curves(
                lr=lr,
                grad_norm=grad_norm,
                loss_scale=self._parts.loss_scale(),
                skipped_steps=getattr(self._parts.schedule, "skipped_steps", 0),
                flops_per_token=self._flops_per_token,
                peak_flops=self._peak_flops,
                device=self.device,
            )
            self._draw(curves)
        if self._progress is not None:
            self._progress.update(step, self.meter.drawn_loss, self.meter.tokens_per_s)
        if self._data_state is None or self.settings.validates_after(self.batches, step):
            return  # a validation saves
        if self._save_times.due(step):
            self._save(self._data_state(), ["last"])

    def on_validation_start(self) -> None:
        self.meter.pause()

    def on_validation_end(self, step: int, loss: Tensor) -> None:
        self.validations.add(step, float(loss))
        self._draw({"val/loss": float(loss), "val/perplexity": perplexity(float(loss))})
        self.sample = self._write_sample()
        self.add_text("sample", self.sample)
        if self._progress is not None:
            self._progress.say(self.validations.sentence())
        if self._data_state is not None:
            is_best = self.validations.best == self.validations.latest
            self._save(self._data_state(), ["best", "last"] if is_best else ["last"])
        self.meter.start()

    def on_stop(self, step: int) -> None:
        if self._data_state is not None and self._saved_step != step:
            self._save(self._data_state(), ["last"])

    def on_train_end(self) -> None:
        self.on_stop(self.step)

    def close(self) -> None:
        self._writer.close()
        if self._progress is not None:
            self._progress.close()
        self.saver.wait()

    @property
    def checkpoints(self) -> dict[str, str]:
        """What each is ("best", "last") and its file, of those that are there."""
        self.saver.wait()
        found = {name: self._checkpoint(name) for name in ("best", "last")}
        return {name: str(path) for name, path in found.items() if path.exists()}

    def _checkpoint(self, name: str) -> Path:
        return self.folder / "checkpoints" / f"{name}{SUFFIX}"

    def add_text(self, tag: str, text: str) -> None:
        """Into the TEXT tab."""
        self._writer.add_text(tag, code_block(text), self.step)

    def _draw(self, values: dict[str, float]) -> None:
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, self.step)

    def _save(self, data_state: dict[str, Any], names: list[str]) -> None:
        self._writer.flush()  # or the curves of a run that is killed would end before its checkpoint
        state = capture(
            self._parts,
            step=self.step,
            batches=self.batches,
            accumulate_grad_batches=self.settings.accumulate_grad_batches,
            random=random_states(self.device),
            data=data_state,
            tokens=self.meter.tokens,
            trained_s=self.meter.trained_s,
            validations=self.validations.state_dict(),
            spikes=None if self._spikes is None else self._spikes.state_dict(),
        )
        for name in names:
            self.saver.save(self._checkpoint(name), state)
        self._saved_step = self.step
        self._save_times.saved()


class OtherProcess(Observer):
    """Observes on every process but the first, whose Journal asks them for their losses, and for a checkpoint for their
    random states and for what did not fit.

    saves: whether the Journal keeps checkpoints   save_times: with the Journal's values
    batches: micro-batches that each process has done when the run is gone on with
    """

    def __init__(
        self,
        settings: LoopSettings,
        *,
        log_every_n_steps: int,
        device: torch.device,
        saves: bool,
        batches: int = 0,
        save_times: SaveTimes | None = None,
    ) -> None:
        self.settings = settings
        self.batches = batches
        self._save_times = save_times or SaveTimes()
        self._step = 0
        self.log_every_n_steps = log_every_n_steps
        self.device = device
        self.saves = saves
        self.meter = StepMeter()
        self._saved_step: int | None = None

    def on_train_start(self, parts: Parts) -> None:
        self._module = parts.module

    def on_batch_end(self, loss: Tensor, tokens: int) -> None:
        self.batches += 1
        self.meter.add_batch(loss / self.settings.accumulate_grad_batches, tokens)

    def on_step_end(self, step: int, lr: float, grad_norm: Tensor) -> None:
        self._step = step
        self.meter.end_step()
        if is_drawn(step, self.log_every_n_steps, self.settings.max_steps):
            self.meter.share_loss()
        if self.saves and not self.settings.validates_after(self.batches, step) and self._save_times.due(step):
            self._share(step)

    def on_validation_end(self, step: int, loss: Tensor) -> None:
        self._share(step)

    def on_stop(self, step: int) -> None:
        if self._saved_step != step:
            self._share(step)

    def on_train_end(self) -> None:
        self.on_stop(self._step)

    def _share(self, step: int) -> None:
        if self.saves:
            random_states(self.device)
            self._saved_step = step
            self._save_times.saved()


def next_folder(root: Path, name: str) -> Path:
    """root/name_N with the first N that is free and above all that are there, as Lightning numbers its versions."""
    taken = [path.name.removeprefix(f"{name}_") for path in root.glob(f"{name}_*") if path.is_dir()]
    return root / f"{name}_{max((int(n) for n in taken if n.isdigit()), default=-1) + 1}"
