"""Techniques that make training cost less memory, each a field of MemoryConfig, `model.memory` in the YAML."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.checkpoint import checkpoint

from nanogpt_lit.errors import UserError
from nanogpt_lit.gpt.attention import LayerCache
from nanogpt_lit.gpt.loss import chunked_cross_entropy, cross_entropy
from nanogpt_lit.gpt.network import Block, Network

PLACES = ("optimizer_state", "weights", "block_inputs")
"""The fields of MemoryConfig that may move something from the device to host memory."""
OLD_NAMES = {"card": "device"}
"""Values of those that YAMLs and checkpoints of before may have."""


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
    """Compute parts of the forward pass again in backward, and keep less. selective: norms and activation functions,
    which cost little; full: whole blocks, of which the input is kept. Same bits."""

    recompute_every: int = 1
    """Recompute in every k-th block only, beginning with the first."""

    block_inputs: Literal["device", "host", "card"] = "device"
    """host: what recompute=full keeps, the input of each block, waits for backward in host memory. Same bits.
    (card, here and below, is an older name of device.)"""

    optimizer_state: Literal["device", "host", "card"] = "device"
    """host: the optimizer's moments, 8 bytes a parameter, live in host memory and visit the GPU at the step, where the
    same kernels work on them. Same bits."""

    weights: Literal["device", "host", "streamed", "card"] = "device"
    """host: the float32 weights, their gradients and the optimizer, 16 bytes a parameter, live in host memory; the GPU
    keeps the 16-bit copy of the weights that it computes with. streamed: not even that; each matrix is fetched when it
    is used. Either makes optimizer_state and recast_weights idle. Same bits but for what the CPU then rounds in
    place of the GPU: AdamW, the norm of the gradients, and the sum of those of the token embedding."""

    def __post_init__(self) -> None:
        for name in PLACES:
            place = getattr(self, name)
            object.__setattr__(self, name, OLD_NAMES.get(place, place))
        if self.loss_chunk_tokens is not None and self.loss_chunk_tokens < 1:
            raise UserError(
                f"model.memory.loss_chunk_tokens={self.loss_chunk_tokens} must be at least 1; 256 is a good start, "
                "null computes the loss at once."
            )
        if self.recompute not in ("none", "selective", "full"):
            raise UserError(f"model.memory.recompute={self.recompute!r} is not known; use none, selective or full.")
        if self.recompute_every < 1:
            raise UserError(f"model.memory.recompute_every={self.recompute_every} must be at least 1, every block.")
        if self.recompute_every > 1 and self.recompute == "none":
            raise UserError(
                f"model.memory.recompute_every={self.recompute_every} does nothing while recompute is none; "
                "set model.memory.recompute to selective or full."
            )
        if self.block_inputs not in ("device", "host"):
            raise UserError(f"model.memory.block_inputs={self.block_inputs!r} is not known; use device or host.")
        if self.block_inputs == "host" and self.recompute != "full":
            raise UserError(
                f"model.memory.block_inputs=host does nothing while recompute is {self.recompute}, which keeps more "
                "than the inputs of blocks; set model.memory.recompute=full."
            )
        if self.optimizer_state not in ("device", "host"):
            raise UserError(f"model.memory.optimizer_state={self.optimizer_state!r} is not known; use device or host.")
        if self.weights not in ("device", "host", "streamed"):
            raise UserError(f"model.memory.weights={self.weights!r} is not known; use device, host or streamed.")


FREE_OF_COST = ("loss_chunk_tokens", "recast_weights")
"""The fields of MemoryConfig that save memory and take no time."""


def apply_techniques(gpt: Network, memory: MemoryConfig) -> None:
    """Make gpt use them from now on. Its parameters, their names and its state_dict stay what they are.

    A module takes another class, as under PyTorch's fully_shard: to wrap it in another module would rename its
    parameters.
    """
    if memory.block_inputs == "host" or memory.weights != "device":  # late, for only few runs have it
        from nanogpt_lit.memory.host import InputOnHost
        from nanogpt_lit.memory.host_weights import HostHead, HostWeights, RefetchLinear, keep_on_host
    if memory.loss_chunk_tokens is not None:
        gpt.cross_entropy = partial(chunked_cross_entropy, chunk_tokens=memory.loss_chunk_tokens)
    for layer, block in enumerate(gpt.blocks):
        assert isinstance(block, Block)
        kind: Any = type(block)
        recompute = memory.recompute if layer % memory.recompute_every == 0 else "none"
        # What is recomputed keeps no copies of weights anyway.
        recast: list[nn.Linear] = []
        if recompute == "full":
            block.__class__ = mixed(Recomputed if memory.block_inputs == "device" else InputOnHost, kind)
        elif recompute == "selective":
            block.__class__ = mixed(Selective, kind)
            recast = [block.attention_projection]
        else:
            recast = [module for module in block.modules() if isinstance(module, nn.Linear)]
        if memory.weights == "streamed":
            for linear in recast:
                linear.__class__ = RefetchLinear
        elif memory.recast_weights and memory.weights == "device":
            for linear in recast:
                linear.__class__ = RecastLinear
    if memory.weights != "device":
        host = HostWeights()
        keep_on_host(gpt, host, keep=memory.weights == "host")
        keep_on_host(gpt.lm_head, host, keep=False)  # it is used once a micro-batch, and large
        gpt.cross_entropy = HostHead(host, memory.loss_chunk_tokens)


def change_techniques(gpt: Network, memory: MemoryConfig) -> None:
    """Make a network that trains go on with these settings; its weights stay where they are.

    Where they are in host memory, the loss alone can change.
    """
    if hasattr(gpt.cross_entropy, "chunk_tokens"):  # a HostHead
        gpt.cross_entropy.chunk_tokens = memory.loss_chunk_tokens
        return
    for block in gpt.blocks:
        block.__class__ = getattr(type(block), "plain", type(block))
        for part in block.modules():
            if isinstance(part, nn.Linear):
                part.__class__ = nn.Linear
    gpt.cross_entropy = cross_entropy
    apply_techniques(gpt, memory)


def optimizer_class(memory: MemoryConfig) -> type[AdamW]:
    """AdamW, or the one that keeps its state where `memory` wants it."""
    if memory.weights == "device" and memory.optimizer_state == "device":
        return AdamW
    from nanogpt_lit.memory.host_optimizer import HostAdamW, HostResidentAdamW

    return HostAdamW if memory.weights == "device" else HostResidentAdamW


def recomputed(function: Callable[..., Any], *args: Tensor, with_dropout: bool = False, **shared: Any) -> Any:
    """function(*args, **shared), keeping for backward only the arguments.

    shared: what all blocks have in common; unlike args it does not leave the device with saved_on_host

    Backward calls it again, up to the last thing that it needs: a matrix product at the end of function needs its
    factors, and is not computed twice.
    """
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=with_dropout, **shared)


@cache
def mixed(technique: Any, block: Any) -> Any:
    """The class of blocks that use a technique; its attribute `plain` is the class without."""
    return type(f"{technique.__name__}{block.__name__}", (technique, block), {"plain": block})


class Recomputed(Block):
    """Keeps its input alone: 4 bytes a channel and token, where GPT-2's block keeps 36 under 16-bit autocast."""

    def forward(self, x: Tensor, cache: LayerCache | None = None, mask: Tensor | None = None) -> Tensor:
        if not torch.is_grad_enabled():
            return super().forward(x, cache, mask)
        return recomputed(super().forward, x, with_dropout=self.draws, mask=mask)


class Selective(Block):
    """Keeps what is dear to compute: products of matrices, and attention. 22 bytes a channel and token of GPT-2's 36.

    In bytes: the input 4, queries, keys and values 6, attention 2 and its projection 2, the inside of the MLP 8.
    """

    def forward(self, x: Tensor, cache: LayerCache | None = None, mask: Tensor | None = None) -> Tensor:
        if not torch.is_grad_enabled():
            return super().forward(x, cache, mask)
        attended = self.attend(*recomputed(self.into_attention, x), mask=mask)
        x, *inside = recomputed(self._add_into_mlp, x, attended)
        return x + self.drop(recomputed(self.out_of_mlp, *inside))

    def _add_into_mlp(self, x: Tensor, attended: Tensor) -> tuple[Tensor, ...]:
        x = x + attended
        return x, *self.into_mlp(x)


class RecastLinear(nn.Linear):
    """Keeps its 16-bit input for backward, and not the 16-bit copy of its weight that autocast makes."""

    def forward(self, x: Tensor) -> Tensor:
        device_type = x.device.type
        if not (torch.is_grad_enabled() and torch.is_autocast_enabled(device_type)):
            return super().forward(x)
        return recomputed(super().forward, x.to(torch.get_autocast_dtype(device_type)))
