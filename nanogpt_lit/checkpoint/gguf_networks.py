"""The networks that we and llama.cpp have in common: names of their weights, and their shape in a GGUF file's metadata.

GPT-2 there has biases everywhere and the tanh approximation of GELU. Of the Llama family `llama` is without norms of
queries and keys, and keeps the channels that a rotation turns together side by side; `qwen3` is with them, and has the
order of transformers and ours.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nanogpt_lit.checkpoint.foreign_files import ForeignValues
from nanogpt_lit.checkpoint.gguf_file import GGUFFile
from nanogpt_lit.errors import UserError
from nanogpt_lit.gpt.gpt2 import GPTConfig
from nanogpt_lit.gpt.layers import RopeScaling, frequencies
from nanogpt_lit.gpt.llama import LlamaConfig
from nanogpt_lit.gpt.network import HEAD, NetworkConfig

EMBEDDING, OUTPUT, ROPE_FACTORS = "token_embd.weight", "output.weight", "rope_freqs.weight"
ROPE_ROUNDING = 1e-4
"""Relative; the factors are float32, and another parameter moves them by more."""


@dataclass(frozen=True)
class Names:
    """Names of weights, here and there."""

    blocks: str
    outside: Mapping[str, str]
    inside: Mapping[str, str]

    def there(self, name: str) -> str:
        part, _, kind = name.rpartition(".")
        if part.startswith(self.blocks):
            layer, _, part = part.removeprefix(self.blocks).partition(".")
            return f"blk.{layer}.{self.inside[part]}.{kind}"
        return f"{self.outside[part]}.{kind}"

    def here(self, name: str) -> str:
        """A name that is not known stays as it is."""
        part, _, kind = name.rpartition(".")
        inside, outside = ({theirs: ours for ours, theirs in names.items()} for names in (self.inside, self.outside))
        match part.split(".", 2):
            case ["blk", layer, part] if part in inside:
                return f"{self.blocks}{layer}.{inside[part]}.{kind}"
        return f"{outside[part]}.{kind}" if part in outside else name


GPT2_NAMES = Names(
    "transformer.h.",
    {
        "transformer.wte": "token_embd",
        "transformer.wpe": "position_embd",
        "transformer.ln_f": "output_norm",
        "lm_head": "output",
    },
    {
        "ln_1": "attn_norm",
        "attn.c_attn": "attn_qkv",
        "attn.c_proj": "attn_output",
        "ln_2": "ffn_norm",
        "mlp.c_fc": "ffn_up",
        "mlp.c_proj": "ffn_down",
    },
)
LLAMA_NAMES = Names(
    "model.layers.",
    {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"},
    {
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    },
)
NAMES = {"gpt2": GPT2_NAMES, "llama": LLAMA_NAMES, "qwen3": LLAMA_NAMES}
"""Names of the weights, by llama.cpp's name of the architecture."""


def architecture_of(config: NetworkConfig) -> str:
    if isinstance(config, LlamaConfig):
        return "qwen3" if config.qk_norm else "llama"
    return "gpt2"


# Weights.


def their_weights(weights: Mapping[str, Tensor], config: NetworkConfig) -> dict[str, Tensor]:
    """The weights in llama.cpp's order of channels, under our names still; a tied head is left out."""
    ours = {name: tensor for name, tensor in weights.items() if not (config.tied_head and name == HEAD)}
    if architecture_of(config) != "llama":
        return ours
    assert isinstance(config, LlamaConfig)
    return {name: side_by_side(tensor, heads_of(name, config)) for name, tensor in ours.items()}


def our_weights(tensors: Mapping[str, Tensor], config: NetworkConfig) -> dict[str, Tensor]:
    """The weights of a file, under our names and in our order of channels."""
    names = NAMES[architecture_of(config)]
    ours = {names.here(name): tensor for name, tensor in tensors.items() if name != ROPE_FACTORS}
    if architecture_of(config) != "llama":
        return ours
    assert isinstance(config, LlamaConfig)
    return {name: in_halves(tensor, heads_of(name, config)) for name, tensor in ours.items()}


def heads_of(name: str, config: LlamaConfig) -> int:
    """The heads whose channels a matrix makes; 0 for one whose channels are not rotated."""
    return {"q_proj.weight": config.n_head, "k_proj.weight": config.kv_heads}.get(name.rpartition("self_attn.")[2], 0)


def side_by_side(matrix: Tensor, heads: int) -> Tensor:
    """Rows i and i + D / 2 of each head's D, one below the other."""
    if not heads:
        return matrix
    return matrix.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(matrix.shape)


def in_halves(matrix: Tensor, heads: int) -> Tensor:
    """The opposite of `side_by_side`; a matrix that no such heads can have made stays as it is."""
    if not heads or matrix.size(0) % (2 * heads):
        return matrix
    return matrix.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(matrix.shape)


# Shapes.


def add_shape(writer: Any, config: NetworkConfig, name: str) -> None:
    """Write the shape through a gguf.GGUFWriter of the network's architecture."""
    writer.add_name(name)
    writer.add_block_count(config.n_layer)
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_head_count(config.n_head)
    if not isinstance(config, LlamaConfig):
        writer.add_feed_forward_length(4 * config.n_embd)
        writer.add_layer_norm_eps(1e-5)
        return
    D = config.channels_per_head
    writer.add_feed_forward_length(config.hidden_channels)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(D)
    writer.add_value_length(D)
    writer.add_rope_dimension_count(D)
    writer.add_rope_freq_base(config.rope_base)
    writer.add_layer_norm_rms_eps(config.norm_eps)


def rope_factors(config: NetworkConfig) -> Tensor | None:
    """Divisors of each pair of channels' angles, (D / 2,); None where no rotation is slowed down."""
    if not isinstance(config, LlamaConfig) or config.rope_scaling is None:
        return None
    D, base = config.channels_per_head, config.rope_base
    return frequencies(D, base) / frequencies(D, base, config.rope_scaling)


def named_architecture(file: GGUFFile) -> str:
    """llama.cpp's name. Raises UserError for one that is none of ours."""
    name = file.metadata.get("general.architecture")
    if name not in NAMES:
        raise UserError(f"{file.path} is a GGUF file of the architecture {name!r}; convert reads {', '.join(NAMES)}.")
    return str(name)


def config_of(file: GGUFFile, tensors: Mapping[str, Tensor]) -> NetworkConfig:
    """The shape that the file describes. tensors: its own, by its names

    Raises UserError for what our network lacks.
    """
    architecture = named_architecture(file)
    shape = ForeignValues(file.path, file.metadata, f"{architecture}.")
    embedding, head = tensors.get(EMBEDDING), tensors.get(OUTPUT)
    if embedding is None:
        raise UserError(f"{file.path} lacks {EMBEDDING}; it holds no network.")
    common: dict[str, Any] = {
        "block_size": shape.size("context_length"),
        "vocab_size": embedding.size(0),
        "n_layer": shape.size("block_count"),
        "n_head": shape.size("attention.head_count"),
        "n_embd": shape.size("embedding_length"),
        "tied_head": head is None or torch.equal(head, embedding),
    }
    if architecture == "gpt2":
        shape.check({"feed_forward_length": 4 * common["n_embd"]})
        eps = shape.number("attention.layer_norm_epsilon", 1e-5)
        if abs(eps - 1e-5) > 1e-9:
            raise UserError(f"{file.path} has gpt2.attention.layer_norm_epsilon={eps}; this network has 1e-05.")
        return GPTConfig(**common)
    shape.check({"expert_count": 0, "attention.sliding_window": 0, "rope.scaling.type": "none"})
    D = shape.size("attention.key_length", max(1, common["n_embd"] // common["n_head"]))
    shape.check({"attention.value_length": D, "rope.dimension_count": D})
    config = LlamaConfig(
        **common,
        n_kv_head=shape.size("attention.head_count_kv", common["n_head"]),
        head_size=None if D * common["n_head"] == common["n_embd"] else D,
        n_hidden=shape.size("feed_forward_length"),
        qk_norm=architecture == "qwen3",
        # They are float32 there: 9.999999747378752e-06 is 1e-5 and stays what the file says in float32.
        norm_eps=float(f"{shape.number('attention.layer_norm_rms_epsilon'):.7g}"),
        rope_base=float(f"{shape.number('rope.freq_base', 10_000.0):.7g}"),
    )
    factors = tensors.get(ROPE_FACTORS)
    return config if factors is None else with_rope_factors(config, factors, file)


def with_rope_factors(config: LlamaConfig, factors: Tensor, file: GGUFFile) -> LlamaConfig:
    """The shape with the stretching that gives these factors, if it is as Llama 3's. Raises UserError for another."""
    largest = float(factors.max())
    if largest > 0:
        stretched = replace(config, rope_scaling=RopeScaling(factor=largest))
        expected = rope_factors(stretched)
        assert expected is not None
        if expected.shape == factors.shape and torch.allclose(expected, factors, rtol=ROPE_ROUNDING, atol=0):
            return stretched
    raise UserError(
        f"{file.path} stretches its positions ({ROPE_FACTORS}) in another way than Llama 3, which can be read."
    )
