"""What each part of the modern recipe is worth: the recipe with and without it, on two data sets and three seeds.

    python scripts/ablate.py --source input.txt

The data sets are the characters of that text and the GPT-2 tokens of Python's standard library. Runs of one seed see
the same tokens in the same order, so differences are taken seed by seed. Losses are compared after equally many tokens
and not after equal time: they do not depend on the machine's load. One row is the modern recipe on half the tokens:
what does nanogpt's loss cost there?
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanogpt_lit.data.datamodule import TokenDataModule
from nanogpt_lit.gpt.average import Average
from nanogpt_lit.gpt.distillation import TaughtLoss
from nanogpt_lit.gpt.gpt2 import GPTConfig
from nanogpt_lit.gpt.llama import LlamaConfig
from nanogpt_lit.gpt.network import Network, NetworkConfig
from nanogpt_lit.gpt.networks import described
from nanogpt_lit.loops import reference
from nanogpt_lit.loops.contract import LoopSettings, Observer
from nanogpt_lit.module import LitNanoGPT
from nanogpt_lit.optim.adamw import AdamWConfig
from nanogpt_lit.optim.schedule import ScheduleConfig
from nanogpt_lit.run.guards import FiniteGuard
from nanogpt_lit.tune.trials import MODERN as OPTIONS
from nanogpt_lit.tune.trials import MUON_SHARE

Recipe = tuple[NetworkConfig, AdamWConfig, ScheduleConfig]

SIZES: dict[str, Any] = {"block_size": 64, "n_layer": 4, "n_head": 4, "n_embd": 128}
NANOGPT = (
    GPTConfig(**SIZES, bias=False, gelu="erf"),
    AdamWConfig(lr=2e-3, beta2=0.99),
    ScheduleConfig(warmup_steps=20),
)
MODERN = (
    LlamaConfig(**SIZES, **OPTIONS["llama"]),
    replace(NANOGPT[1], **OPTIONS["optim"], lr=1e-2, muon_lr=MUON_SHARE * 1e-2, muon_momentum=0.85),
    replace(NANOGPT[2], **OPTIONS["schedule"], cooldown_ratio=0.6),
)
OTHERS: dict[str, Recipe] = {
    # At the rate that serves AdamW.
    "without Muon": (MODERN[0], replace(MODERN[1], matrices="adamw", lr=2e-3, muon_lr=None), MODERN[2]),
    "with GPT-2's network": (NANOGPT[0], *MODERN[1:]),
    "without QK normalisation": (replace(MODERN[0], qk_norm=False), *MODERN[1:]),
    "without the cooldown": (*MODERN[:2], replace(MODERN[2], decay="cosine", min_lr_ratio=0.1)),
    "with a tied head": (replace(MODERN[0], tied_head=True), *MODERN[1:]),
}
HALF = "modern on half the tokens"
KINDS = ("characters", "tokens")


class Losses(Observer):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_validation_end(self, step: int, loss: Tensor) -> None:
        self.values.append(float(loss))


def experiments(steps: int) -> dict[str, tuple[Recipe, int]]:
    """Each run's recipe and steps."""
    recipes = {"nanogpt": NANOGPT, "modern": MODERN, **OTHERS}
    return {name: (recipe, steps) for name, recipe in recipes.items()} | {HALF: (MODERN, steps // 2)}


def data_set(kind: str, source: Path, shards: Path) -> tuple[TokenDataModule, dict[str, Any]]:
    """The batches of a data set, and what its network has other than SIZES."""
    kinds: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "characters": ({"source": str(source), "tokenizer": "char", "val_fraction": 0.1, "batch_size": 12}, {}),
        "tokens": ({"source": "stdlib", "tokenizer": "gpt2", "batch_size": 4}, {"n_embd": 64}),
    }
    options, network = kinds[kind]
    data = TokenDataModule(**options, block_size=SIZES["block_size"], shards_dir=str(shards / kind))
    data.prepare_data()
    data.setup()
    return data, network


def validation_losses(
    recipe: Recipe, data: TokenDataModule, steps: int, seed: int, every: int, **options: Any
) -> list[float]:
    """The validation losses of a run, the last of them after its last step. The arguments are those of `trained`."""
    _, losses = trained(recipe, data, steps, seed, every, **options)
    return losses


def trained(
    recipe: Recipe,
    data: TokenDataModule,
    steps: int,
    seed: int,
    every: int,
    limit: int | None = None,
    observers: Sequence[Observer] = (),
    gradient_clip_val: float = 1.0,
    teachers: Average | None = None,
) -> tuple[Network, list[float]]:
    """The network of a run, and its validation losses, the last of them after its last step.

    every: steps between validations   limit: batches that each of them reads; None reads all
    """
    shape, optim, schedule = recipe
    data.seed = seed
    torch.manual_seed(seed)
    module = LitNanoGPT(
        **described(replace(shape, vocab_size=data.vocab_size)),
        optim=optim,
        schedule=replace(schedule, total_steps=steps),
    )
    if teachers is not None:
        module.loss = TaughtLoss(module.gpt, teachers)
    settings = LoopSettings(
        steps,
        gradient_clip_val=gradient_clip_val,
        val_check_interval=every,
        limit_val_batches=limit,
        seed=seed,
    )
    losses = Losses()
    observers = [FiniteGuard(), losses, *observers]
    reference.train(module, data.train_dataloader(), data.val_dataloader(), settings, observers)
    return module.gpt, losses.values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="a text for the characters: char-rnn's input.txt")
    parser.add_argument("--only", choices=KINDS, help="one of the data sets")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of each run (200)")
    parser.add_argument("--rows", nargs="+", choices=experiments(2), help="beside modern, these alone")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each recipe (3)")
    parser.add_argument("--shards", type=Path, default=Path("runs/ablate"), help="where to keep the tokens")
    parser.add_argument("--out", type=Path, default=Path("docs/ablation.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)  # a network this small is not faster on more
    for kind in KINDS:
        if args.only not in (None, kind):
            continue
        data, network = data_set(kind, args.source, args.shards)
        runs = experiments(args.steps)
        if args.rows:
            runs = {name: run for name, run in runs.items() if name in ("modern", *args.rows)}
        losses: dict[str, list[float]] = {name: [] for name in runs}
        started_s = time.perf_counter()
        for seed in range(args.seeds):
            for name, ((shape, optim, schedule), steps) in runs.items():
                recipe = (replace(shape, **network), optim, schedule)
                losses[name] += validation_losses(recipe, data, steps, seed, every=steps, limit=80)
                print(f"{kind}, seed {seed}, {name}: {losses[name][-1]:.4f}", flush=True)
            write(args.out, kind, data, args.steps, losses, time.perf_counter() - started_s)
        print(table(losses))


def write(
    out: Path, kind: str, data: TokenDataModule, steps: int, losses: dict[str, list[float]], elapsed_s: float
) -> None:
    record = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {}
    record[kind] = {
        "hardware": f"{platform.machine()}, 1 thread, Python {platform.python_version()}, torch {torch.__version__}",
        "steps": steps,
        "tokens_per_step": data.batch_size * data.block_size,
        "elapsed_s": round(elapsed_s),
        "validation_loss": losses,
    }
    out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def table(losses: dict[str, list[float]]) -> str:
    """Markdown: the mean loss, and by how much it is above the modern recipe's, seed by seed."""
    rows = ["| recipe | validation loss | above modern, by seed |", "|---|---|---|"]
    for name, values in losses.items():
        above = [value - modern for value, modern in zip(values, losses["modern"], strict=True)]
        by_seed = ", ".join(f"{a:+.3f}" for a in above) + " " if name != "modern" else ""
        rows.append(f"| {name} | {statistics.mean(values):.3f} | {by_seed}|")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
