"""What the recipe `limited` is worth where a small text is read many times, beside `modern` and without each part.

    OMP_NUM_THREADS=1 python scripts/small_texts.py --text characters=input.txt bible=kjv.txt

The texts are small cuts, so that a network of 0.1 to 0.2 million parameters has as many parameters a token as one of
some million has on a megabyte: characters of one text, and 512 byte pairs of Python's standard library and of another.
One that is not given is left out. Runs of one length take the same CPU time: those with dropout have fewer steps.
Validation reads the last tenth of the whole text, which no choice was made on: --choose measures the last tenth of the
rest instead. Losses are those of the last step and the best of the run; they do not depend on the machine's load.

    OMP_NUM_THREADS=1 python scripts/small_texts.py --text characters=input.txt bible=kjv.txt --taught

measures what several networks of `limited` say together, and what one learns from them (`teachers` of fit).
"""

import argparse
import hashlib
import json
import platform
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from ablate import MODERN, NANOGPT, SIZES, Recipe, trained, validation_losses
from filelock import FileLock

from nanogpt_lit.data.datamodule import TokenDataModule
from nanogpt_lit.gpt.average import Average
from nanogpt_lit.gpt.networks import build
from nanogpt_lit.run.overfitting import DROPOUT

shape, optim, schedule = MODERN
MODERN = (
    replace(shape, n_layer=2, n_head=2, n_embd=64),
    replace(optim, lr=5e-3, muon_lr=None, muon_momentum=0.95),  # as in configs/limited_char_cpu.yaml
    schedule,
)
NANOGPT = (replace(NANOGPT[0], n_layer=2, n_head=2, n_embd=64), *NANOGPT[1:])
LIMITED: Recipe = (MODERN[0], replace(MODERN[1], weight_decay=3.0), MODERN[2])
DROPPING = replace(MODERN[0], dropout=DROPOUT)
RECIPES: dict[str, tuple[Recipe, float]] = {
    "modern": (MODERN, 1.0),
    "limited": (LIMITED, 1.0),
    "limited with dropout": ((DROPPING, *LIMITED[1:]), 1.0),
    "modern with dropout": ((DROPPING, *MODERN[1:]), 1.0),
    "limited with dropout on half the text": ((DROPPING, *LIMITED[1:]), 0.5),
    "nanogpt": (NANOGPT, 1.0),
    "nanogpt with weight decay 1": (
        (NANOGPT[0], replace(NANOGPT[1], weight_decay=1.0), NANOGPT[2]),
        1.0,
    ),
}
"""Each with the share of the text that it reads, in as many steps."""
SLOWER = 1.13
"""CPU time of a step with dropout as a multiple of one without: 1.16, 1.11 and 1.08 at blocks of 64, 128 and 256."""
BATCH_SIZE, VALIDATIONS = 16, 10
CUTS = {"characters": ("char", 40_000), "code": ("bpe:512", 80_000), "bible": ("bpe:512", 80_000)}
"""Tokenizer of each text, and how many of its characters are trained on."""
LIBRARY_CHARACTERS = 5_000_000
TAUGHT_READINGS = (10, 20)


def library() -> str:
    """The beginning of the standard library, its files in a mixed order that depends on their names alone."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = {path.relative_to(root): path for path in root.rglob("*.py")}
    own = [name for name in files if not {"test", "tests", "site-packages", "idlelib", "lib2to3"} & set(name.parts)]
    text = ""
    for name in sorted(own, key=lambda name: hashlib.sha256(name.as_posix().encode()).digest()):
        source = files[name].read_bytes()
        if source.isascii():
            text += source.decode() + "\n"
        if len(text) > LIBRARY_CHARACTERS:
            break
    return text[:LIBRARY_CHARACTERS]


def cut(text: str, kind: str, share: float, chooses: bool, folder: Path) -> TokenDataModule:
    """A share of the characters of the beginning to train on, and of the end half as many as of the whole."""
    tokenizer, whole = CUTS[kind]
    trained = int(share * whole)
    end = int(0.81 * len(text)) if chooses else int(0.9 * len(text))
    held = text[end : end + whole // 2]
    if share < 1 and tokenizer != "char":  # losses of other tokens could not be compared
        tokenizer = str(folder / "1.0" / "shards" / "tokenizer.tiktoken")
    source = folder / str(share) / "text.txt"
    source.parent.mkdir(parents=True, exist_ok=True)
    both = text[:trained] + held
    if not source.is_file() or source.read_text(encoding="utf-8") != both:  # or other processes may be reading it
        source.write_text(both, encoding="utf-8")
    data = TokenDataModule(
        source=str(source),
        tokenizer=tokenizer,
        val_fraction=len(held) / (trained + len(held)),
        block_size=SIZES["block_size"],
        batch_size=BATCH_SIZE,
        shards_dir=str(source.parent / "shards"),
    )
    data.prepare_data()
    data.setup()
    return data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", nargs="*", default=[], metavar="NAME=FILE", help="characters is char-rnn's input.txt")
    parser.add_argument("--only", choices=CUTS, help="one of the texts")
    parser.add_argument("--readings", nargs="+", type=int, default=[5, 10, 30], help="of the text, by modern (5 10 30)")
    parser.add_argument("--rows", nargs="+", choices=RECIPES, default=list(RECIPES), help="these recipes alone")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the runs of each recipe (0 1 2)")
    parser.add_argument("--taught", action="store_true", help="measure networks that learn from those of the seeds")
    parser.add_argument("--choose", action="store_true", help="measure on the last tenth of the training part")
    parser.add_argument("--folder", type=Path, default=Path("runs/small_texts"), help="where to keep the tokens")
    parser.add_argument("--out", type=Path, default=Path("docs/limited.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)  # a network this small is not faster on more
    texts = dict(text.split("=", 1) for text in args.text)
    for kind in CUTS:
        if args.only not in (None, kind) or kind not in ("code", *texts):
            continue
        text = library() if kind == "code" else Path(texts[kind]).read_text(encoding="utf-8")
        folder = args.folder / f"{kind}{'-choose' if args.choose else ''}"
        cuts = {share: cut(text, kind, share, args.choose, folder) for share in (1.0, 0.5)}
        if args.taught:
            found = taught(cuts[1.0], args.seeds)
            print(kind, json.dumps(found, indent=1), flush=True)
            with noted(args.out, kind, cuts[1.0]) as of_kind:
                of_kind["taught"] = found
            continue
        for seed in args.seeds:
            for readings in args.readings:
                for row in args.rows:
                    recipe, share = RECIPES[row]
                    data = cuts[share]
                    slower = SLOWER if recipe[0].dropout > 0 else 1.0
                    steps = round(readings / slower / share * data.n_windows / BATCH_SIZE)
                    losses = validation_losses(recipe, data, steps, seed, every=-(-steps // VALIDATIONS))
                    losses = [round(loss, 4) for loss in losses]
                    print(
                        f"{kind}, seed {seed}, read {readings} times, {row}: {losses[-1]}, best {min(losses)}",
                        flush=True,
                    )
                    note(args.out, kind, data, row, readings, seed, losses)


def taught(data: TokenDataModule, seeds: Sequence[int]) -> dict[str, Any]:
    """The losses of `limited` after 10 readings, of its seeds together, and of networks that learn from those."""
    steps = {readings: round(readings * data.n_windows / BATCH_SIZE) for readings in TAUGHT_READINGS}
    runs = [trained(LIMITED, data, steps[10], seed, every=steps[10]) for seed in seeds]
    teachers = Average([gpt for gpt, _ in runs]).eval()
    found: dict[str, Any] = {
        "each": [round(losses[-1], 4) for _, losses in runs],
        "mean": round(loss_of(teachers, data), 4),
    }
    for readings in TAUGHT_READINGS:
        of_students = [
            validation_losses(LIMITED, data, steps[readings], 100 + seed, every=steps[readings], teachers=teachers)
            for seed in seeds
        ]
        found[f"taught, {readings} readings"] = [round(losses[-1], 4) for losses in of_students]
    return found


@torch.no_grad()
def loss_of(gpt: Average, data: TokenDataModule) -> float:
    """Over the whole validation part."""
    total, sequences = 0.0, 0
    for tokens, targets in data.val_dataloader():
        total += float(gpt.loss(tokens, targets)) * len(tokens)
        sequences += len(tokens)
    return total / sequences


def note(out: Path, kind: str, data: TokenDataModule, row: str, readings: int, seed: int, losses: list[float]) -> None:
    """Add the losses of a run to the record."""
    with noted(out, kind, data) as of_kind:
        rows = of_kind.setdefault("validation_losses", {}).setdefault(str(readings), {})
        rows.setdefault(row, {})[str(seed)] = losses


@contextmanager
def noted(out: Path, kind: str, data: TokenDataModule) -> Iterator[dict[str, Any]]:
    """The part of the record that is of one text, which is written afterwards. Several processes may write one."""
    with FileLock(out.with_name(f".{out.name}.lock")):
        record: dict[str, Any] = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {}
        hardware = f"{platform.machine()}, 1 thread, Python {platform.python_version()}, torch {torch.__version__}"
        of_kind = record.setdefault(kind, {"hardware": hardware})
        with torch.device("meta"):
            gpt = build(replace(MODERN[0], vocab_size=data.vocab_size))
        of_kind["parameters"] = gpt.parameter_count(non_embedding=False)
        of_kind["tokens"] = max(of_kind.get("tokens", 0), data.n_windows * data.block_size)
        yield of_kind
        out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def table(record: dict[str, Any]) -> str:
    """Markdown: by time and recipe, the losses after the last step of the seeds, and the lowest where they turned."""
    losses = [of_kind["validation_losses"] for of_kind in record.values()]
    rows = [f"| time | recipe | {' | '.join(record)} |", "|---" * (2 + len(record)) + "|"]
    for readings in sorted({readings for of_kind in losses for readings in of_kind}, key=int):
        for recipe in RECIPES:
            runs = [list(of_kind.get(readings, {}).get(recipe, {}).values()) for of_kind in losses]
            if any(runs):
                rows.append(f"| {readings} readings | {recipe} | {' | '.join(map(cell, runs))} |")
    return "\n".join(rows)


def taught_table(record: dict[str, Any]) -> str:
    """Markdown: `limited`, its seeds together, and networks that learned from them."""
    rows = {
        "limited, 10 readings": "each",
        "the mean of the three": "mean",
        **{f"taught by it, {readings} readings": f"taught, {readings} readings" for readings in TAUGHT_READINGS},
    }
    lines = [f"| | {' | '.join(record)} |", "|---" * (1 + len(record)) + "|"]
    for row, key in rows.items():
        losses = [of_kind["taught"][key] for of_kind in record.values()]
        cells = [[loss] if isinstance(loss, float) else loss for loss in losses]
        lines.append(f"| {row} | {' | '.join(', '.join(f'{loss:.3f}' for loss in each) for each in cells)} |")
    return "\n".join(lines)


def cell(runs: list[list[float]]) -> str:
    last, lowest = (", ".join(f"{of(losses):.3f}" for losses in runs) for of in (lambda losses: losses[-1], min))
    return last if last == lowest else f"{last} (lowest {lowest})"


if __name__ == "__main__":
    main()
