"""What a model is, on one page: its README for people who did not train it."""

import json
from pathlib import Path
from typing import Any

from nanogpt_lit.checkpoint.network import size
from nanogpt_lit.checkpoint.run_file import written_by
from nanogpt_lit.checkpoint.state import RunState
from nanogpt_lit.data.tokenizer import EOT, Tokenizer

RUN_YAML = "config.yaml"
"""What `fit` keeps of a run's settings, in the folder above its checkpoints."""


def model_card(state: RunState, tokenizer: Tokenizer, source: Path) -> str:
    """Markdown with data, settings, losses and versions, as far as the run knows them.

    source: the checkpoint; beside its folder lies the YAML of a run of ours
    """
    gpt = state.hyper_parameters["gpt"]
    settings = run_settings(source)
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
        f"A GPT-2-class network: {size(gpt)}.",
        "",
        "## Training",
        "",
        f"- {state.step:,} optimizer steps, {state.tokens:,} tokens",
        *(f"- {name} validation loss {loss:.4f}, at step {step:,}" for name, (step, loss) in losses(state)),
        f"- tokenizer: {tokenizer.name}, {tokenizer.vocab_size:,} tokens; a document begins with id {tokenizer.eot}",
        f"- written by {written_by()}",
        "",
        "## Settings",
        "",
        "```json",
        json.dumps(dict(state.hyper_parameters), indent=1, default=str),
        "```",
        "",
        *(
            ["The whole YAML of the run, with its data:", "", "```yaml", settings.strip(), "```", ""]
            if settings
            else []
        ),
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


def losses(state: RunState) -> list[tuple[str, Any]]:
    return [(name, found) for name, found in state.validations.items() if found is not None]


def run_settings(source: Path) -> str | None:
    path = source.parent.parent / RUN_YAML
    if source.parent.name != "checkpoints" or not path.is_file():
        return None
    return path.read_text(encoding="utf-8")
