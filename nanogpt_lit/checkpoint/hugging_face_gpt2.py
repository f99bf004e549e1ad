"""GPT-2 as transformers describes it and names its weights.

There the four matrices of a block are Conv1D's, stored (in, out), the transpose of ours.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanogpt_lit.checkpoint.foreign_values import ForeignValues
from nanogpt_lit.errors import UserError
from nanogpt_lit.gpt.gpt2 import GPTConfig
from nanogpt_lit.gpt.network import HEAD

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
SIZES = {
    "block_size": ("n_positions", 1024),
    "vocab_size": ("vocab_size", 50257),
    "n_layer": ("n_layer", 12),
    "n_head": ("n_head", 12),
    "n_embd": ("n_embd", 768),
}
"""Our names, theirs, and their default."""


def config_of(described: Mapping[str, Any], path: Path) -> GPTConfig:
    """The network that config.json describes. Raises UserError, naming the file, for what ours lacks."""
    values = ForeignValues(path, described)
    values.check(AS_OURS)
    sizes = {ours: values.size(*theirs) for ours, theirs in SIZES.items()}
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


def described_as(config: GPTConfig, path: Path) -> dict[str, Any]:
    """The content of config.json, but for the tokenizer's ids."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": next(name for name, ours in ACTIVATIONS.items() if ours == config.gelu),
        **{theirs: getattr(config, ours) for ours, (theirs, _) in SIZES.items()},
        "attn_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": config.tied_head,
    }


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
