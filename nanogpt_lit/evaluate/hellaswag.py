"""HellaSwag (Zellers et al., arXiv:1905.07830): which of four endings belongs to a beginning.

Texts and scores are made as by lm-evaluation-harness, whose figures are what others publish.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nanogpt_lit.data.documents import opened
from nanogpt_lit.errors import UserError
from nanogpt_lit.evaluate.likelihood import Scorer

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
    """Of a JSONL file with ctx_a, ctx_b (or ctx), endings, label and perhaps activity_label."""
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
    """Without the marks of WikiHow's articles."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def hellaswag(scorer: Scorer, path: Path, limit: int | None = None) -> Accuracy:
    """limit: the first so many questions. Raises UserError for a file that holds none."""
    questions: list[Question] = []
    for question in read_questions(path):
        if len(questions) == limit:
            break
        questions.append(question)
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
