"""What a model is, on one page: its README for people who did not train it."""

import json
import math
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nanogpt_lit.checkpoint.network import size
from nanogpt_lit.checkpoint.run_file import written_by
from nanogpt_lit.checkpoint.state import RunState
from nanogpt_lit.data.tokenizer import EOT, Tokenizer
from nanogpt_lit.errors import UserError
from nanogpt_lit.untrusted.yaml_file import load_yaml_file

RUN_YAML = "config.yaml"
"""What `fit` keeps of a run's settings, in the folder above its checkpoints."""
DATA = ("source", "val_fraction", "documents", "special_tokens")
"""Of the YAML's data section: what the text was, and how it was read."""


def model_card(state: RunState, tokenizer: Tokenizer, source: Path) -> str:
    """Markdown with data, settings, losses and versions, as far as the run knows them.

    source: the checkpoint; beside its folder lies the YAML of a run of ours
    """
    settings = run_settings(source)
    configs = {
        name: state.hyper_parameters[name] for name in ("gpt", "optim", "schedule") if name in state.hyper_parameters
    }
    init_from = settings.get("init_from")
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags:",
        "- gpt2",
        "- nanogpt_lit",
        "---",
        "",
        f"# {source.stem}",
        "",
        f"A GPT-2-class network: {size(state.hyper_parameters['gpt'])}.",
        "",
        "## Data",
        "",
        *data_lines(state, tokenizer, settings),
        "",
        "## Training",
        "",
        *([f"- fine-tuned from {init_from}"] if init_from else []),
        f"- {state.step:,} optimizer steps, {state.tokens:,} tokens, {state.trained_s / 3600:.2f} hours",
        *losses(state),
        "",
        "```json",
        json.dumps(configs, indent=1, default=str),
        "```",
        "",
        "## Versions",
        "",
        f"- {written_by()}, Python {platform.python_version()}",
        "",
        "## Use",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model, tokenizer = AutoModelForCausalLM.from_pretrained("."), AutoTokenizer.from_pretrained(".")',
        f'inputs = tokenizer("{EOT}", return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))",
        "```",
    ]
    return "\n".join(lines) + "\n"


def data_lines(state: RunState, tokenizer: Tokenizer, settings: dict[str, Any]) -> Iterator[str]:
    section = settings.get("data") or {}
    if not section:
        yield "- the text: not known to the checkpoint; the run's folder would say"
    yield from (f"- {name}: {section[name]}" for name in DATA if section.get(name) is not None)
    yield from (f"- {name}: {state.data[name]}" for name in ("block_size", "batch_size", "seed") if name in state.data)
    yield f"- tokenizer: {tokenizer.name}, {tokenizer.vocab_size:,} tokens; a document begins with id {tokenizer.eot}"


def losses(state: RunState) -> Iterator[str]:
    for name in ("latest", "best"):
        if (found := state.validations.get(name)) is not None:
            step, loss = found
            yield f"- {name} validation loss {loss:.4f}, perplexity {math.exp(min(loss, 700)):.2f}, at step {step:,}"


def run_settings(source: Path) -> dict[str, Any]:
    """The YAML of the run that a checkpoint lies in; nothing where there is none, or one that cannot be read."""
    path = source.parent.parent / RUN_YAML
    if source.parent.name != "checkpoints" or not path.is_file():
        return {}
    try:
        settings = load_yaml_file(path)
    except UserError:
        return {}
    return settings if isinstance(settings, dict) else {}
