"""What makes training cost less memory: each technique is a field of MemoryConfig, `model.memory` in the YAML."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class MemoryConfig:
    """Ways to need less memory. The defaults use none of them."""

    loss_chunk_tokens: int | None = None
    """Compute the loss and its gradients this many tokens at a time, so that the logits (tokens x vocabulary) are
    never held. None computes them at once. 256 to 1024 cost about the same time. The bits change as with another
    batch_size, by rounding."""

    recast_weights: bool = False
    """Under 16-bit autocast, keep no 16-bit copy of the blocks' weights for backward but cast them again there. Same
    bits."""

    recompute: Literal["none", "selective", "full"] = "none"
    """What backward computes again instead of keeping it. selective: layer norms and GELU, which cost little; full:
    whole blocks, of which only the input is kept. Same bits."""

    recompute_every: int = 1
    """Recompute in every k-th block only, beginning with the first."""

    def __post_init__(self) -> None:
        if self.loss_chunk_tokens is not None and self.loss_chunk_tokens < 1:
            raise ValueError(
                f"model.memory.loss_chunk_tokens={self.loss_chunk_tokens} must be at least 1; 512 is a good start, "
                "null computes the loss at once."
            )
        if self.recompute not in ("none", "selective", "full"):
            raise ValueError(f"model.memory.recompute={self.recompute!r} is not known; use none, selective or full.")
        if self.recompute_every < 1:
            raise ValueError(f"model.memory.recompute_every={self.recompute_every} must be at least 1, every block.")
        if self.recompute_every > 1 and self.recompute == "none":
            raise ValueError(
                f"model.memory.recompute_every={self.recompute_every} does nothing while recompute is none; "
                "set model.memory.recompute to selective or full."
            )
