"""llm.c's model files, read as a RunState: a header of 256 int32 and then the weights, in float32 or bfloat16."""

import math
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nanogpt_lit.checkpoint.exchange import chosen_tokenizer, new_run
from nanogpt_lit.checkpoint.state import RunState
from nanogpt_lit.errors import UserError
from nanogpt_lit.gpt.gpt2 import GPTConfig

MAGIC = 20240326
HEADER = 256
DTYPES = {3: torch.float32, 5: torch.bfloat16}
"""Types of the weights by the version in the header. Earlier ones had no padded vocabulary."""


def recognises(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == MAGIC.to_bytes(4, "little")


def read(path: Path, tokenizer: str | None = None) -> RunState:
    """The network at step 0. Raises UserError, naming the file, for a header that its size does not bear out."""
    with path.open("rb") as file:
        header = np.fromfile(file, dtype="<i4", count=HEADER)
    if len(header) < HEADER:
        raise UserError(f"{path} is the beginning of a model of llm.c and nothing more.")
    version, T, V, L, H, C, padded = (int(number) for number in header[1:8])
    if version not in DTYPES:
        raise UserError(f"{path} is a model of llm.c in version {version}; 3 (float32) and 5 (bfloat16) can be read.")
    if min(T, V, L, H, C, padded) < 1 or padded < V:
        raise UserError(
            f"{path} is a model of llm.c whose header makes no sense: block {T}, vocabulary {V} of {padded}, "
            f"{L} layers, {H} heads, {C} channels."
        )
    shapes = {
        "wte.weight": (padded, C),
        "wpe.weight": (T, C),
        "ln_1.weight": (L, C),
        "ln_1.bias": (L, C),
        "attn.c_attn.weight": (L, 3 * C, C),
        "attn.c_attn.bias": (L, 3 * C),
        "attn.c_proj.weight": (L, C, C),
        "attn.c_proj.bias": (L, C),
        "ln_2.weight": (L, C),
        "ln_2.bias": (L, C),
        "mlp.c_fc.weight": (L, 4 * C, C),
        "mlp.c_fc.bias": (L, 4 * C),
        "mlp.c_proj.weight": (L, C, 4 * C),
        "mlp.c_proj.bias": (L, C),
        "ln_f.weight": (C,),
        "ln_f.bias": (C,),
    }  # in the order of the file
    dtype = DTYPES[version]
    numbers = sum(math.prod(shape) for shape in shapes.values())
    expected = HEADER * 4 + numbers * dtype.itemsize
    if (found := path.stat().st_size) != expected:
        raise UserError(
            f"{path} has {found:,} bytes, and a model of llm.c with its header has {expected:,}; it is cut short."
        )
    weights: dict[str, Tensor] = {}
    with path.open("rb") as file:
        file.seek(HEADER * 4, os.SEEK_SET)
        for name, shape in shapes.items():
            content = np.fromfile(file, dtype="<f4" if dtype == torch.float32 else "<i2", count=math.prod(shape))
            tensor = torch.from_numpy(content).view(dtype).view(shape)
            if len(shape) > 1 and name[0] != "w":
                weights |= {f"transformer.h.{layer}.{name}": tensor[layer] for layer in range(L)}
            else:
                weights[f"transformer.{name}"] = tensor[:V] if name == "wte.weight" else tensor
    config = GPTConfig(block_size=T, vocab_size=V, n_layer=L, n_head=H, n_embd=C)
    return new_run(path, weights, config, chosen_tokenizer(path, V, tokenizer))
