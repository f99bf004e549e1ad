"""The Llama family as transformers describes it: LlamaForCausalLM, and Qwen3ForCausalLM with its norms of queries and
keys. Its weights have our names."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from nanogpt_lit.checkpoint.foreign_values import ForeignValues
from nanogpt_lit.errors import UserError
from nanogpt_lit.gpt.llama import LlamaConfig
from nanogpt_lit.gpt.network import HEAD
from nanogpt_lit.gpt.rotary import RopeScaling

BUFFERS = (".rotary_emb.inv_freq",)
"""Angles that older versions of transformers saved."""
AS_OURS = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "use_sliding_window": False}
"""Keys that our network has no choice of, with the value that is ours."""
FULL = "full_attention"
EPS = 1e-6
THETA = 10_000.0
SIZES: dict[str, dict[str, tuple[str, int | None]]] = {
    "llama": {
        "block_size": ("max_position_embeddings", 2048),
        "vocab_size": ("vocab_size", 32_000),
        "n_layer": ("num_hidden_layers", 32),
        "n_head": ("num_attention_heads", 32),
        "n_kv_head": ("num_key_value_heads", None),
        "n_embd": ("hidden_size", 4096),
        "head_size": ("head_dim", None),
        "n_hidden": ("intermediate_size", 11_008),
    }
}
"""Our names, theirs, and their default, by model_type."""
SIZES["qwen3"] = SIZES["llama"] | {
    "block_size": ("max_position_embeddings", 32_768),
    "vocab_size": ("vocab_size", 151_936),
    "n_kv_head": ("num_key_value_heads", 32),
    "head_size": ("head_dim", 128),
    "n_hidden": ("intermediate_size", 22_016),
}
SCALING = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_block_size": "original_max_position_embeddings",
}
"""Our names and theirs."""


def config_of(described: Mapping[str, Any], path: Path) -> LlamaConfig:
    """The network that config.json describes. Raises UserError, naming the file, for what ours lacks."""
    values = ForeignValues(path, described)
    values.check(AS_OURS)
    kinds = described.get("layer_types") or [FULL]
    if any(kind != FULL for kind in kinds):
        raise UserError(f"{path} has layer_types with others than {FULL}; this network attends to all tokens so far.")
    kind = described["model_type"]
    # transformers 5 has one dictionary for what were two keys.
    rope = described.get("rope_parameters") or described.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{path} has rope_parameters={rope!r:.60}, which is no dictionary.")
    sizes = {ours: values.size(*theirs) for ours, theirs in SIZES[kind].items()}
    if sizes["head_size"] == sizes["n_embd"] / sizes["n_head"]:
        sizes["head_size"] = None  # which says the same
    return LlamaConfig(
        **sizes,
        qk_norm=kind == "qwen3",
        norm_eps=values.number("rms_norm_eps", EPS),
        rope_base=ForeignValues(path, {**described, **rope}).number("rope_theta", THETA),
        rope_scaling=scaling_of(rope, path),
        tied_head=bool(described.get("tie_word_embeddings", False)),
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


def described_as(config: LlamaConfig, path: Path) -> dict[str, Any]:
    """The content of config.json, but for the tokenizer's ids. Raises UserError for what transformers refuses."""
    kind = "qwen3" if config.qk_norm else "llama"
    if kind == "llama" and config.n_embd % config.n_head:
        raise UserError(
            f"{path} has model.llama.n_embd={config.n_embd}, which n_head={config.n_head} does not divide, and "
            "transformers' Llama wants it to; --to gguf carries it."
        )
    rope: dict[str, Any] | None = None
    if (scaling := config.rope_scaling) is not None:
        rope = {"rope_type": "llama3", **{theirs: getattr(scaling, ours) for ours, theirs in SCALING.items()}}
    sizes = {theirs: getattr(config, ours) for ours, (theirs, _) in SIZES[kind].items()}
    return {
        "architectures": ["Qwen3ForCausalLM" if config.qk_norm else "LlamaForCausalLM"],
        "model_type": kind,
        **sizes,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.channels_per_head,
        "intermediate_size": config.hidden_channels,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_base,
        "rope_scaling": rope,
        "attention_bias": False,
        "attention_dropout": config.dropout,
        "tie_word_embeddings": config.tied_head,
    }


def our_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(BUFFERS)}


def their_names(weights: Mapping[str, Tensor], config: LlamaConfig) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in weights.items() if not (config.tied_head and name == HEAD)}
