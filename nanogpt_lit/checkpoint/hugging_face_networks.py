"""The networks that we and transformers have in common: their config.json, and the names of their weights.

Of GPT-2, transformers stores the four matrices of a block as Conv1D's, (in, out), the transpose of ours. The Llama
family, LlamaForCausalLM and Qwen3ForCausalLM with its norms of queries and keys, has our names.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanogpt_lit.checkpoint.foreign_files import ForeignValues
from nanogpt_lit.errors import UserError
from nanogpt_lit.gpt.gpt2 import GPTConfig
from nanogpt_lit.gpt.layers import RopeScaling
from nanogpt_lit.gpt.llama import LlamaConfig
from nanogpt_lit.gpt.network import HEAD, NetworkConfig

ARCHITECTURES = ("gpt2", "llama", "qwen3")
"""Values of model_type."""
SIZES: dict[str, dict[str, tuple[str, int | None]]] = {
    "gpt2": {
        "block_size": ("n_positions", 1024),
        "vocab_size": ("vocab_size", 50257),
        "n_layer": ("n_layer", 12),
        "n_head": ("n_head", 12),
        "n_embd": ("n_embd", 768),
    },
    "llama": {
        "block_size": ("max_position_embeddings", 2048),
        "vocab_size": ("vocab_size", 32_000),
        "n_layer": ("num_hidden_layers", 32),
        "n_head": ("num_attention_heads", 32),
        "n_kv_head": ("num_key_value_heads", None),
        "n_embd": ("hidden_size", 4096),
        "head_size": ("head_dim", None),
        "n_hidden": ("intermediate_size", 11_008),
    },
}
"""Our names, theirs, and their default, by model_type."""
SIZES["qwen3"] = SIZES["llama"] | {
    "block_size": ("max_position_embeddings", 32_768),
    "vocab_size": ("vocab_size", 151_936),
    "n_kv_head": ("num_key_value_heads", 32),
    "head_size": ("head_dim", 128),
    "n_hidden": ("intermediate_size", 22_016),
}
AS_OURS: dict[str, dict[str, Any]] = {
    "gpt2": {
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
        "layer_norm_epsilon": 1e-5,
    },
    "llama": {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "use_sliding_window": False},
}
"""Keys that our network has no choice of, with the value that is ours; a key that is not there has it."""
AS_OURS["qwen3"] = AS_OURS["llama"]
BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
"""Masks and angles that older versions of transformers saved."""
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
ACTIVATIONS = {
    "gelu_new": "tanh",
    "gelu_pytorch_tanh": "tanh",
    "gelu": "erf",
}
"""Names of transformers, and our gelu; the first of a kind is the one that is written."""
FULL = "full_attention"
EPS, THETA = 1e-6, 10_000.0
"""Defaults of the Llama family."""
SCALING = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_block_size": "original_max_position_embeddings",
}
"""Our names and theirs."""


def config_of(described: Mapping[str, Any], path: Path) -> NetworkConfig:
    """The network that config.json describes. Raises UserError, naming the file, for what ours lacks."""
    kind = str(described.get("model_type"))
    if kind not in ARCHITECTURES:
        raise UserError(f"{path} describes a network of type {kind!r}; convert reads {', '.join(ARCHITECTURES)}.")
    values = ForeignValues(path, described)
    try:
        values.check(AS_OURS[kind])
        sizes = {ours: values.size(*theirs) for ours, theirs in SIZES[kind].items()}
        return (gpt2_of if kind == "gpt2" else llama_of)(values, kind, sizes)
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} is not as {kind}'s: {error}.") from error


def gpt2_of(values: ForeignValues, kind: str, sizes: dict[str, Any]) -> GPTConfig:
    inner = values.get("n_inner", None)
    if inner not in (None, 4 * sizes["n_embd"]):
        raise UserError(f"{values.path} has n_inner={inner}; four times n_embd is what this network has.")
    name = values.get("activation_function", "gelu_new")
    if name not in ACTIVATIONS:
        raise UserError(f"{values.path} has activation_function={name!r}; {', '.join(ACTIVATIONS)} can be read.")
    return GPTConfig(
        **sizes,
        dropout=float(values.get("resid_pdrop", 0.1)),
        tied_head=bool(values.get("tie_word_embeddings", True)),
        gelu=ACTIVATIONS[name],  # type: ignore[arg-type]
    )


def llama_of(values: ForeignValues, kind: str, sizes: dict[str, Any]) -> LlamaConfig:
    path = values.path
    if any(layer != FULL for layer in values.get("layer_types", None) or [FULL]):
        raise UserError(f"{path} has layer_types with others than {FULL}; this network attends to all tokens so far.")
    # transformers 5 has one dictionary for what were two keys.
    rope = values.get("rope_parameters", None) or values.get("rope_scaling", None) or {}
    if not isinstance(rope, dict):
        raise UserError(f"{path} has rope_parameters={rope!r:.60}, which is no dictionary.")
    if sizes["head_size"] == sizes["n_embd"] / sizes["n_head"]:
        sizes["head_size"] = None  # which says the same
    return LlamaConfig(
        **sizes,
        qk_norm=kind == "qwen3",
        norm_eps=values.number("rms_norm_eps", EPS),
        rope_base=ForeignValues(path, {**values.values, **rope}).number("rope_theta", THETA),
        rope_scaling=scaling_of(rope, path),
        tied_head=bool(values.get("tie_word_embeddings", False)),
    )


def scaling_of(rope: Mapping[str, Any], path: Path) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise UserError(f"{path} stretches its positions by rope_type={kind!r}; llama3 can be read.")
    missing = [theirs for theirs in SCALING.values() if theirs not in rope]
    if missing:
        raise UserError(f"{path} has rope_type='llama3' without {missing[0]}.")
    values = {ours: ForeignValues(path, rope).number(theirs) for ours, theirs in SCALING.items()}
    return RopeScaling(**{**values, "original_block_size": int(values["original_block_size"])})  # type: ignore[arg-type]


def described_as(config: NetworkConfig, path: Path) -> dict[str, Any]:
    """The content of config.json, but for the tokenizer's ids. Raises UserError for what transformers refuses."""
    kind = "gpt2" if not isinstance(config, LlamaConfig) else "qwen3" if config.qk_norm else "llama"
    common = {
        "model_type": kind,
        **{theirs: getattr(config, ours) for ours, (theirs, _) in SIZES[kind].items()},
        "tie_word_embeddings": config.tied_head,
    }
    if not isinstance(config, LlamaConfig):
        assert isinstance(config, GPTConfig)
        return {
            "architectures": ["GPT2LMHeadModel"],
            **common,
            "activation_function": next(name for name, ours in ACTIVATIONS.items() if ours == config.gelu),
            "attn_pdrop": config.dropout,
            "embd_pdrop": config.dropout,
            "resid_pdrop": config.dropout,
            "layer_norm_epsilon": 1e-5,
        }
    if kind == "llama" and config.n_embd % config.n_head:
        raise UserError(
            f"{path} has model.llama.n_embd={config.n_embd}, which n_head={config.n_head} does not divide, and "
            "transformers' Llama wants it to; --to gguf carries it."
        )
    rope: dict[str, Any] | None = None
    if (scaling := config.rope_scaling) is not None:
        rope = {"rope_type": "llama3", **{theirs: getattr(scaling, ours) for ours, theirs in SCALING.items()}}
    return {
        "architectures": ["Qwen3ForCausalLM" if config.qk_norm else "LlamaForCausalLM"],
        **common,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.channels_per_head,
        "intermediate_size": config.hidden_channels,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_base,
        "rope_scaling": rope,
        "attention_bias": False,
    }


def our_weights(tensors: Mapping[str, Tensor], config: NetworkConfig) -> dict[str, Tensor]:
    """Named as our parameters, and turned as they are. GPT-2's first files lack the prefix `transformer.`."""
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(BUFFERS)}
    if isinstance(config, LlamaConfig):
        return tensors
    ours = {}
    for name, tensor in tensors.items():
        if not name.startswith(("transformer.", "lm_head.")):
            name = f"transformer.{name}"
        ours[name] = tensor.t() if name.endswith(TRANSPOSED) and tensor.dim() == 2 else tensor
    return ours


def their_weights(weights: Mapping[str, Tensor], config: NetworkConfig) -> dict[str, Tensor]:
    """The weights for transformers' module: GPT-2's transposed, and with zeros for biases that are not there."""
    weights = {name: tensor for name, tensor in weights.items() if not (config.tied_head and name == HEAD)}
    if isinstance(config, LlamaConfig):
        return weights
    assert isinstance(config, GPTConfig)
    theirs = {}
    for name, tensor in weights.items():
        theirs[name] = (tensor.t() if name.endswith(TRANSPOSED) else tensor).contiguous()
        if not config.bias and (".h." in name or ".ln_f." in name):
            theirs[name.replace("weight", "bias")] = torch.zeros(theirs[name].size(-1))
    return theirs
