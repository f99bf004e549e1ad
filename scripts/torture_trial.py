"""One run that scripts/torture.py disturbs, from its start to its end, and what has to be true of it all the way."""

import argparse
import inspect
import json
import logging
import os
import random
import re
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torture_process import Forked, Piece, Within
from torture_ranks import Failed, alive, start_all, wait, wait_for_training

from nanogpt_lit.checkpoint.newest import Newest, newest_checkpoint
from nanogpt_lit.checkpoint.run_file import SUFFIX, load_run, opened, verify_run
from nanogpt_lit.checkpoint.shards import FOLDER, sweep_shards
from nanogpt_lit.errors import UserError
from nanogpt_lit.loops.compatibility import keys_of
from nanogpt_lit.parity.record import leaves, same
from nanogpt_lit.runtime.durable import PARTIAL
from nanogpt_lit.tune.trials import RECIPES

STEPS, VALIDATES_EVERY = 64, 8
SIZES = ("n_layer=2", "n_head=2", "n_embd=32", "dropout=0.1")
MEASURED = ("throughput/", "memory/", "gpu/", "time/")
"""Curves of what the machine did: they differ between any two runs."""
STOPS = {name: code for name, code in (("INT", 130), ("TERM", 143), ("HUP", 129)) if hasattr(signal, f"SIG{name}")}
FULL_TO_THE_END, TWO_WRITERS, MOVED_CLOCK = "disk full to the end", "two writers", "moved clock"
FROM_WITHIN = {
    "killed at a call": "kill at call",
    "killed at a byte": "kill at byte",
    "disk full": "full disk",
    FULL_TO_THE_END: "full to the end",
}
GOES_ON = ("disk full", TWO_WRITERS)
"""The process goes on to the run's end."""
DAMAGES = ("truncated", "bit-flipped")
POSIX_ONLY = ("INT", "TERM", "HUP", "TERM, then KILL", "killed at a byte", "disk full", FULL_TO_THE_END)
"""Windows sends a process no signal, and has no limit on files."""
KINDS = [
    kind
    for kind in ("KILL", *STOPS, "TERM, then KILL", *FROM_WITHIN, *DAMAGES, TWO_WRITERS, MOVED_CLOCK)
    if os.name == "posix" or kind not in POSIX_ONLY
]


def left_out() -> str | None:
    return None if os.name == "posix" else f"{', '.join(POSIX_ONLY)}: left out, this system has no such thing"


@dataclass(frozen=True)
class Setup:
    precision: str
    accumulate: int
    nan_every: int
    """One micro-batch in so many has gradients that are NaN; 0 for none."""
    recipe: str
    strategy: str = "ddp"
    """Of several processes."""

    def options(self, text: Path, root: Path, processes: int) -> list[str]:
        return [
            f"--trainer.default_root_dir={root}", "--trainer.accelerator=cpu", f"--trainer.max_steps={STEPS}",
            f"--trainer.precision={self.precision}", f"--trainer.accumulate_grad_batches={self.accumulate}",
            f"--trainer.val_check_interval={VALIDATES_EVERY * self.accumulate}", "--trainer.limit_val_batches=2",
            "--trainer.log_every_n_steps=1", "--trainer.enable_progress_bar=false",
            "--trainer.callbacks=nanogpt_lit.loops.lightning.TextSamples", "--trainer.callbacks.tokens=2",
            *(f"--model.{section}.{size}" for section in ("gpt", "llama") for size in SIZES),
            "--model.schedule.warmup_steps=4", f"--data.source={text}", "--data.tokenizer=byte",
            "--data.block_size=32", "--data.batch_size=4", "--data.val_fraction=0.1",
            "--resume=auto",
            *recipe_options(self.recipe),
            *([f"--trainer.strategy={self.strategy}", f"--trainer.devices={processes}"] if processes > 1 else []),
        ]  # fmt: skip


def recipe_options(recipe: str) -> list[str]:
    options = keys_of("model", RECIPES[recipe])
    return [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in options.items()]


@dataclass(frozen=True)
class Reference:
    """The run that nobody disturbed."""

    text: Path
    state: dict[str, Any]
    curves: list[tuple[str, int, str]]
    size: int
    """Of a checkpoint's largest file, in bytes."""
    training_s: float


@dataclass
class Result:
    number: int
    setup: str
    temporary: str
    pieces: list[dict[str, Any]] = field(default_factory=list)
    failure: str | None = None


def reference(setup: Setup, root: Path, processes: int, fresh: bool) -> Reference:
    """Trained by fit. Raises Failed where that goes wrong, or has nothing to compare."""
    folder = root / f"undisturbed_{setup.recipe}_{setup.precision}_{setup.nan_every}"
    folder.mkdir()
    text = root / "text.txt"
    text.write_text(inspect.getsource(argparse), encoding="utf-8")
    output = folder / "output"
    piece = Piece("fit", setup.options(text, folder, processes), str(output), str(root), setup.nan_every)
    running = start_all(piece, processes, fresh)
    wait_for_training(running, output)
    started_s = time.monotonic()
    if any(wait(running)):
        raise Failed(f"the undisturbed run of {setup} ended with an error: {output.read_text()[-2000:]}")
    training_s = time.monotonic() - started_s
    newest = newest_checkpoint(folder)
    assert newest is not None
    state, curves = final_state(newest.path), final_curves(newest.run_folder)
    if setup.nan_every and not 0 < state["schedule skipped_steps"] < STEPS:
        raise Failed(f"the undisturbed run of {setup} left out {state['schedule skipped_steps']} of {STEPS} steps")
    return Reference(text, state, curves, max(path.stat().st_size for path in files_of(newest.path)), training_s)


class Trial:
    def __init__(
        self, number: int, setup: Setup, disturbances: list[str], draw: random.Random, loop: str, processes: int
    ) -> None:
        self.number = number
        self.setup = setup
        self._disturbances = disturbances
        self._draw = draw
        self._loop = loop
        self._processes = processes
        self._groups: list[int] = []
        self._points_left_out = False
        """A full disk took no curves for a while: there may be fewer points, and no others."""

    def run(self, reference: Reference, folder: Path) -> Result:
        self._reference, self._folder = reference, folder
        folder.mkdir()
        shm = Path("/dev/shm")
        elsewhere = self.number % 2 == 0 and shm.is_dir() and shm.stat().st_dev != folder.stat().st_dev
        self._temporary = str(shm if elsewhere else folder)
        self.result = Result(self.number, str(self.setup), "another file system" if elsewhere else "the run's")
        try:
            for disturbance in self._disturbances:
                if self._at_end():
                    break
                self._disturb(disturbance)
            while not self._at_end():
                if len(self.result.pieces) > len(self._disturbances) + 3:
                    raise Failed("the run does not reach its end")
                self._disturb("none")
            self._compare()
        except (Failed, UserError) as failure:
            self.result.failure = str(failure)
        for group in self._groups:
            with suppress(OSError, AttributeError):
                os.killpg(group, signal.SIGKILL)
        return self.result

    def _at_end(self) -> bool:
        """Whether the last step is saved, by a process that ended in peace."""
        pieces = self.result.pieces
        newest = newest_checkpoint(self._folder) if pieces and pieces[-1]["exit"] == 0 else None
        return newest is not None and newest.step == STEPS

    # One process, from its start to its end.

    def _disturb(self, kind: str) -> None:
        before = newest_checkpoint(self._folder)
        loop = self._draw.choice(["fit", "accelerate"]) if self._loop == "both" else self._loop
        output = self._folder / f"output_{len(self.result.pieces)}"
        options = self.setup.options(self._reference.text, self._folder, self._processes)
        piece = Piece(loop, options, str(output), self._temporary, self.setup.nan_every, self._within(kind))
        running = start_all(piece, self._processes)
        self._groups += [process.pid for process in running]
        left = 1 - (before.step if before is not None else 0) / STEPS
        moment_s, refused = None, False
        if kind == TWO_WRITERS:
            refused, output = self._one_of_two(piece, running)
        elif kind not in (*FROM_WITHIN, "none"):
            moment_s = self._strike(kind, running, output, left)
        codes = [0] if kind == TWO_WRITERS else wait(running)
        said = read(output)
        full = kind in ("disk full", FULL_TO_THE_END)
        struck = refused or ("could not be saved at step" in said if full else bool(codes[0] or any(codes)))
        self.result.pieces.append(
            {"disturbance": kind, "loop": loop, "moment_s": moment_s, "exit": codes[0], "struck": struck}
        )
        self._check(kind, codes, said, before)
        if kind in DAMAGES and struck:
            self._damage(kind)
        if kind == MOVED_CLOCK:
            self._move_clock()

    def _one_of_two(self, piece: Piece, running: "list[Forked | subprocess.Popen[bytes]]") -> tuple[bool, Path]:
        """Starts the run a second time beside the first. Returns whether one was refused, and what the other said.

        Of two that start at the same moment either may be the writer, and the second may come when the first has ended.
        """
        while all(process.poll() is None for process in running) and not list(self._folder.glob(f"*/*/*{SUFFIX}")):
            time.sleep(0.01)  # before its first checkpoint, a run is not one that could be gone on with
        output = Path(f"{piece.output}_second")
        loop = self._draw.choice(["fit", "accelerate"])
        second = start_all(replace(piece, loop=loop, output=str(output)), self._processes)
        self._groups += [process.pid for process in second]
        outputs = [Path(piece.output), output]
        ends = [
            (wait(processes)[0], read(output)) for processes, output in zip((running, second), outputs, strict=True)
        ]
        refused = [code == 2 and "is being trained by process" in said for code, said in ends]
        for (code, said), one_refused in zip(ends, refused, strict=True):
            if code != 0 and not one_refused:
                raise Failed(f"two writers: one ended with {code}: {said[-2000:]}")
        if all(refused):
            raise Failed("two writers: each was refused because of the other")
        if not any(refused) and not any("the run is complete" in said for _, said in ends):
            raise Failed(f"two writers: both trained: {ends[1][1][-2000:]}")
        # Of two that found a run to go on with, the one that had nothing left to do says less.
        trained = max((k for k in (0, 1) if not refused[k]), key=lambda k: "\nrun: " in ends[k][1])
        return any(refused), outputs[trained]

    def _within(self, kind: str) -> Within | None:
        if kind == "killed at a call":
            # Of the 6 calls of a checkpoint, of up to two checkpoints after each validation.
            number, after = self._draw.randint(1, 60), self._draw.random() < 0.5
            return Within("kill at call", number, after=after, rank=self._any_writer())
        if kind in FROM_WITHIN:
            # The curves are a few dozen KiB: below that, they meet the full disk too.
            size = self._draw.choice(
                [self._draw.randint(2**12, 2**15), self._draw.randint(2**16, self._reference.size)]
            )
            number, writer = self._draw.randint(1, 8), self._any_writer()
            return Within(FROM_WITHIN[kind], number, size=size, rank=writer)  # type: ignore[arg-type]
        return None

    def _any_writer(self) -> int:
        """The rank of a process that writes checkpoints: under DDP the first, of shards each."""
        return 0 if self.setup.strategy == "ddp" else self._draw.randrange(self._processes)

    def _strike(
        self, kind: str, running: "list[Forked | subprocess.Popen[bytes]]", output: Path, left: float
    ) -> float | None:
        """At a random moment; seconds after training began, None where it was before. left: share of the run"""
        moment_s = None
        if self._draw.random() < 0.9:
            wait_for_training(running, output)
            moment_s = round(left * self._draw.uniform(0, self._reference.training_s), 3)
            time.sleep(moment_s)
        else:
            time.sleep(self._draw.uniform(0, 2))
        # Of several processes, one or all: a GPU that fails, or the power.
        chosen = running if self._draw.random() < 0.5 else [self._draw.choice(running)]
        for process in chosen:
            if process.poll() is None:
                with suppress(ProcessLookupError):
                    self._send(kind, process.pid)
        return moment_s

    def _send(self, kind: str, pid: int) -> None:
        if kind in ("INT", "HUP"):  # a terminal's, to all that it has started
            os.killpg(pid, getattr(signal, f"SIG{kind}"))
        elif kind.startswith("TERM"):
            os.kill(pid, signal.SIGTERM)
            if kind != "TERM":
                time.sleep(self._draw.uniform(0, 0.1))
                os.kill(pid, signal.SIGKILL)
        else:
            psutil.Process(pid).kill()

    def _check(self, kind: str, codes: list[int], said: str, before: Newest | None) -> None:
        """What has to be true after any process of the run."""
        after = newest_checkpoint(self._folder)
        code, step = codes[0], 0 if after is None else after.step
        self.result.pieces[-1]["step"] = step
        if before is not None and step < before.step:
            raise Failed(f"step {before.step} was saved, and after {kind} there is step {step}")
        if before is not None and "\nrun: " in said and f"going on from {before.path}, step {before.step}" not in said:
            raise Failed(f"after {before.path} of step {before.step} it went on from another: {said[:500]}")
        number = getattr(signal, f"SIG{kind}", None) if kind in STOPS else None
        if number is not None:
            # Before the first step and after the last, a signal does what it does to any process of Python. Its
            # companion may then end by an error.
            plain = (0, STOPS[kind], -number, *([1] if kind == "INT" else []))
            if code not in plain and self._processes == 1:
                raise Failed(f"SIG{kind} ended the process with {code}: {said[-2000:]}")
            if code == STOPS[kind]:
                stopped = re.search(r"after step (\d+); saved", said)
                if stopped is None or int(stopped[1]) != step:
                    raise Failed(f"SIG{kind}: {said[-500:]!r} but step {step} is saved")
        if kind == FULL_TO_THE_END and self.result.pieces[-1]["struck"]:
            self._check_told_honestly(code, said, after)
        elif kind in (*GOES_ON, FULL_TO_THE_END, "none") and code != 0:
            raise Failed(f"{kind}: the process ended with {code}: {said[-2000:]}")
        self._points_left_out |= "the curves cannot be written" in said
        if number is not None:  # Python reports by itself what reaches it while it exits
            said = said.partition("Exception ignored in")[0]
        if code in (0, 2, *STOPS.values()) and "Traceback" in said:
            raise Failed(f"{kind}: ended with {code}, and a traceback: {said[-2000:]}")

    def _check_told_honestly(self, code: int, said: str, after: Newest | None) -> None:
        """A run whose end the disk did not take."""
        if code != 2 or "could not be saved: the disk took nothing" not in said:
            raise Failed(f"the disk was full to the end, and the process ended with {code}: {said[-2000:]}")
        for path, step in re.findall(r"^(?:last|best) checkpoint +(\S+) \(step ([\d,]+)\)$", said, re.MULTILINE):
            if whole_step(Path(path)) != int(step.replace(",", "")):
                raise Failed(f"{path} was said to hold step {step}, and holds {whole_step(Path(path))}")
        named = re.findall(r"^(?:last|best) checkpoint +(\S+)", said, re.MULTILINE)
        if after is not None and not {str(after.path), str(after.path.with_stem("last"))} & set(named):
            raise Failed(f"the checkpoint that is there was not named: {said[-2000:]}")

    # What happens to its files between two processes.

    def _damage(self, kind: str) -> None:
        """Of the newest step, one or all of its files. Where none is left whole, the next start has to refuse."""
        newest = newest_checkpoint(self._folder)
        if newest is None:
            return
        files = {path: step for path in newest.path.parent.glob(f"*{SUFFIX}") if (step := whole_step(path)) is not None}
        damaged = [newest.path]
        if self._draw.random() < 0.5:
            damaged = [path for path, step in files.items() if step == newest.step]
        damaged = [self._draw.choice(files_of(path)) for path in damaged]
        whole = {path: (path.read_bytes(), path.stat()) for path in damaged}
        for path, (content, _) in whole.items():
            path.write_bytes(self._damaged(kind, content))
        if any(whole_step(path) is not None for path in files):
            return
        output = self._folder / f"refused_{len(self.result.pieces)}"
        options = self.setup.options(self._reference.text, self._folder, self._processes)
        (code, *_) = wait(start_all(Piece("fit", options, str(output), self._temporary), self._processes))
        if code != 2 or "resume=auto finds no whole checkpoint" not in output.read_text():
            raise Failed(
                f"no whole checkpoint was left and the process ended with {code}: {output.read_text()[-2000:]}"
            )
        for path, (content, stat) in whole.items():
            path.write_bytes(content)
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    def _move_clock(self) -> None:
        """Each checkpoint of the run gets another time of the last ten years: nothing may follow from it."""
        before = newest_checkpoint(self._folder)
        if before is None:
            return
        for path in before.path.parent.glob(f"*{SUFFIX}"):
            time_s = time.time() - self._draw.uniform(0, 10 * 365 * 86_400)
            os.utime(path, (time_s, time_s))
        after = newest_checkpoint(self._folder)
        if after is None or after.step != before.step:
            raise Failed(f"step {before.step} is saved, and by another clock {after}")

    def _damaged(self, kind: str, content: bytes) -> bytes:
        at = self._draw.randrange(len(content))
        if kind == "truncated":
            return content[:at]
        return content[:at] + bytes([content[at] ^ 1 << self._draw.randrange(8)]) + content[at + 1 :]

    # Its end.

    def _compare(self) -> None:
        newest = newest_checkpoint(self._folder)
        assert newest is not None
        state, curves = final_state(newest.path), final_curves(newest.run_folder)
        expected = self._reference
        different = [
            name for name in expected.state if name not in state or not same(state[name], expected.state[name])
        ]
        if different or state.keys() != expected.state.keys():
            raise Failed(f"{len(different)} parts of the state differ, the first {(different or ['by its name'])[0]}")
        if self._points_left_out:
            curves = sorted({*curves, *expected.curves})
        if curves != expected.curves:
            raise Failed(f"the curves differ: {sorted(set(curves) ^ set(expected.curves))[:4]}")
        if leftovers := list(newest.path.parent.glob(f"*{PARTIAL}")):
            raise Failed(f"{leftovers[0]} is left")
        before = sorted(newest.path.parent.glob(f"*{FOLDER}"))
        sweep_shards(newest.path.parent)
        if unnamed := [folder for folder in before if not folder.exists()]:
            raise Failed(f"{unnamed[0]} is left, and no checkpoint names it")
        deadline_s = time.monotonic() + 30  # a process of several may still be ending
        while left := [group for group in self._groups if alive(group)]:
            if time.monotonic() > deadline_s:
                raise Failed(f"a process of the ended run is left, in group {left[0]}")
            time.sleep(0.1)


def read(output: Path) -> str:
    return output.read_text(encoding="utf-8", errors="replace")


def files_of(checkpoint: Path) -> list[Path]:
    """A checkpoint's own file, and those of its shards."""
    with opened(checkpoint)[1] as stored:
        return stored.files


def whole_step(path: Path) -> int | None:
    """Of a checkpoint; None for one that was damaged before."""
    with suppress(ValueError):
        return verify_run(path)
    return None


def final_state(path: Path) -> dict[str, Any]:
    """All of a checkpoint, by name, but for what only one of the loops keeps, and how long it took."""
    return dict(leaves("", vars(replace(load_run(path), lightning=None, trained_s=0.0))))


def final_curves(run_folder: Path) -> list[tuple[str, int, str]]:
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it tells of the curves that were drawn again
    events = EventAccumulator(str(run_folder), size_guidance={"scalars": 0})
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if not tag.startswith(MEASURED)]
    # In hexadecimal: a norm that is not a number equals its like.
    return sorted((tag, event.step, event.value.hex()) for tag in tags for event in events.Scalars(tag))
