"""Questions with a right answer: HellaSwag from a file, and the tasks of lm-evaluation-harness (the package lm-eval).

HellaSwag (Zellers et al., arXiv:1905.07830) asks which of four endings belongs to a beginning. Texts and scores are
made as by lm-evaluation-harness, whose figures are what others publish.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from nanogpt_lit.data.documents import opened
from nanogpt_lit.errors import UserError
from nanogpt_lit.evaluate.likelihood import Scorer
from nanogpt_lit.gpt.generate import continue_text

ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class Question:
    context: str
    endings: list[str]
    label: int


@dataclass(frozen=True)
class Accuracy:
    questions: int
    accuracy: float
    """Share of the questions whose right ending is the likeliest."""
    accuracy_norm: float
    """The same by likelihood per character of the ending, so that short endings have no advantage."""


def read_questions(path: Path) -> Iterator[Question]:
    """The questions of a JSONL file with ctx_a, ctx_b (or ctx), endings, label and perhaps activity_label."""
    with opened(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                context = f"{row['ctx_a']} {row['ctx_b'].capitalize()}" if "ctx_a" in row else row["ctx"]
                if "activity_label" in row:
                    context = f"{row['activity_label']}: {context}"
                question = Question(cleaned(context), [cleaned(text) for text in row["endings"]], int(row["label"]))
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise UserError(
                    f"{path}, line {number}: not a HellaSwag question ({type(error).__name__}); it needs ctx, endings "
                    "and label."
                ) from error
            if not 0 <= question.label < len(question.endings) or not all(question.endings):
                raise UserError(
                    f"{path}, line {number}: label={question.label} names none of {len(question.endings)} endings, or "
                    "an ending is empty."
                )
            yield question


def cleaned(text: str) -> str:
    """Remove the marks of WikiHow's articles."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def hellaswag(scorer: Scorer, path: Path, limit: int | None = None) -> Accuracy:
    """Accuracy on the questions of a file. limit: on the first so many. Raises UserError for a file that holds none."""
    questions = list(islice(read_questions(path), limit))
    if not questions:
        raise UserError(f"{path} holds no question.")
    right = right_norm = 0
    for start in range(0, len(questions), ROWS_AT_ONCE):
        batch = questions[start : start + ROWS_AT_ONCE]
        pairs = [(question.context, f" {ending}") for question in batch for ending in question.endings]
        scores = iter([found.log_likelihood for found in scorer.continuations(pairs)])
        for question in batch:
            of_endings = [next(scores) for _ in question.endings]
            normed = [score / len(ending) for score, ending in zip(of_endings, question.endings, strict=True)]
            right += of_endings.index(max(of_endings)) == question.label
            right_norm += normed.index(max(normed)) == question.label
    return Accuracy(len(questions), right / len(questions), right_norm / len(questions))


def run_tasks(scorer: Scorer, tasks: list[str], include_path: Path | None, limit: int | None) -> dict[str, float]:
    """Results of lm-eval's tasks on the network: `task/metric` to value.

    tasks: names that lm-eval knows, or of YAML files in include_path, whose data may be local   limit: documents a task
    Raises UserError where lm-eval is missing or knows no such task.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.api.model import LM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError('--tasks needs the package lm-eval; pip install "nanogpt_lit[eval]".') from error
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise UserError(f"--tasks={unknown[0]} is not a task of lm-eval; --include-path names a folder of your own.")

    class Ours(LM):
        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            found = scorer.continuations([request.args for request in requests])
            return [(each.log_likelihood, each.is_greedy) for each in found]

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            tokenizer = scorer.tokenizer
            streams = [[tokenizer.encode_stream([(request.args[0], True)])] for request in requests]
            return [-scorer.text_loss(stream).nats for stream in streams]

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            return [self._generate(*request.args) for request in requests]

        def _generate(self, context: str, options: dict[str, Any]) -> str:
            until = options.get("until") or []
            stops = [until] if isinstance(until, str) else until
            temperature = options.get("temperature", 0.0) if options.get("do_sample") else 0.0
            text = ""
            for piece in continue_text(
                scorer.gpt, scorer.tokenizer, context, options.get("max_gen_toks", 256), temperature=temperature
            ):
                text += piece
                ends = [text.index(stop) for stop in stops if stop and stop in text]
                if ends:
                    return text[: min(ends)]
            return text

    results = simple_evaluate(
        model=Ours(), tasks=tasks, limit=limit, task_manager=manager, bootstrap_iters=0, log_samples=False
    )
    assert results is not None  # only other processes than the first get none
    return {
        f"{task}/{metric.removesuffix(',none')}": float(value)
        for task, metrics in results["results"].items()
        for metric, value in metrics.items()
        if isinstance(value, int | float) and "stderr" not in metric and metric != "sample_len"
    }
