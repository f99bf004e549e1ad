"""The tasks of lm-evaluation-harness (the package lm-eval) on a network of ours."""

from pathlib import Path
from typing import Any

from nanogpt_lit.errors import UserError
from nanogpt_lit.evaluate.likelihood import Scorer
from nanogpt_lit.gpt.sampling import continue_text


def run_tasks(scorer: Scorer, tasks: list[str], include_path: Path | None, limit: int | None) -> dict[str, float]:
    """`task/metric` to value.

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
