"""The next rung of the ladder, taken while a network trains."""

from dataclasses import asdict, replace
from typing import Any

from torch import nn

from nanogpt_lit.gpt.loss import cross_entropy
from nanogpt_lit.gpt.model import GPT, Block
from nanogpt_lit.memory.ladder import TECHNIQUES
from nanogpt_lit.memory.techniques import MemoryConfig, apply_techniques

RECOMPUTE = ("none", "selective", "full")


def next_rung(memory: MemoryConfig, casts_weights: bool) -> tuple[str, MemoryConfig] | None:
    """What the next technique does, and the settings with it; None when there is no further one inside a network.

    casts_weights: whether autocast copies the weights to 16 bits
    """
    if memory.weights != "card":  # its layers are made for weights that come and go
        return None
    for name, changes in TECHNIQUES:
        if changes.keys() & {"optimizer_state", "weights"} or ("recast_weights" in changes and not casts_weights):
            continue
        if "loss_chunk_tokens" in changes and memory.loss_chunk_tokens is not None:
            continue
        if RECOMPUTE.index(changes.get("recompute", memory.recompute)) < RECOMPUTE.index(memory.recompute):
            continue
        climbed = replace(memory, **changes)
        if climbed != memory and as_high(climbed, memory):
            return name.removeprefix("+ "), climbed
    return None


def as_high(one: MemoryConfig, other: MemoryConfig) -> bool:
    """Whether one uses all techniques inside a network that the other does, or stronger ones of the kind."""
    return all(a >= b for a, b in zip(_heights(one), _heights(other), strict=True))


def _heights(memory: MemoryConfig) -> list[Any]:
    recompute = RECOMPUTE.index(memory.recompute)
    # What is computed again keeps no copies of weights.
    recast = memory.recast_weights or (memory.recompute, memory.recompute_every) == ("full", 1)
    on_host = memory.block_inputs == "host"
    return [memory.loss_chunk_tokens is not None, recast, (recompute, -memory.recompute_every), on_host]


def climb(gpt: GPT, memory: MemoryConfig) -> None:
    """Makes a network that trains go on with these settings; the weights stay where they are, on the card."""
    for block in gpt.transformer.h:
        block.__class__ = Block
        for part in block.modules():
            if isinstance(part, nn.Linear):
                part.__class__ = nn.Linear
    gpt.cross_entropy = cross_entropy
    apply_techniques(gpt, memory)


def changed(memory: MemoryConfig, own: MemoryConfig) -> dict[str, Any]:
    """The fields of memory that differ from the user's own."""
    theirs = asdict(own)
    return {name: value for name, value in asdict(memory).items() if value != theirs[name]}
