"""A Hugging Face folder of GPT-2's architecture, to and from a RunState: weights and tokenizer, no optimizer.

It needs no transformers: the folder is safetensors and JSON. There the four matrices of a block are Conv1D's, stored
(in, out), the transpose of ours.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanogpt_lit.checkpoint.export import gpt2_config, model_card
from nanogpt_lit.checkpoint.foreign_files import is_zip, read_torch_file
from nanogpt_lit.checkpoint.network import chosen_tokenizer, network_of, new_run
from nanogpt_lit.checkpoint.state import RunState
from nanogpt_lit.data.hugging_face_tokenizer import to_hugging_face
from nanogpt_lit.data.tokenizer import EOT, Tokenizer
from nanogpt_lit.data.tokenizer_files import tokenizer_from_files
from nanogpt_lit.data.tokenizer_json import from_hugging_face, read_json
from nanogpt_lit.errors import UserError
from nanogpt_lit.gpt.gpt2 import GPTConfig
from nanogpt_lit.gpt.network import HEAD
from nanogpt_lit.runtime.durable import durable_folder
from nanogpt_lit.untrusted.config_values import plainly_named

CONFIG, GENERATION, CARD = "config.json", "generation_config.json", "README.md"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
ADAPTER = "adapter_config.json"
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
BUFFERS = (".attn.bias", ".attn.masked_bias")
"""Masks that older versions of transformers saved."""
ACTIVATIONS = {
    "gelu_new": "tanh",
    "gelu_pytorch_tanh": "tanh",
    "gelu": "erf",
}
"""Names of transformers, and our gelu; the first of a kind is the one that is written."""
AS_OURS = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "layer_norm_epsilon": 1e-5,
}
"""Keys of GPT2Config that our network has no choice of, with their default, which is ours."""


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
    described = read_json(folder / CONFIG)
    config = config_of(described, folder / CONFIG)
    weights = our_names(read_weights(folder))
    own = from_hugging_face(folder)
    if own is not None and tokenizer is not None:
        raise UserError(f"--tokenizer={tokenizer} names a tokenizer, and {folder} brings its own; leave it out.")
    assert config.vocab_size is not None
    return new_run(folder, weights, config, own or chosen_tokenizer(folder, config.vocab_size, tokenizer))


def config_of(described: Any, path: Path) -> GPTConfig:
    if not isinstance(described, dict):
        raise UserError(f"{path} holds no JSON object.")
    if (kind := described.get("model_type")) != "gpt2":
        raise UserError(
            f"{path} describes a network of type {kind!r}; convert reads GPT-2's architecture (model_type gpt2)."
        )
    for key, only in AS_OURS.items():
        if (value := described.get(key, only)) != only:
            raise UserError(f"{path} has {key}={value!r}; this network has {only!r} and nothing else.")
    try:
        sizes = {
            "block_size": described.get("n_positions", 1024),
            "vocab_size": described.get("vocab_size", 50257),
            "n_layer": described.get("n_layer", 12),
            "n_head": described.get("n_head", 12),
            "n_embd": described.get("n_embd", 768),
        }
        for key, size in sizes.items():
            if type(size) is not int or not 1 <= size < 2**31:
                raise UserError(f"{path} has {key}={size!r}, which is no size.")
        inner = described.get("n_inner")
        if inner not in (None, 4 * sizes["n_embd"]):
            raise UserError(f"{path} has n_inner={inner}; four times n_embd is what this network has.")
        name = described.get("activation_function", "gelu_new")
        if name not in ACTIVATIONS:
            raise UserError(f"{path} has activation_function={name!r}; {', '.join(ACTIVATIONS)} can be read.")
        return GPTConfig(
            **sizes,
            dropout=float(described.get("resid_pdrop", 0.1)),
            tied_head=bool(described.get("tie_word_embeddings", True)),
            gelu=ACTIVATIONS[name],  # type: ignore[arg-type]
        )
    except (TypeError, ValueError) as error:
        raise error if isinstance(error, UserError) else UserError(f"{path} is not a GPT-2's: {error}.") from error


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


def our_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Named as GPT's parameters, and turned as they are. GPT-2's first files lack the prefix `transformer.`."""
    ours = {}
    for name, tensor in tensors.items():
        if name.endswith(BUFFERS):
            continue
        if not name.startswith(("transformer.", "lm_head.")):
            name = f"transformer.{name}"
        ours[name] = tensor.t() if name.endswith(TRANSPOSED) and tensor.dim() == 2 else tensor
    return ours


def their_names(weights: Mapping[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    """The weights for GPT2LMHeadModel: transposed, and with zeros for biases that are not there."""
    theirs = {}
    for name, tensor in weights.items():
        if config.tied_head and name == HEAD:
            continue
        if name.endswith(TRANSPOSED):
            tensor = tensor.t()
        theirs[name] = tensor.contiguous()
        if not config.bias and (".h." in name or ".ln_f." in name):
            theirs[name.replace("weight", "bias")] = torch.zeros(tensor.size(-1))
    return theirs


def write(folder: Path, state: RunState, source: Path) -> list[str]:
    """Write a folder that AutoModelForCausalLM and AutoTokenizer open, and return remarks about it.

    source: where the run comes from, for errors and the model card
    Raises UserError for a network or a tokenizer that the folder cannot express.
    """
    gpt = network_of(source, state)
    config = gpt2_config(source, gpt, "Hugging Face's GPT2LMHeadModel")
    tokenizer = tokenizer_from_files(state.data["tokenizer"])
    described, tokenizer_json = their_config(config, tokenizer), to_hugging_face(tokenizer)
    notes = [] if config.bias else ["This network has no biases: the folder has zeros there, which is the same."]
    if tokenizer.kind == "char":
        notes.append("A character that the text did not have is left out by its tokenizer there, and refused here.")
    with durable_folder(folder) as partial:
        save_file(their_names(gpt.state_dict(), config), partial / WEIGHTS[0], metadata={"format": "pt"})
        for name, content in (
            (CONFIG, described),
            (GENERATION, their_generation(tokenizer)),
            ("tokenizer.json", tokenizer_json),
            ("tokenizer_config.json", their_tokenizer_config(config, tokenizer)),
        ):
            (partial / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        (partial / CARD).write_text(model_card(state, tokenizer, source), encoding="utf-8")
        # safetensors makes a file that nobody else may read, whatever the umask says.
        (partial / WEIGHTS[0]).chmod((partial / CARD).stat().st_mode)
    return notes


def their_config(config: GPTConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": next(name for name, ours in ACTIVATIONS.items() if ours == config.gelu),
        "n_positions": config.block_size,
        "vocab_size": config.vocab_size,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "attn_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": config.tied_head,
        "bos_token_id": tokenizer.eot,
        "eos_token_id": tokenizer.eot,
        "dtype": "float32",
    }


def their_generation(tokenizer: Tokenizer) -> dict[str, Any]:
    """generation_config.json, as `generate` here: a document begins and ends with end-of-text."""
    return {
        "bos_token_id": tokenizer.eot,
        "eos_token_id": tokenizer.eot,
        "pad_token_id": tokenizer.eot,
        "do_sample": True,
        "temperature": 0.8,
    }


def their_tokenizer_config(config: GPTConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.block_size,
        "bos_token": EOT,
        "eos_token": EOT,
        "pad_token": EOT,
        "clean_up_tokenization_spaces": False,
    }
