"""A Hugging Face folder, to and from a RunState: weights, tokenizer and model card, no optimizer.

It needs no transformers: the folder is safetensors and JSON.
"""

import json
import math
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanogpt_lit.checkpoint.exchange import chosen_tokenizer, network_of, new_run, size
from nanogpt_lit.checkpoint.foreign_files import is_zip, read_torch_file
from nanogpt_lit.checkpoint.hugging_face_networks import config_of, described_as, our_weights, their_weights
from nanogpt_lit.checkpoint.run_file import written_by
from nanogpt_lit.checkpoint.state import RunState
from nanogpt_lit.data.tokenizer import Conventions, Tokenizer
from nanogpt_lit.data.tokenizer_files import tokenizer_from_files
from nanogpt_lit.data.tokenizer_json_reader import from_hugging_face, read_json
from nanogpt_lit.data.tokenizer_json_writer import to_hugging_face
from nanogpt_lit.errors import UserError
from nanogpt_lit.gpt import networks
from nanogpt_lit.gpt.network import NetworkConfig
from nanogpt_lit.runtime.durable import durable_folder
from nanogpt_lit.untrusted.config_values import plainly_named
from nanogpt_lit.untrusted.yaml_file import load_yaml_file

CONFIG, GENERATION, CARD = "config.json", "generation_config.json", "README.md"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
ADAPTER = "adapter_config.json"


def recognises(path: Path) -> bool:
    return (path / CONFIG).is_file() or (path / ADAPTER).is_file()


def read(folder: Path, tokenizer: str | None = None) -> RunState:
    """The network at step 0. tokenizer: its name, for a folder without one

    Raises UserError, naming the file, for another architecture, and for what is missing, damaged or not what
    config.json says.
    """
    if (folder / ADAPTER).is_file() and not (folder / CONFIG).is_file():
        raise UserError(
            f"{folder} holds a PEFT adapter; merge it into its model first (merge_and_unload), and save that."
        )
    described, path = read_json(folder / CONFIG), folder / CONFIG
    if not isinstance(described, dict):
        raise UserError(f"{path} holds no JSON object.")
    config = config_of(described, path)
    weights = our_weights(read_weights(folder), config)
    assert config.vocab_size is not None
    own = from_hugging_face(folder)
    if own is not None and tokenizer is not None:
        raise UserError(f"--tokenizer={tokenizer} names a tokenizer, and {folder} brings its own; leave it out.")
    return new_run(folder, weights, config, own or chosen_tokenizer(folder, config.vocab_size, tokenizer))


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of the folder, from one file or from those that an index names."""
    for name in WEIGHTS:
        if (folder / name).is_file():
            return read_file(folder / name)
        index = folder / f"{name}.index.json"
        if index.is_file():
            try:
                files = sorted(set(read_json(index)["weight_map"].values()))
            except (KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{index} names no files (weight_map).") from error
            tensors: dict[str, Tensor] = {}
            for file in files:
                # The hub's own folders hold links to files elsewhere in its cache.
                tensors |= read_file(plainly_named(folder, file, index.name))
            return tensors
    raise UserError(f"{folder} holds neither {WEIGHTS[0]} nor {WEIGHTS[1]}; fetch all files of the model.")


def read_file(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # No zip archive: as torch wrote before 1.6, GPT-2's own file among them.
        old = not is_zip(path)
        content = torch.load(path, map_location="cpu", weights_only=True) if old else read_torch_file(path)
        if not isinstance(content, dict) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
            raise TypeError("more than named tensors")
        return dict(content)
    except Exception as error:  # the readers' errors are not one family
        if isinstance(error, SafetensorError | OSError):
            reason = "damaged or cut short"
        else:
            reason = "damaged, or holds more than tensors, which could run code, and is not read"
        raise UserError(f"{path} is {reason} ({type(error).__name__}).") from error


def write(folder: Path, state: RunState, source: Path) -> list[str]:
    """Write a folder that AutoModelForCausalLM and AutoTokenizer open, and return remarks about it.

    source: where the run comes from, for errors and the model card
    Raises UserError for a network or a tokenizer that the folder cannot express.
    """
    gpt = network_of(source, state)
    config = gpt.config
    tokenizer = tokenizer_from_files(state.data["tokenizer"])
    ends = tokenizer.conventions or Conventions(tokenizer.eot_text, tokenizer.eot_text, adds_bos=False)
    described, tokenizer_json = described_as(config, source), to_hugging_face(tokenizer)
    ids = {f"{name}_token_id": None if text is None else tokenizer.id_of(text) for name, text in texts_of(ends).items()}
    notes = []
    if not getattr(config, "bias", True):
        notes.append("This network has no biases: the folder has zeros there, which is the same.")
    if tokenizer.kind == "char":
        notes.append("A character that the text did not have is left out by its tokenizer there, and refused here.")
    with durable_folder(folder) as partial:
        save_file(their_weights(gpt.state_dict(), config), partial / WEIGHTS[0], metadata={"format": "pt"})
        for name, content in (
            (CONFIG, {**described, **ids, "dtype": "float32"}),
            (GENERATION, their_generation(ids, tokenizer)),
            ("tokenizer.json", tokenizer_json),
            ("tokenizer_config.json", their_tokenizer_config(config, tokenizer, ends)),
        ):
            (partial / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        (partial / CARD).write_text(model_card(state, tokenizer, source, described["model_type"]), encoding="utf-8")
        # safetensors makes a file that nobody else may read, whatever the umask says.
        (partial / WEIGHTS[0]).chmod((partial / CARD).stat().st_mode)
    return notes


def texts_of(ends: Conventions) -> dict[str, str | None]:
    return {"bos": ends.bos, "eos": ends.eos}


def their_generation(ids: Mapping[str, int | None], tokenizer: Tokenizer) -> dict[str, Any]:
    """generation_config.json, as `generate` here: a document ends with end-of-text, and an answer with the token that
    ends it there."""
    ends = list(dict.fromkeys(token for token in (ids["eos_token_id"], tokenizer.eot) if token is not None))
    return {
        **ids,
        "eos_token_id": ends[0] if len(ends) == 1 else ends,
        "pad_token_id": tokenizer.eot,
        "do_sample": True,
        "temperature": 0.8,
    }


def their_tokenizer_config(config: NetworkConfig, tokenizer: Tokenizer, ends: Conventions) -> dict[str, Any]:
    template = tokenizer.chat_template
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.block_size,
        **{f"{name}_token": text for name, text in texts_of(ends).items()},
        "pad_token": tokenizer.eot_text,
        "clean_up_tokenization_spaces": False,
        **({} if template is None else {"chat_template": template}),
    }


# The model card: what the network was trained on, for how long, and how well it does.


RUN_YAML = "config.yaml"
"""The file in which `fit` keeps a run's settings, in the folder above its checkpoints."""
DATA = ("source", "val_fraction", "documents", "special_tokens")
"""Keys of the YAML's data section: what the text was, and how it was read."""


def model_card(state: RunState, tokenizer: Tokenizer, source: Path, architecture: str) -> str:
    """Markdown with data, settings, losses and versions, as far as the run knows them.

    architecture: transformers' name for it   source: the checkpoint; beside its folder lies the YAML of a run of ours
    """
    settings, shape = run_settings(source), networks.config_of(state.hyper_parameters)
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

A network of the architecture `{architecture}`: {size(shape)}.

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
