"""Export of a network to another program: what that cannot express, and what it computes otherwise, measured."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from nanogpt_lit.data.tokenizer import Tokenizer
from nanogpt_lit.errors import UserError
from nanogpt_lit.gpt.generate import generate
from nanogpt_lit.gpt.gpt2 import GPT, GPTConfig
from nanogpt_lit.gpt.network import Network

TEXTS, TOKENS = 4, 256


def gpt2_config(path: Path, gpt: Network, name: str) -> GPTConfig:
    """The shape of a GPT-2. Raises UserError for another network, which the format called `name` cannot express."""
    if not isinstance(gpt, GPT):
        raise UserError(
            f"{path} holds a network of the Llama family (model.network=llama), which {name} cannot express; --to hf "
            "and --to gguf carry it."
        )
    return gpt.config


def measured_effect(gpt: Network, exported: Network, tokenizer: Tokenizer) -> str:
    """Both losses on text that the network writes itself, which needs no data and is what it is good at.

    exported: the network as the other program will compute it
    """
    start = torch.full((TEXTS, 1), tokenizer.eot)
    length = min(gpt.config.block_size, TOKENS)
    drawn = generate(
        gpt, start, length, temperature=1.0, generator=torch.Generator().manual_seed(1), vocab_size=tokenizer.vocab_size
    )
    text = torch.cat([start, *(tokens[:, None] for tokens in drawn)], dim=1)[:, : length + 1]  # (4, T + 1)
    here, there = loss(gpt, text), loss(exported, text)
    return f"on {TEXTS * length:,} tokens that it wrote itself the loss is {there:.4f} there and {here:.4f} here"


@torch.no_grad()
def loss(gpt: Network, text: Tensor) -> float:
    return float(F.cross_entropy(gpt.eval()(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten()))
