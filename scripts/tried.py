"""What was tried beside the modern recipe, and what each was worth: its validation loss above the recipe's, by seed.

    OMP_NUM_THREADS=1 python scripts/tried.py --source input.txt

The data sets, networks and batches are those of scripts/ablate.py. A row changes settings that a YAML has, or the
optimizer, by a few lines here that follow a paper. Each run is in the record as it ends, and none that is in it runs
again: rows, seeds and data sets may come one by one. --cost measures the time of the steps instead, in turns with the
recipe's.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from ablate import KINDS, data_set, validation_losses
from ablate import MODERN as PRESENT
from torch import Tensor
from tried_parts import (
    Beginning,
    CautiousDecay,
    CautiousUpdates,
    JordansScale,
    MomentumWarmup,
    NorMuon,
    PerHead,
    Snoo,
    Soap,
    TailMean,
    WithoutNesterov,
    marked_matrices,
    polar_express,
    root_decay,
    with_rate,
)

from nanogpt_lit.data.datamodule import TokenDataModule
from nanogpt_lit.loops.contract import Observer
from nanogpt_lit.optim.muon import MuonBesideAdamW

STEPS = 150
LR = 5e-3
MODERN = (PRESENT[0], replace(PRESENT[1], lr=LR, muon_lr=None, muon_momentum=0.9), PRESENT[2])
"""The recipe as it was when all this was tried; the row that pays is in it since."""


@dataclass(frozen=True)
class Row:
    optim: dict[str, Any] = field(default_factory=dict)
    schedule: dict[str, Any] = field(default_factory=dict)
    replaced: dict[str, Any] = field(default_factory=dict)
    """Names below nanogpt_lit.optim, and what stands for them during the run."""
    during: tuple[Callable[[], Observer], ...] = ()
    gradient_clip_val: float = 1.0
    batch: float = 1.0
    """Share of the recipe's batch."""
    tokens: float = 1.0
    """Share of the recipe's tokens."""
    network: dict[str, Any] = field(default_factory=dict)


def optim(**settings: Any) -> Row:
    return Row(optim=settings)


def schedule(**settings: Any) -> Row:
    return Row(schedule=settings)


def muon(kind: type[MuonBesideAdamW], **settings: Any) -> Row:
    return Row(optim=settings, replaced={"muon.MuonBesideAdamW": kind})


def momentum(first: float, last: float, **others: Any) -> Row:
    return Row(during=(lambda: MomentumWarmup(first, last, STEPS // 2),), **others)


TWICE = {"lr": 2 * LR, "muon_lr": LR}
PAYS = "AdamW's rate x 2, Muon's momentum 0.85"
PAYING = TWICE | {"muon_momentum": 0.85}
BY_HEADS = {"muon.MuonBesideAdamW": PerHead, "adamw.block_matrices": marked_matrices}
ROWS: dict[str, Row] = {
    "modern": Row(),
    # Settings.
    "Muon's momentum 0.85": optim(muon_momentum=0.85),
    "Muon's momentum 0.95": optim(muon_momentum=0.95),
    "Muon's rate x 1/2": optim(muon_lr=LR / 2),
    "Muon's rate x 2": optim(muon_lr=LR * 2),
    "AdamW's rate x 2": optim(**TWICE),
    "AdamW's rate x 4": optim(lr=4 * LR, muon_lr=LR),
    PAYS: optim(**PAYING),
    "AdamW's rate x 2, Muon's momentum 0.8": optim(**TWICE, muon_momentum=0.8),
    "rate of the embeddings x 3": Row(replaced={"adamw.param_groups": with_rate("embed", 3)}),
    "rate of the head x 3": Row(replaced={"adamw.param_groups": with_rate("lm_head", 3)}),
    "rate of the norms x 3": Row(replaced={"adamw.param_groups": with_rate("norm", 3)}),
    "rate of the norms x 10": Row(replaced={"adamw.param_groups": with_rate("norm", 10)}),
    "beta1 0.8": optim(beta1=0.8),
    "beta2 0.95": optim(beta2=0.95),
    "no weight decay": optim(weight_decay=0.0),
    "weight decay 1.0": optim(weight_decay=1.0),
    "cooldown over the last 40 %": schedule(cooldown_ratio=0.4),
    "cooldown over the last 80 %": schedule(cooldown_ratio=0.8),
    "cooldown over the last 99 %": schedule(cooldown_ratio=0.99),
    "warm-up of 10 steps": schedule(warmup_steps=10),
    "no clipping of gradients": Row(gradient_clip_val=0.0),
    "gradients clipped to 0.3": Row(gradient_clip_val=0.3),
    "half the batch, twice the steps": Row(batch=0.5),
    "half the batch, 1.4 times the steps": Row(batch=0.5, tokens=0.7),
    # What the package does not have.
    "cooldown as 1 - sqrt": Row(replaced={"schedule.warmup_decay": root_decay}),
    "Muon's momentum from 0.8 to 0.9": momentum(0.8, 0.9),
    "Muon's momentum from 0.85 to 0.95": momentum(0.85, 0.95),
    "Muon's momentum from 0.7 to 0.85": momentum(0.7, 0.85),
    "Muon's momentum from 0.7 to 0.85, AdamW's rate x 2": momentum(0.7, 0.85, optim=TWICE),
    "Muon's momentum from 0.7 to 0.85, AdamW's rate x 2, 80 % of the tokens": momentum(
        0.7, 0.85, optim=TWICE, tokens=0.8
    ),
    f"{PAYS}, Muon by heads": Row(optim=PAYING, replaced=BY_HEADS),
    "Muon's momentum from 0.7 to 0.85, AdamW's rate x 2, Muon by heads": momentum(
        0.7, 0.85, optim=TWICE, replaced=BY_HEADS
    ),
    "Muon without Nesterov's momentum": muon(WithoutNesterov),
    "Muon with 4 rounds": Row(replaced={"muon.ROUNDS": 4}),
    "Muon with 3 rounds": Row(replaced={"muon.ROUNDS": 3}),
    "Polar Express": Row(replaced={"muon.orthogonalised": polar_express}),
    "Jordan's scale of Muon": muon(JordansScale),
    "Muon by heads": Row(replaced=BY_HEADS),
    "NorMuon": muon(NorMuon),
    "cautious weight decay": muon(CautiousDecay),
    "cautious updates": muon(CautiousUpdates),
    "norms of queries and keys from 1.5 on": Row(during=(lambda: Beginning("[qk]_norm", 1.5),)),
    "initial matrices x 1/2": Row(during=(lambda: Beginning(r"layers.*proj", 0.5),)),
    "SOAP, rate 2e-3": muon(Soap, muon_lr=2e-3),
    "SOAP, rate 5e-3": muon(Soap),
    "mean of the last 15 steps' weights": Row(during=(lambda: TailMean(15),)),
    "mean of the last 40 steps' weights, cooldown to a third": Row(
        during=(lambda: TailMean(40),), schedule={"min_lr_ratio": 0.3}
    ),
    "SNOO every 10 steps": Row(during=(lambda: Snoo(10, 0.8, 0.5),)),
    f"{PAYS}, RoPE's base 100": Row(optim=PAYING, network={"rope_base": 100.0}),
    # In four fifths of the recipe's time, on the characters and on the tokens.
    f"{PAYS}, 2 layers, 1.59 of the tokens": Row(optim=PAYING, network={"n_layer": 2}, tokens=238 / STEPS),
    "AdamW's rate x 3, Muon's momentum 0.85, RoPE's base 100, 80 % of the tokens": Row(
        optim=PAYING | {"lr": 3 * LR}, network={"rope_base": 100.0}, tokens=0.8
    ),
}


@dataclass
class StepTimes(Observer):
    """CPU seconds at the end of each step."""

    ends: list[float] = field(default_factory=list)

    def on_step_end(self, step: int, lr: float, grad_norm: Tensor) -> None:
        self.ends.append(time.process_time())


def run(
    row: Row,
    network: dict[str, Any],
    data: TokenDataModule,
    steps: int,
    seed: int,
    validation_batches: int = 80,
    observers: Iterable[Observer] = (),
) -> float:
    """The validation loss of a row where the recipe would take `steps` and read so many batches."""
    shape, optim, schedule = MODERN
    longer = row.tokens / row.batch
    steps, warmup = round(steps * longer), {"warmup_steps": round(schedule.warmup_steps * longer)}
    with ExitStack() as stack:
        for name, stand_in in row.replaced.items():
            stack.enter_context(patch(f"nanogpt_lit.optim.{name}", stand_in))
        stack.callback(setattr, data, "batch_size", data.batch_size)
        data.batch_size = round(data.batch_size * row.batch)
        (loss,) = validation_losses(
            (
                replace(shape, **network | row.network),
                replace(optim, **row.optim),
                replace(schedule, **warmup | row.schedule),
            ),
            data,
            steps,
            seed,
            every=steps,
            limit=round(validation_batches / row.batch),
            observers=[*(start() for start in row.during), *observers],
            gradient_clip_val=row.gradient_clip_val,
        )
    return loss


def cost(row: Row, network: dict[str, Any], data: TokenDataModule, turns: int, steps: int = 11) -> float:
    """CPU time of the steps of a run over that of the recipe's; the median of the turns."""
    ratios = []
    for turn in range(turns):
        spent = {}
        for name in ("modern", "row") if turn % 2 else ("row", "modern"):
            times = StepTimes()
            run(row if name == "row" else ROWS["modern"], network, data, steps, 0, 1, [times])
            spent[name] = (times.ends[-1] - times.ends[0]) / (len(times.ends) - 1)
        ratios.append(spent["row"] / spent["modern"] * row.tokens / row.batch)
    return median(ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="a text for the characters: char-rnn's input.txt")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=KINDS, help="one of the data sets")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="these alone")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="(0 1 2)")
    parser.add_argument(
        "--cost", type=int, metavar="TURNS", help="measure the rows' steps, in so many turns, and no loss"
    )
    parser.add_argument("--shards", type=Path, default=Path("runs/ablate"), help="where to keep the tokens")
    parser.add_argument("--out", type=Path, default=Path("docs/tried.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    for kind in args.only:
        data, network = data_set(kind, args.source, args.shards)
        if args.cost:
            for name in args.rows:
                note(args.out, kind, "relative_time", name, round(cost(ROWS[name], network, data, args.cost), 3))
            continue
        for seed in args.seeds:
            for name in args.rows:
                if str(seed) not in read(args.out).get(kind, {}).get("validation_losses", {}).get(name, {}):
                    loss = round(run(ROWS[name], network, data, STEPS, seed), 4)
                    note(args.out, kind, "validation_losses", name, {str(seed): loss})


def read(out: Path) -> dict[str, Any]:
    return json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {}


def note(out: Path, kind: str, what: str, name: str, value: Any) -> None:
    record = read(out)
    hardware = f"{platform.machine()}, 1 thread, Python {platform.python_version()}, torch {torch.__version__}"
    rows = record.setdefault(kind, {"hardware": hardware, "steps": STEPS}).setdefault(what, {})
    rows[name] = rows.get(name, {}) | value if isinstance(value, dict) else value
    out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"{kind}, {what}, {name}: {rows[name]}", flush=True)


def table(record: dict[str, Any]) -> str:
    """Markdown: by how much a row's losses are above the recipe's, seed by seed, and how long its step takes."""
    rows = ["| tried | characters | tokens | time |", "|---|---|---|---|"]
    for name in ROWS:
        cells = [above(record[kind]["validation_losses"], name) for kind in KINDS]
        times = [record[kind].get("relative_time", {}).get(name) for kind in KINDS]
        if name != "modern" and any(cells):
            spent = ", ".join(f"x {ratio:.2f}" for ratio in times if ratio is not None)
            rows.append(f"| {name} | {' | '.join(cells)} | {spent} |".replace("|  |", "| |").replace("|  |", "| |"))
    return "\n".join(rows)


def above(losses: dict[str, dict[str, float]], name: str) -> str:
    of_row = losses.get(name, {})
    # + 0.0 makes zero of a rounded minus zero.
    return ", ".join(f"{round(loss - losses['modern'][seed], 3) + 0.0:+.3f}" for seed, loss in of_row.items())


if __name__ == "__main__":
    main()
