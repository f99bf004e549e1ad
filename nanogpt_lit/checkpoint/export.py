"""What another program's GPT-2 cannot compute, and how much a network loses where it computes or rounds otherwise."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from nanogpt_lit.data.tokenizer import Tokenizer
from nanogpt_lit.errors import UserError
from nanogpt_lit.gpt.generate import generate
from nanogpt_lit.gpt.model import GPT, GPTConfig

TEXTS, TOKENS = 4, 256


def check_expressible(path: Path, config: GPTConfig, name: str) -> None:
    """Raises UserError for what GPT-2's architecture lacks, in whichever format."""
    for key, only in (("positions", "learned"), ("qk_norm", False)):
        if (value := getattr(config, key)) != only:
            raise UserError(
                f"{path} has model.gpt.{key}={value}, which {name} cannot express in GPT-2's architecture; a network "
                f"trained with model.gpt.{key}={only} can go there."
            )


def measured_effect(gpt: GPT, exported: GPT, tokenizer: Tokenizer) -> str:
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
def loss(gpt: GPT, text: Tensor) -> float:
    return float(F.cross_entropy(gpt.eval()(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten()))
