"""The largest batch, sequence and network that fit a GPU."""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch

from nanogpt_lit.gpt.network import NetworkConfig
from nanogpt_lit.memory.ladder import Rung, ladder
from nanogpt_lit.memory.techniques import MemoryConfig
from nanogpt_lit.plan.allocator import MIB
from nanogpt_lit.plan.budget import Budget
from nanogpt_lit.plan.command import module, network, own_rung, step_shape
from nanogpt_lit.plan.plan import STAYS, reserved_mib
from nanogpt_lit.runtime.precision import PRECISIONS, dtype_of

# Layers, heads and channels of the networks that were published as GPT-2.
FAMILY = {
    "GPT-2 small": (12, 12, 768),
    "GPT-2 medium": (24, 16, 1024),
    "GPT-2 large": (36, 20, 1280),
    "GPT-2 XL": (48, 25, 1600),
}

# Of GPT-3's, whose table 2.1 these are (Brown et al., arXiv:2005.14165): for many devices.
LARGER = {
    "GPT-3 2.7B": (32, 32, 2560),
    "GPT-3 6.7B": (32, 32, 4096),
    "GPT-3 13B": (40, 40, 5120),
    "GPT-3 175B": (96, 96, 12288),
}

SHAPED_BY_HAND = {"n_kv_head", "head_size", "n_hidden"}
"""Sizes of a Llama that follow from the others where they are None, as they are in a network of another size."""

SHALLOW = 2
"""Layers of a network that stands for a deeper one."""
QUICK_TOLERANCE = 0.1
"""Share of the usable memory: nearer to it than this, a line through two shallow networks does not decide what
fits."""
NEAR = 0.985
"""Share of the size that a line leads to, at which to look: what fits there, and hardly more, ends the search."""
FURTHEST = 8
"""A line through two small sizes may be wrong about the slope: so many times the larger of them is not gone beyond."""


def largest_that_fits(
    settings: Any, budget: Budget, lightning: bool = True, sizes: Future[list[dict[str, Any]]] | None = None
) -> list[dict[str, Any]]:
    """The largest that fits the budget with the memory techniques of the YAML, and with all that there are.

    The largest batch_size and the longest block_size, each with all else as it is, the latter for a single sequence,
    and the largest network of GPT-2's family. "yaml" has the lines that a rung needs, none for the YAML's own; where
    that has all techniques, it is the only answer.
    sizes: of another process that runs `largest_sizes` meanwhile
    """
    searches = _searches(settings, budget, lightning)
    networks = [search.largest_network() for search in searches]
    found = [search.largest_sizes() for search in searches] if sizes is None else sizes.result()
    own = searches[0].rung
    return [
        {"rung": search.rung.name, "yaml": search.rung.yaml(own), **of_rung, **network}
        for search, of_rung, network in zip(searches, found, networks, strict=True)
    ]


def largest_sizes(settings: Any, budget: Budget, lightning: bool = True) -> list[dict[str, Any]]:
    """The part of `largest_that_fits` that takes the longest: batch_size and block_size."""
    return [search.largest_sizes() for search in _searches(settings, budget, lightning)]


def _searches(settings: Any, budget: Budget, lightning: bool) -> list["_Search"]:
    own, shape = own_rung(settings), step_shape(settings, network(settings), lightning)
    casts_weights = PRECISIONS[shape.precision].autocast is not None
    *_, leanest = (
        rung
        for rung in ladder(own, shape.block_size, casts_weights, STAYS[shape.strategy])
        if rung.batch_size == own.batch_size
    )
    rungs = [own] if own.same_training(leanest) else [own, leanest]
    return [_Search(settings, rung, budget, lightning) for rung in rungs]


@dataclass(eq=False)
class _Search:
    """The search for the largest that fits on one rung."""

    settings: Any
    rung: Rung
    budget: Budget
    lightning: bool

    def __post_init__(self) -> None:
        self.gpt = network(self.settings)
        self.shape = step_shape(self.settings, self.gpt, self.lightning)
        self.needed_mib = cache(self._needed_mib)

    def _needed_mib(self, batch_size: int, **changes: int) -> float:
        changed = replace(self.gpt, **changes)  # type: ignore[arg-type]
        shape, rung = step_shape(self.settings, changed, self.lightning), replace(self.rung, batch_size=batch_size)
        return reserved_mib(partial(module, self.settings, changed), rung, shape, self.budget.gpu)

    def largest_sizes(self) -> dict[str, Any]:
        def of_batch(size: int, **depth: int) -> float:
            return self.needed_mib(size, block_size=self.gpt.block_size, **depth)

        def of_block(size: int, **depth: int) -> float:
            return self.needed_mib(1, block_size=size, **depth)

        twice = 2 * self.rung.batch_size
        batch_size = self._largest(of_batch, twice)
        tokens = int(NEAR * self.gpt.block_size * (batch_size or 1))  # a single sequence may have about as many
        return {"batch_size": batch_size, "block_size": self._largest(of_block, tokens, unit=64)}

    def _largest(self, needed: Callable[..., float], begin: int, unit: int = 1) -> int | None:
        """The largest size. Where weights are on the host, depth adds little: two layers find what the network then is
        asked for. What two layers have no room for, more of them have not."""
        usable_mib = self.budget.usable_mib
        if self.rung.memory.weights == "device" or self.gpt.n_layer <= SHALLOW:
            return largest(needed, begin, begin, usable_mib, unit)
        found = largest(partial(needed, n_layer=SHALLOW), begin, begin, usable_mib, unit)
        if found is None or (deep_mib := needed(found)) <= usable_mib:
            return found
        return largest(needed, int(NEAR * found * usable_mib / deep_mib), found, usable_mib, unit)

    def largest_network(self) -> dict[str, Any]:
        by_themselves = dict.fromkeys(SHAPED_BY_HAND & self.gpt.__dataclass_fields__.keys())
        family = FAMILY | (LARGER if self.shape.devices > 1 else {})
        for name, (n_layer, n_head, n_embd) in reversed(family.items()):
            sizes = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, **by_themselves}
            if self._network_fits(sizes):
                return {"network": name, "gpt": sizes}
        return {"network": None, "gpt": None}

    def _network_fits(self, sizes: dict[str, Any]) -> bool:
        """Memory grows in a line with depth: two shallow networks tell of the deep one, to a few percent."""
        usable_mib, memory, weights_mib = self.budget.usable_mib, self.rung.memory, 0.0
        if memory.weights == "device":
            gpt = replace(self.gpt, **sizes)
            weights_mib = weights_alone_mib(self.settings, gpt, memory, self.shape.precision)
            if self.shape.strategy == "fsdp2":
                weights_mib /= self.shape.devices
        if 2 * weights_mib > usable_mib:
            return False  # with their gradients, and without a trace
        if sizes["n_layer"] > 2 * SHALLOW:
            two, four = (self.needed_mib(1, **{**sizes, "n_layer": shallow}) for shallow in (SHALLOW, 2 * SHALLOW))
            quick_mib = two + (four - two) / SHALLOW * (sizes["n_layer"] - SHALLOW)
            if abs(quick_mib / usable_mib - 1) > QUICK_TOLERANCE:
                return quick_mib <= usable_mib
        return self.needed_mib(1, **sizes) <= usable_mib


def largest(needed_mib: Callable[[int], float], small: int, large: int, usable_mib: float, unit: int = 1) -> int | None:
    """The largest multiple of `unit`, to within 3 percent, that needs no more than usable_mib; None where not even
    `unit` does.

    needed_mib: of a size, growing with it, in a line or faster   small, large: sizes to begin with
    Memory grows nearly in a line with the batch and the sequence: a line through two sizes leads to the third.
    """
    known: dict[int, float] = {}
    fitting, too_large = 0, None
    size = max(unit, small // unit * unit)
    while True:
        known[size] = needed_mib(size)
        if known[size] <= usable_mib:
            fitting = max(fitting, size)
        elif too_large is None or size < too_large:
            too_large = size
        enough = max(unit, int(0.03 * fitting) // unit * unit)
        if too_large is not None and too_large - fitting <= enough:
            return fitting or None
        # Of a line of which one size is known: what is left, shared out as if all that is needed grew with the size.
        in_proportion = int(NEAR * size * usable_mib / known[size])
        if fitting == 0:
            size = in_proportion if len(known) == 1 else size // 2
        elif len(known) == 1:
            size = max(fitting + unit, large, in_proportion)
        else:
            lower = max((size for size in known if size < fitting), default=None)
            if lower is not None:
                slope = (known[fitting] - known[lower]) / (fitting - lower)
                if slope > 0 and known[fitting] + slope * enough > usable_mib:
                    return fitting  # and a line from below promises no less room than there is
            other = lower if too_large is None else too_large
            assert other is not None, "one of two sizes that fit is the lower one"
            slope = (known[other] - known[fitting]) / (other - fitting)
            size = fitting + int((usable_mib - known[fitting]) / slope) if slope > 0 else FURTHEST * fitting
            size = int(NEAR * size) if too_large is None else size
        # Each step is so large that it ends the search if it leads too far.
        size = max(size // unit * unit, fitting + enough)
        if too_large is not None:
            size = min(size, max(fitting + enough, too_large - enough))
        elif len(known) > 1:
            size = min(size, FURTHEST * fitting)


def weights_alone_mib(settings: Any, gpt: NetworkConfig, memory: MemoryConfig, precision: str) -> float:
    dtype = dtype_of(PRECISIONS[precision].weights)
    assert dtype is not None
    with torch.device("meta"):
        return sum(weights.numel() for weights in module(settings, gpt, memory).parameters()) * dtype.itemsize / MIB
