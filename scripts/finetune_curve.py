"""Fine-tunes a small network on a text by the recipe of configs/finetune_rtx2050.yaml, and writes down the curve.

    python scripts/finetune_curve.py my_texts --json docs/finetune.json

A network of 1.3 million parameters is trained first, on the English in the docstrings of Python and its packages. Then
it is fine-tuned as the YAML fine-tunes GPT-2 124M: a tenth of its rate of training, the YAML's own steps, tokens per
step, warm-up, decay, dropout and early stopping. Only the context, the precision and the ways to need less memory are
not the YAML's.
"""

import argparse
import ast
import importlib.util
import json
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nanogpt_lit.__main__ import main as command
from nanogpt_lit.checkpoint.convert import load_network
from nanogpt_lit.errors import UserError
from nanogpt_lit.evaluate.likelihood import Scorer, tokens_of
from nanogpt_lit.runtime.machine import hardware
from nanogpt_lit.untrusted.yaml_file import load_yaml_file

CONFIGS = Path(__file__).parents[1] / "configs"
RATE = 4e-3
"""Of the network's own training, as configs/quickstart.yaml has it for its size."""
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu", "--trainer.precision=32-true"]
PACKAGES = ("torch", "numpy", "transformers", "lightning", "accelerate", "matplotlib", "sympy")
SHORT_DOCSTRING = 200


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", help="what to fine-tune on, as data.source")
    parser.add_argument("--work", type=Path, default=Path("runs/finetune_curve"), help="where the two runs are kept")
    parser.add_argument("--pretrain-steps", type=int, default=2000, help="of 2,048 tokens")
    parser.add_argument("--json", type=Path, help="also write the curve to this file")
    args = parser.parse_args(arguments)

    start = args.work / "pretrained/version_0/checkpoints/best.safetensors"
    if not start.exists():
        text = args.work / "docstrings.txt"
        text.parent.mkdir(parents=True, exist_ok=True)
        text.write_text("\n\n".join(docstrings()), encoding="utf-8")
        fit(
            "quickstart", *QUIET, f"--trainer.default_root_dir={args.work / 'pretrained'}", f"--data.source={text}",
            "--data.tokenizer=bpe:4096", f"--trainer.max_steps={args.pretrain_steps}",
            f"--trainer.val_check_interval={max(1, args.pretrain_steps // 10)}", f"--model.optim.lr={RATE}",
            "--trainer.callbacks=null",
        )  # fmt: skip
    root = args.work / "finetuned"
    before = set(root.glob("version_*"))
    fit(
        "finetune_rtx2050", *QUIET, f"--trainer.default_root_dir={root}", f"--data.source={args.text}",
        f"--init_from={start}",
        "--data.block_size=128", "--data.batch_size=16", f"--model.optim.lr={RATE / 10}",
        "--model.memory.recompute=none", "--model.memory.recast_weights=false",
        "--model.memory.optimizer_state=device",
    )  # fmt: skip
    (run,) = set(root.glob("version_*")) - before
    record = record_of(run, start, root / "shards")
    print(f"before            validation loss {record['before']:.4f}")
    for step, loss in record["validation"]:
        print(f"step {step:5,}        validation loss {loss:.4f}")
    if args.json is not None:
        args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def record_of(run: Path, start: Path, shards: Path) -> dict[str, Any]:
    scorer = Scorer(*load_network(start))
    stream = tokens_of(str(shards), "text", scorer.tokenizer, scorer.block_size)
    return {
        "hardware": hardware(),
        "recipe": recipe(),
        "lr": RATE / 10,
        "parameters": scorer.gpt.parameter_count(non_embedding=False),
        "before": round(scorer.text_loss(stream).loss, 4),
        "validation": curve(run, "val/loss"),
        "train": curve(run, "train/loss")[3::4],
    }


def recipe() -> dict[str, Any]:
    """What the curve depends on, of the YAML as it is."""
    settings = load_yaml_file(CONFIGS / "finetune_rtx2050.yaml")
    return {
        "early_stopping_patience": settings["early_stopping_patience"],
        "max_steps": settings["trainer"]["max_steps"],
        "dropout": settings["model"]["gpt"]["dropout"],
        "optim": settings["model"]["optim"],
        "schedule": settings["model"]["schedule"],
    }


def fit(config: str, *options: str) -> None:
    code = command(["fit", "--config", str(CONFIGS / f"{config}.yaml"), *options])
    if code:
        raise UserError(f"fit ended with {code}.")


def docstrings() -> Iterator[str]:
    """Each once, and none of a line or two."""
    seen = set()
    warnings.simplefilter("ignore")  # of old escapes in other people's code
    specs = [importlib.util.find_spec(package) for package in PACKAGES]
    packages = [Path(spec.origin).parent for spec in specs if spec is not None and spec.origin is not None]
    for folder in (Path(sysconfig.get_path("stdlib")), *packages):
        for path in sorted(folder.rglob("*.py")):
            if not {"test", "tests", "site-packages"} & {*path.relative_to(folder).parts}:
                for _, text in docstrings_of(path):
                    if len(text) > SHORT_DOCSTRING and text not in seen:
                        seen.add(text)
                        yield text


def docstrings_of(path: Path) -> Iterator[tuple[str, str]]:
    """The name of each class and function, "" of the file itself, with what is written below it."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield getattr(node, "name", ""), ast.get_docstring(node) or ""


def curve(run: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    return [(event.step, round(event.value, 4)) for event in events.Scalars(tag)]


if __name__ == "__main__":
    main()
