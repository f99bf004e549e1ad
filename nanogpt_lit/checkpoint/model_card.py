"""The model card of an exported network: what it was trained on, for how long, and how well it does."""

import json
import math
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nanogpt_lit.checkpoint.network import size
from nanogpt_lit.checkpoint.run_file import written_by
from nanogpt_lit.checkpoint.state import RunState
from nanogpt_lit.data.tokenizer import Tokenizer
from nanogpt_lit.errors import UserError
from nanogpt_lit.gpt.networks import config_of
from nanogpt_lit.untrusted.yaml_file import load_yaml_file

RUN_YAML = "config.yaml"
"""The file in which `fit` keeps a run's settings, in the folder above its checkpoints."""
DATA = ("source", "val_fraction", "documents", "special_tokens")
"""Keys of the YAML's data section: what the text was, and how it was read."""


def model_card(state: RunState, tokenizer: Tokenizer, source: Path, architecture: str) -> str:
    """Markdown with data, settings, losses and versions, as far as the run knows them.

    architecture: transformers' name for it   source: the checkpoint; beside its folder lies the YAML of a run of ours
    """
    settings = run_settings(source)
    sections = ("network", "gpt", "llama", "optim", "schedule")
    configs = {name: state.hyper_parameters[name] for name in sections if name in state.hyper_parameters}
    init_from = settings.get("init_from")
    fine_tuned = f"- fine-tuned from {init_from}\n" if init_from else ""
    lines = "\n".join(data_lines(state, tokenizer, settings))
    counts = f"{state.step:,} optimizer steps, {state.tokens:,} tokens, {state.trained_s / 3600:.2f} hours"
    results = "".join(f"\n{line}" for line in losses(state))
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- {architecture}
- nanogpt_lit
---

# {source.stem}

A network of the architecture `{architecture}`: {size(config_of(state.hyper_parameters))}.

## Data

{lines}

## Training

{fine_tuned}- {counts}{results}

```json
{json.dumps(configs, indent=1, default=str)}
```

## Versions

- {written_by()}, Python {platform.python_version()}

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained("."), AutoTokenizer.from_pretrained(".")
inputs = tokenizer("{tokenizer.eot_text}", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```
"""


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
