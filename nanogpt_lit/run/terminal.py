"""The lines of a run in a terminal, the same from every loop: opening lines, one of progress, a table at the end."""

import sys
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import torch
from torch import Tensor
from tqdm import tqdm

from nanogpt_lit.checkpoint.run_file import SUFFIX, step_of
from nanogpt_lit.checkpoint.state import perplexity
from nanogpt_lit.gpt.network import Network
from nanogpt_lit.loops.contract import Observer, Training
from nanogpt_lit.run.metrics import StepMetrics
from nanogpt_lit.runtime.clock import Sleeps, awake_s
from nanogpt_lit.runtime.launch import as_typed
from nanogpt_lit.runtime.machine import device_name
from nanogpt_lit.runtime.process_settings import Deterministic, repeatability

if TYPE_CHECKING:
    from nanogpt_lit.run.observers import RunObservers


def opening_lines(
    *,
    gpt: Network,
    precision: str,
    processes: int,
    device: torch.device,
    accumulate_grad_batches: int,
    batch_size: int,
    run_folder: str,
    seed: int | None,
    deterministic: Deterministic,
) -> str:
    """Describe what will run: the network, the size of a step, where it is kept, and whether it can be repeated."""
    batches_per_step, T = accumulate_grad_batches * processes, gpt.config.block_size
    tokens_per_step = batches_per_step * batch_size * T
    return (
        f"network: {gpt.parameter_count(non_embedding=False):,} parameters, {precision} on "
        f"{processes} x {device_name(device)}\n"
        f"step: {batches_per_step} x {batch_size} x {T} = {tokens_per_step:,} tokens\n"
        f"run: {run_folder}, seed {seed}\n"
        f"repeatable: {repeatability(device, processes, deterministic)}"
    )


def closing_table(run: "RunObservers", folder: Path, checkpoints: Mapping[str, Path] | None = None) -> str:
    """Steps, tokens, time, losses, a sample, and where everything is.

    checkpoints: in place of the run's own, what each is and its file; those that are not there are left out
    """
    metrics, validations = run.metrics, run.metrics.validations
    time = str(timedelta(seconds=round(run.elapsed_s)))
    if metrics.earlier_s:
        time += f", {timedelta(seconds=round(metrics.trained_s))} with earlier starts"
    if checkpoints is None:
        checkpoints = run.checkpoints.files() if run.checkpoints is not None else {}
    rows = [
        ("steps", f"{metrics.step:,}"),
        ("tokens", f"{metrics.tokens:,}"),
        ("time", time),
    ]
    if validations.latest is not None and validations.best is not None:
        loss = validations.latest[1]
        rows.append(("validation loss", f"{loss:.4f}, perplexity {perplexity(loss):.2f}"))
        best_step, best = validations.best
        rows.append(("best", f"{best:.4f} at step {best_step:,}"))
    if run.early_stopping is not None and run.early_stopping.has_ended:
        rows.append(("ended early", run.early_stopping.sentence()))
    files = {name: Path(relative_to_here(path)) for name, path in checkpoints.items() if path.exists()}
    rows += [(f"{name} checkpoint", f"{path}{held_step(path)}") for name, path in files.items()]
    rows.append(("curves", as_typed(["tensorboard", "--logdir", str(Path(relative_to_here(folder)).parent)])))
    for path in list(files.values())[:1]:
        if path.is_file() or is_sharded(path):  # of a folder of another kind no command can write
            name, chat = ("talk with it", ["--chat"]) if metrics.of_answers else ("write more", [])
            rows.append((name, as_typed(["python", "-m", "nanogpt_lit", "generate", *chat, "--ckpt", str(path)])))
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    if run.samples is not None and run.samples.latest is not None:
        from nanogpt_lit.gpt.generate import printable  # late, as where samples are written

        lines = ["", *("  | " + line for line in printable(run.samples.latest).splitlines()), "", *lines]
    return "\n".join(lines)


def is_sharded(folder: Path) -> bool:
    from nanogpt_lit.checkpoint import lightning_format  # late, for most checkpoints are files

    return lightning_format.is_sharded(folder)


def held_step(checkpoint: Path) -> str:
    """The step that a file itself names: the disk may not have taken a later one."""
    if checkpoint.suffix != SUFFIX:
        return ""
    try:
        return f" (step {step_of(checkpoint):,})"
    except (ValueError, OSError):
        return " (damaged)"


def relative_to_here(path: Path) -> str:
    """The path as a user would type it: relative when it is below the current folder."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


# While it goes.

LINE_EVERY_S = 10.0
BAR_EVERY_S = 0.1
CALENDAR_S = 10 * 365.25 * 24 * 3600
"""Beyond ten years no date is shown; datetime ends at the year 9999."""


class ProgressLine(Observer):
    """Observer that shows the progress of a run on its first process. began_s: as Progress has it"""

    def __init__(self, metrics: StepMetrics, began_s: float | None = None) -> None:
        self._metrics = metrics
        self._began_s = began_s
        self._progress: Progress | None = None
        self._clock = awake_s

    def on_train_start(self, training: Training) -> None:
        if training.rank == 0:
            self._progress = Progress(training.settings.max_steps, training.step, began_s=self._began_s)

    def on_step_end(self, step: int, lr: float, grad_norm: Tensor) -> None:
        progress = self._progress
        if progress is not None and (self._clock() >= progress.due_s or step == progress.total_steps):
            progress.update(step, self._metrics.logged_loss, self._metrics.tokens_per_s)

    def on_validation_end(self, step: int, loss: Tensor) -> None:
        if self._progress is not None:
            self._progress.say(self._metrics.validations.sentence())

    def on_exit(self) -> None:
        if self._progress is not None:
            self._progress.close()


class Progress:
    """Progress over optimizer steps: a live bar on a terminal, a plain line every ten seconds elsewhere (a log file).

    The time of arrival counts everything since the first finished step, validation and saving included, because
    those will come again. The first step is left out, because compiling and warming up will not, and so is what the
    machine slept; how long the user has waited for it, compiling and all, is said once.

    began_s: on the clock, when that wait began; None takes this moment
    """

    def __init__(
        self,
        total_steps: int,
        first_step: int = 0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = awake_s,
        sleeps: Sleeps | None = None,
        began_s: float | None = None,
    ) -> None:
        self.total_steps = total_steps
        self._stream = stream or sys.stderr
        self._clock = clock
        self._sleeps = sleeps or Sleeps()
        self._anchor: tuple[int, float] | None = None  # (step, time) that the rate is counted from
        self.due_s = clock()
        """Time from which there is something to show again; the last step is always shown."""
        self._began_s = self.due_s if began_s is None else began_s
        self._line_s = self.due_s + LINE_EVERY_S
        self._live = self._stream.isatty()
        self._bar = tqdm(
            total=total_steps,
            initial=first_step,
            file=self._stream,
            disable=not self._live,
            dynamic_ncols=True,
            bar_format="step {n_fmt}/{total_fmt}",
        )

    def update(self, step: int, loss: float | None, tokens_per_s: float | None) -> None:
        """step: optimizer steps done so far. loss and tokens_per_s: the last ones known."""
        if (slept_s := self._sleeps.since_last_s()) > 0:
            slept = timedelta(seconds=round(slept_s))
            self.say(f"this machine slept for {slept}, which counts in neither tokens/s nor the time of arrival")
        now_s = self._clock()
        if self._anchor is None:
            self._anchor = (step, now_s)
            self.say(f"first step after {now_s - self._began_s:.1f} s")
        at = f"step {step}/{self.total_steps}"
        said_loss = "" if loss is None else f"loss {loss:.3f}"
        speed = "" if tokens_per_s is None else f"{tokens_per_s:,.0f} tokens/s"
        remaining_s = self.remaining_s(step, now_s)
        left = "" if remaining_s is None else arrival(remaining_s, datetime.now())
        if self._live:
            self.due_s = now_s + BAR_EVERY_S
            columns = self._bar.format_dict["ncols"] or 80
            bar, line = live_line(columns, f"{at} {step / self.total_steps:4.0%}", said_loss, speed, left)
            self._bar.bar_format = line.replace("%", f"% {{bar:{bar}}}", 1) if bar else line
            self._bar.update(step - self._bar.n)
            return
        if now_s >= self._line_s or step == self.total_steps:
            self._line_s = now_s + LINE_EVERY_S
            self.say("  ".join(part for part in (at, said_loss, speed, left) if part))
        self.due_s = self._line_s

    def remaining_s(self, step: int, now_s: float) -> float | None:
        """Seconds until the last step at the average pace so far; None before a second step has been seen."""
        if self._anchor is None or step <= self._anchor[0]:
            return None
        first_step, first_s = self._anchor
        return (self.total_steps - step) * (now_s - first_s) / (step - first_step)

    def say(self, line: str) -> None:
        """Prints a line without tearing the bar."""
        if self._live:
            self._bar.write(line, file=self._stream)
        else:
            print(line, file=self._stream, flush=True)

    def close(self) -> None:
        self._bar.close()


def live_line(columns: int, at: str, loss: str, speed: str, left: str) -> tuple[int, str]:
    """(columns of a bar behind `at`, the line without it), for a terminal of so many columns.

    A narrow one loses the speed, then the time of arrival and the loss, never the time left; a bar takes what is free.
    """
    for parts in ((loss, speed, left), (loss, left), (loss, left.partition(",")[0]), (left.partition(",")[0],)):
        line = "  ".join(part for part in (at, *parts) if part)
        if len(line) <= columns:
            break
    room = columns - len(line) - 1
    return (min(room, 20) if room >= 5 else 0), line


def arrival(remaining_s: float, now: datetime) -> str:
    """ "2:05 left, done 14:30"; beyond a day "3 d 4 h left, done Fri 27 Nov 14:30"."""
    if remaining_s > CALENDAR_S:
        return "years left"
    done = now + timedelta(seconds=remaining_s)
    minutes, seconds = divmod(round(remaining_s), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        left = f"{days} d {hours} h"
    elif hours:
        left = f"{hours}:{minutes:02d}:{seconds:02d}"
    else:
        left = f"{minutes}:{seconds:02d}"
    day = "" if done.date() == now.date() else done.strftime("%a %d %b ")
    return f"{left} left, done {day}{done:%H:%M}"
