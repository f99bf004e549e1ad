"""`eval`: its arguments, table and picture. It imports torch late."""

import json
import math
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nanogpt_lit.cli.options import parser_of
from nanogpt_lit.errors import UserError
from nanogpt_lit.runtime.collector import quick_imports

if TYPE_CHECKING:
    from nanogpt_lit.evaluate.likelihood import Scorer

Results = dict[str, float]


def evaluate(arguments: list[str]) -> int:
    """`eval --ckpt FILE [FILE ...]`: a table of losses and accuracies, a line for each checkpoint and their mean."""
    parser = parser_of(
        "eval",
        "Measure checkpoints: loss and perplexity per token, bits per byte (comparable between tokenizers), the "
        "accuracy on HellaSwag, and tasks of lm-eval. Without --data and tasks, the whole validation part of the run "
        "that a checkpoint belongs to is measured. In float32.",
    )
    parser.add_argument(
        "--ckpt",
        type=Path,
        nargs="+",
        required=True,
        metavar="FILE",
        help="checkpoints, or any model that convert reads",
    )
    parser.add_argument(
        "--mean",
        action="store_true",
        help="measure them together too, as one model that predicts the mean of their probabilities",
    )
    parser.add_argument("--data", metavar="TEXT", help="a text, a folder or shards, as data.source of fit")
    parser.add_argument(
        "--text-key",
        default="text",
        metavar="KEY",
        help="the field of JSON Lines and Parquet that holds the text (text)",
    )
    parser.add_argument("--hellaswag", type=Path, metavar="FILE.jsonl", help="questions in HellaSwag's format")
    parser.add_argument("--tasks", metavar="NAME,...", help='tasks of lm-eval (pip install "nanogpt_lit[eval]")')
    parser.add_argument("--include-path", type=Path, metavar="FOLDER", help="folder of your own tasks for lm-eval")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N questions of each task")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps; auto takes a GPU if there is one")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the results, .svg or .png")
    options = parser.parse_args(arguments[1:])
    if options.limit is not None and options.limit < 1:
        raise UserError(f"--limit={options.limit} must be at least 1.")

    with quick_imports():
        from nanogpt_lit.checkpoint.convert import load_mean
        from nanogpt_lit.evaluate.likelihood import Scorer
        from nanogpt_lit.plan.report import check_picture
        from nanogpt_lit.runtime.machine import chosen_device

    if options.picture is not None:
        check_picture(options.picture)
    device = chosen_device(options.device)
    together: dict[str, Results] = {}
    if options.mean:  # first, for not all models have one
        name = f"mean of {len(options.ckpt)}"
        together[name] = measured(Scorer(*load_mean(options.ckpt, device)), options.ckpt, options)
    results = {
        str(checkpoint): measured(Scorer(*load_mean([checkpoint], device)), [checkpoint], options)
        for checkpoint in options.ckpt
    } | together
    if options.picture is not None:
        draw(results, options.picture)
    print(json.dumps(results, indent=1) if options.json else "\n".join(table(results)))
    return 0


def measured(scorer: "Scorer", checkpoints: Sequence[Path], options: Namespace) -> Results:
    """Everything that was asked for, by its name in the table. checkpoints: that the scorer was loaded from"""
    from nanogpt_lit.evaluate.likelihood import conversations_of, tokens_of, validation_shards
    from nanogpt_lit.evaluate.tasks import hellaswag, run_tasks

    results: Results = {}
    asks_for_tasks = options.hellaswag is not None or options.tasks is not None
    if options.data is not None or not asks_for_tasks:
        source = options.data or validation_shards(checkpoints)
        talks = conversations_of(source, scorer.tokenizer, scorer.block_size)
        if talks is not None:
            found = scorer.answers_loss(talks)
        else:
            found = scorer.text_loss(tokens_of(source, options.text_key, scorer.tokenizer, scorer.block_size))
        results["tokens"] = found.targets
        results["loss"] = found.loss
        results["perplexity"] = math.exp(found.loss) if found.loss < 700 else math.inf
        if talks is None:
            results["bits per byte"] = found.bits_per_byte
    if options.hellaswag is not None:
        answered = hellaswag(scorer, options.hellaswag, options.limit)
        results["hellaswag questions"] = answered.questions
        results["hellaswag/acc"] = answered.accuracy
        results["hellaswag/acc_norm"] = answered.accuracy_norm
    if options.tasks is not None:
        results |= run_tasks(scorer, options.tasks.split(","), options.include_path, options.limit)
    return results


def table(results: Mapping[str, Results]) -> Iterator[str]:
    """A line for each checkpoint."""
    names = list(dict.fromkeys(name for found in results.values() for name in found))
    rows = [["checkpoint", *names]]
    rows += [[checkpoint, *(shown(found.get(name)) for name in names)] for checkpoint, found in results.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *rest in rows:
        cells = (f"{cell:>{width}}" for cell, width in zip(rest, widths[1:], strict=True))
        yield f"{first:<{widths[0]}}  {'  '.join(cells)}"


def shown(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def draw(results: Mapping[str, Results], path: Path) -> None:
    """A panel for each measure, a bar for each checkpoint."""
    from matplotlib.figure import Figure

    measures = [name for name in next(iter(results.values())) if name not in ("tokens", "hellaswag questions")]
    figure = Figure(figsize=(2.6 * len(measures) + 1.5, 0.5 * len(results) + 1.4), layout="constrained")
    panels = figure.subplots(1, len(measures), sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, measures, strict=True):
        values = [found[name] for found in results.values()]
        bars = axes.barh(range(len(values)), values, color="#6c8ebf")
        axes.bar_label(bars, [shown(value) for value in values], padding=3, fontsize=8)
        axes.set_title(name, fontsize=10)
        axes.margins(x=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(results)), list(results), fontsize=8)
    panels[0].invert_yaxis()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
