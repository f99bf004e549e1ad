"""A short `fit` on the fake GPU with arithmetic: what the tests of this folder change, disturb and compare."""

import contextlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from apart import FailedError, apart, command, curves_of, peaks
from safetensors.torch import load_file
from torch import Tensor

from nanogpt_lit.memory.techniques import MemoryConfig

CHUNKS = {"loss_chunk_tokens": 128}
PLACEMENTS: dict[str, dict[str, Any]] = {
    "all on the GPU": {},
    "loss in chunks": CHUNKS,
    "selective recompute": {**CHUNKS, "recompute": "selective", "recast_weights": True},
    "full recompute": {**CHUNKS, "recompute": "full"},
    "block inputs on the host": {**CHUNKS, "recompute": "full", "block_inputs": "host"},
    "optimizer on the host": {**CHUNKS, "optimizer_state": "host"},
    "weights on the host": {**CHUNKS, "recompute": "full", "block_inputs": "host", "weights": "host"},
    "weights streamed": {**CHUNKS, "recompute": "full", "block_inputs": "host", "weights": "streamed"},
}
STEPS = 2
ACCUMULATE = 2


@dataclass(frozen=True)
class Outcome:
    code: int
    said: str
    curves: dict[str, dict[int, float]]
    state: dict[str, Tensor]
    """Weights, optimizer and random numbers of the last checkpoint, in any loop; empty without one."""
    peaks: dict[str, Any]
    found: Any
    """What `before` found."""

    @property
    def error(self) -> str:
        """The sentence with which it ended."""
        return next((line for line in self.said.splitlines() if line.startswith("error: ")), "")


def arguments(folder: Path, text: Path, memory: Mapping[str, Any], *more: str) -> list[str]:
    """Of any loop: 2 steps of 2 x 4 x 256 tokens, a curve of each, a validation at the end."""
    return [
        "--seed_everything=7", f"--data.source={text}", f"--data.shards_dir={folder.parent / 'shards'}",
        "--data.tokenizer=byte", "--data.val_fraction=0.2", "--data.block_size=256", "--data.batch_size=4",
        "--model.gpt.vocab_size=8192", "--model.gpt.n_layer=2", "--model.gpt.n_head=2", "--model.gpt.n_embd=256",
        f"--model.memory={json.dumps(asdict(MemoryConfig(**memory)))}", "--model.schedule.warmup_steps=1",
        f"--trainer.default_root_dir={folder}", "--trainer.precision=16-mixed", f"--trainer.max_steps={STEPS}",
        f"--trainer.accumulate_grad_batches={ACCUMULATE}", "--trainer.gradient_clip_val=1.0",
        "--trainer.log_every_n_steps=1", "--trainer.limit_val_batches=1",
        f"--trainer.val_check_interval={STEPS * ACCUMULATE}", "--trainer.enable_progress_bar=false",
        "--trainer.callbacks+=nanogpt_lit.loops.lightning.TextSamples", "--trainer.callbacks.tokens=1", *more,
    ]  # fmt: skip


def fit(
    folder: Path,
    text: Path,
    memory: Mapping[str, Any] | None = None,
    *more: str,
    before: Any = None,
    loop: Callable[[list[str]], int] | None = None,
) -> Outcome:
    """before: called in the run's process when the device is ready; its `found` comes back
    loop: in place of the command `fit`

    Raises FailedError where the run ended with a traceback.
    """
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "said.txt"
    code, measured, found = apart(_run, arguments(folder, text, memory or {}, *more), before, loop, log=log)
    runs = sorted(path for path in folder.iterdir() if path.is_dir())
    state = {}
    with contextlib.suppress(FileNotFoundError, IndexError):
        kept = load_file(runs[-1] / "checkpoints" / "last.safetensors")
        state = {name: tensor for name, tensor in kept.items() if not name.startswith("lightning.")}
    return Outcome(code, log.read_text(), curves_of(runs[-1]) if runs else {}, state, measured, found)


def _run(options: list[str], before: Any, loop: Any) -> tuple[int, dict[str, Any], Any]:
    code = command(["fit", *options], before=before) if loop is None else loop(options, before)
    return code, peaks(), getattr(before, "found", None)


__all__ = ["ACCUMULATE", "PLACEMENTS", "STEPS", "FailedError", "Outcome", "arguments", "fit"]
