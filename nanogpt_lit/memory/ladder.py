"""The ways to need less memory, from none to all, and what each costs."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from nanogpt_lit.memory.techniques import MemoryConfig

CHUNK_TOKENS = 256

# Each adds to those before it: what it does, and the fields of MemoryConfig that do it.
TECHNIQUES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("the loss in chunks", {"loss_chunk_tokens": CHUNK_TOKENS}),
    ("+ weights cast again in backward", {"recast_weights": True}),
    ("+ layer norms and GELU computed again", {"recompute": "selective"}),
    ("+ the optimizer's state in host memory", {"optimizer_state": "host"}),
    ("+ every second block computed again", {"recompute": "full", "recompute_every": 2}),
    ("+ every block computed again", {"recompute_every": 1}),
    ("+ the inputs of blocks in host memory", {"block_inputs": "host"}),
    ("+ weights, gradients, optimizer in host memory", {"weights": "host"}),
    ("+ weights streamed, matrix by matrix", {"weights": "streamed"}),
)


@dataclass(frozen=True)
class Rung:
    """One way to train the network of a YAML, with the same tokens per optimizer step."""

    name: str
    memory: MemoryConfig
    batch_size: int
    accumulate_grad_batches: int
    state_bits: int = 32
    """model.optim.state_bits. 8 changes the numerics: no rung proposes it, all keep it."""

    def same_training(self, other: "Rung") -> bool:
        return replace(self, name="") == replace(other, name="")

    def same_bits(self, other: "Rung") -> bool:
        """Whether both train to the same bits. All is exact but the order in which the loss is summed, and the
        arithmetic of the processor where the weights live with it."""
        return (
            self.state_bits == other.state_bits
            and self.batch_size == other.batch_size
            and self.memory.loss_chunk_tokens == other.memory.loss_chunk_tokens
            and (self.memory.weights == "card") == (other.memory.weights == "card")
        )

    def last_resort(self, own: "Rung") -> bool:
        """Whether it is of use only where nothing else fits: it keeps the card waiting."""
        return self.memory.weights not in ("card", own.memory.weights) or self.batch_size < own.batch_size

    def yaml(self, own: "Rung") -> list[str]:
        """The lines that turn the user's own YAML into this; none when it is the same."""
        lines: list[str] = []
        if self.memory != own.memory:
            defaults, theirs, wanted = asdict(MemoryConfig()), asdict(own.memory), asdict(self.memory)
            fields = [name for name in wanted if wanted[name] != defaults[name] or wanted[name] != theirs[name]]
            lines += ["model:", "  memory:", *(f"    {name}: {_scalar(wanted[name])}" for name in fields)]
        if self.batch_size != own.batch_size:
            lines += ["data:", f"  batch_size: {self.batch_size}"]
            lines += ["trainer:", f"  accumulate_grad_batches: {self.accumulate_grad_batches}"]
        return lines


def ladder(own: Rung, block_size: int, casts_weights: bool) -> Iterator[Rung]:
    """From the plain step upwards; the user's own setting is among them.

    casts_weights: whether autocast copies the weights to 16 bits
    """
    in_8_bits = own.state_bits == 8
    rung = replace(own, name="the optimizer's state in 8 bits" if in_8_bits else "nothing", memory=MemoryConfig())
    tokens = own.batch_size * block_size
    rungs = [rung]
    for name, changes in TECHNIQUES:
        if "recast_weights" in changes and not casts_weights:
            continue
        if changes.keys() & {"optimizer_state", "weights"} and in_8_bits:  # whose state stays on the card
            continue
        if "loss_chunk_tokens" in changes:  # a chunk as large as the batch would save little
            changes = {"loss_chunk_tokens": min(CHUNK_TOKENS, max(1, tokens // 4))}
        rung = replace(rung, name=name, memory=replace(rung.memory, **changes))
        rungs.append(rung)
    # Last, because small products leave a card idle, and what each micro-batch does to all weights is done more often.
    while rung.batch_size % 2 == 0:
        rung = replace(
            rung,
            name=f"+ micro-batches of {rung.batch_size // 2}",
            batch_size=rung.batch_size // 2,
            accumulate_grad_batches=rung.accumulate_grad_batches * 2,
        )
        rungs.append(rung)
    if not any(own.same_training(rung) for rung in rungs):
        yield own
    yield from rungs


def _scalar(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
