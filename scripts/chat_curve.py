"""Teaches a model to answer by the recipe of configs/smollm2_rtx2050.yaml on a CPU, and writes down two curves.

    python scripts/chat_curve.py SmolLM2-135M-Instruct.Q4_1.gguf --json docs/chat.json --picture docs/chat.svg

The questions are what the functions and classes of Python's standard library do, and the answers are the first
sentences of their docstrings. One curve is the loss of answers that are held out, the other that of a text which the
model knew before: the licence of Python. The optimizer, its rate and the shape of its schedule are the YAML's; steps,
context, tokens per step, precision and the ways to need less memory are not.
"""

import argparse
import json
import random
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_curve import CONFIGS, curve, docstrings_of, fit
from lightning import Callback, LightningModule, Trainer
from matplotlib import rc_context
from matplotlib.figure import Figure

from nanogpt_lit.checkpoint.convert import read_network
from nanogpt_lit.evaluate.likelihood import Scorer, conversations_of, tokens_of
from nanogpt_lit.runtime.machine import hardware
from nanogpt_lit.untrusted.yaml_file import load_yaml_file

CONFIG = "smollm2_rtx2050"
LIBRARY = Path(sysconfig.get_path("stdlib"))
LICENCE = LIBRARY / "LICENSE.txt"
KNOWN_CHARACTERS = 6000
QUESTIONS = 1000
BLOCK_SIZE, BATCH_SIZE = 256, 4
TITLES = {"answers": "held-out answers", "known": "a text that it knew before"}


@dataclass
class Measure(Callback):
    """Logs both losses before the first step, and after each `every` steps.

    In float32, and in windows of the same length at each step, as `eval` measures them.
    """

    known: str
    every: int

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._measure(trainer, pl_module.gpt)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step % self.every == 0:
            self._measure(trainer, pl_module.gpt)

    def _measure(self, trainer: Trainer, gpt: Any) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        own = gpt.config
        gpt.eval()
        try:
            scorer = Scorer(gpt, data.tokenizer)
            windows = conversations_of(data.shards_dir, data.tokenizer, scorer.block_size)
            assert windows is not None
            known = tokens_of(self.known, "text", data.tokenizer, scorer.block_size)
            losses = {"answers": scorer.answers_loss(windows).loss, "known": scorer.text_loss(known).loss}
        finally:
            gpt.config = own
            gpt.train()
        assert trainer.logger is not None
        trainer.logger.log_metrics(losses, step=trainer.global_step)
        told = "  ".join(f"{TITLES[name]} {loss:.4f}" for name, loss in losses.items())
        print(f"step {trainer.global_step:4}  {told}", flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="as init_from")
    parser.add_argument("--known", type=Path, default=LICENCE, help="a text that the model knows")
    parser.add_argument("--steps", type=int, default=42, help=f"of {BATCH_SIZE * BLOCK_SIZE:,} tokens")
    parser.add_argument("--precision", default="bf16-mixed", help="32-true for a CPU without bfloat16")
    parser.add_argument("--work", type=Path, default=Path("runs/chat_curve"), help="where the run is kept")
    parser.add_argument("--json", type=Path, help="also write the curves to this file")
    parser.add_argument("--picture", type=Path, help="and draw them in this one")
    args = parser.parse_args(arguments)

    args.work.mkdir(parents=True, exist_ok=True)
    known, chats = args.work / "known.txt", args.work / "chats.jsonl"
    known.write_text(args.known.read_text(encoding="utf-8")[:KNOWN_CHARACTERS], encoding="utf-8")
    talks = list(conversations())
    chats.write_text("".join(json.dumps(talk) + "\n" for talk in talks), encoding="utf-8")
    measure = {"class_path": "chat_curve.Measure", "init_args": {"known": str(known), "every": max(1, args.steps // 3)}}
    before = set(args.work.glob("version_*"))
    fit(
        CONFIG, "--trust=chat_curve", f"--init_from={args.model}", f"--data.source={chats}",
        f"--trainer.default_root_dir={args.work}", f"--trainer.callbacks={json.dumps([measure])}",
        "--trainer.accelerator=cpu", f"--trainer.precision={args.precision}", "--trainer.enable_progress_bar=false",
        f"--trainer.max_steps={args.steps}", "--trainer.accumulate_grad_batches=1",
        f"--model.schedule.warmup_steps={args.steps // 10}",
        f"--data.block_size={BLOCK_SIZE}", f"--data.batch_size={BATCH_SIZE}",
        "--trainer.limit_val_batches=0", "--early_stopping_patience=null",
        "--model.memory.recompute=none", "--model.memory.recast_weights=false",
        "--model.memory.optimizer_state=device",
    )  # fmt: skip
    (run,) = set(args.work.glob("version_*")) - before
    record = {
        "command": f"python scripts/chat_curve.py {Path(args.model).name} --steps {args.steps}",
        "hardware": hardware(),
        "model": f"{Path(args.model).name}, {read_network(Path(args.model))[0]}",
        "optim": optim(),
        "steps": args.steps,
        "tokens_per_step": BLOCK_SIZE * BATCH_SIZE,
        "precision": args.precision,
        "conversations": len(talks),
        **{name: curve(run, name) for name in TITLES},
    }
    if args.json is not None:
        args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if args.picture is not None:
        draw(record, args.picture)


def optim() -> dict[str, Any]:
    """The YAML's, as it is."""
    settings: dict[str, Any] = load_yaml_file(CONFIGS / f"{CONFIG}.yaml")
    return settings["model"]["optim"]


def conversations() -> Iterator[dict[str, str]]:
    """QUESTIONS of them, drawn from all files by a seed; no answer twice."""
    found: dict[str, str] = {}
    for path in sorted(LIBRARY.rglob("*.py")):
        parts = path.relative_to(LIBRARY).with_suffix("").parts
        if not any(part.startswith(("_", "test", "site-packages", "idlelib", "lib2to3")) for part in parts):
            for name, text in docstrings_of(path):
                answer = " ".join(re.split(r"\n\s*\n|(?<=\.)\s", text.strip())[0].split())
                if name and not name.startswith("_") and 20 < len(answer) < 200:
                    found.setdefault(answer, f"What does {name} of Python's {'.'.join(parts)} do?")
    for answer, question in random.Random(0).sample(sorted(found.items()), QUESTIONS):
        yield {"prompt": question, "response": answer}


def draw(record: dict[str, Any], path: Path) -> None:
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    for name, title in TITLES.items():
        steps, losses = zip(*record[name], strict=True)
        axes.plot(steps, losses, label=title, marker="o", markersize=4, gid=name)
    axes.set_ylim(bottom=0)
    axes.set_xlabel(f"optimizer step of {record['tokens_per_step']:,} tokens", fontsize=9)
    axes.set_ylabel("loss (nats per token)", fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "chat"}):
        figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
