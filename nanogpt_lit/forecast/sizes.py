"""The run of a YAML made smaller: a network of less width, fewer tokens, and the rates that go with them.

Runs that a law can join have to be alike but for their size. Networks keep their depth, since one layer cannot learn
what two can, however long it is trained, and heads keep their channels; the schedule keeps its shape; the batch falls
with the root of the tokens, as the best one does (Bergsma et al., arXiv:2505.13738); and rates follow the rules that
the literature has for their best values.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from nanogpt_lit.gpt.llama import LlamaConfig
from nanogpt_lit.gpt.network import NetworkConfig
from nanogpt_lit.gpt.networks import build, config_of, described
from nanogpt_lit.module import LitNanoGPT
from nanogpt_lit.tune.search import HORIZON
from nanogpt_lit.tune.short_runs import ShortRuns

CHANNELS_UNIT = 4
"""Channels per head of a smaller network are a multiple of this; rotary positions need an even number."""


@dataclass(frozen=True)
class Sized:
    """A run of the family."""

    network: NetworkConfig
    parameters: int
    """Weights that are multiplied: all but the tables that are looked up."""
    flops_per_token: int
    steps: int
    batch_size: int
    accumulate_grad_batches: int

    @property
    def step_tokens(self) -> int:
        return self.batch_size * self.accumulate_grad_batches * self.network.block_size

    @property
    def tokens(self) -> int:
        return self.steps * self.step_tokens

    @property
    def flops(self) -> float:
        return float(self.tokens) * self.flops_per_token

    def __str__(self) -> str:
        return f"{self.network.n_layer} x {self.network.n_embd}, {self.tokens:,} tokens in {self.steps:,} steps"


def sized(network: NetworkConfig, steps: int, batch_size: int, accumulate_grad_batches: int) -> Sized:
    with torch.device("meta"):
        built = build(network)
    parameters = built.parameter_count(non_embedding=True)
    flops = built.flops_per_token(network.block_size)
    return Sized(network, parameters, flops, steps, batch_size, accumulate_grad_batches)


def scaled(network: NetworkConfig, by: float) -> NetworkConfig:
    """The network with its heads and channels times `by`."""
    groups = network.n_head // network.kv_heads if isinstance(network, LlamaConfig) else 1
    heads = groups * max(1, round(by * network.n_head / groups))
    D = CHANNELS_UNIT * max(1, round(by * network.n_embd / heads / CHANNELS_UNIT))
    changes: dict[str, Any] = {"n_head": heads, "n_embd": heads * D}
    if isinstance(network, LlamaConfig):
        if network.n_kv_head is not None:
            changes["n_kv_head"] = heads // groups
        if network.n_hidden is not None:
            changes["n_hidden"] = max(1, round(network.n_hidden * heads * D / network.n_embd))
    return replace(network, **changes)


@cache
def family(network: NetworkConfig) -> tuple[Sized, ...]:
    """The network in widths down to 1/32 of its own and up to twice, small ones first."""
    networks = dict.fromkeys(scaled(network, 2 ** (n / 12)) for n in range(-60, 13))
    return tuple(sized(each, 1, 1, 1) for each in networks)


def nearest(own: Sized, share: float) -> Sized:
    """The network of the family whose blocks have about this share of the weights of the YAML's.

    A head over a large vocabulary shrinks more slowly: by all weights, networks would become too narrow for it.
    """
    return min(
        family(own.network), key=lambda each: abs(math.log(each.network.n_embd / own.network.n_embd / share**0.5))
    )


def with_tokens(own: Sized, run: Sized, tokens: float) -> Sized:
    """The run with so many tokens, in steps that fall with their root."""
    share = tokens / own.tokens
    sequences = max(1, round(own.batch_size * own.accumulate_grad_batches * min(1.0, share**0.5)))
    accumulate = -(-sequences // own.batch_size)
    batch_size = max(1, round(sequences / accumulate))
    steps = max(1, round(tokens / (batch_size * accumulate * own.network.block_size)))
    return replace(run, steps=steps, batch_size=batch_size, accumulate_grad_batches=accumulate)


def rate(own: Sized, run: Sized) -> float:
    """The learning rate of a run as a multiple of the YAML's.

    With the root of the width, which lies between what AdamW's matrices want (Yang et al., arXiv:2203.03466) and what
    its vectors do. With tokens as `tune` has it (Bjorck et al., arXiv:2409.19913), and with the root of the
    batch (Malladi et al., arXiv:2205.10287).
    """
    width = run.network.n_embd / own.network.n_embd
    batch = run.step_tokens / own.step_tokens
    return width**-0.5 * batch**0.5 * (run.tokens / own.tokens) ** -HORIZON


RUNS = (
    (1.0, 0.2, 0.7),
    (1.4, 0.145, 0.55), (1.4, 0.145, 0.85),
    (2.0, 0.1, 0.7),
    (3.5, 0.058, 0.55), (3.5, 0.058, 0.85),
    (5.0, 0.04, 0.7),
    (8.0, 0.025, 0.55), (8.0, 0.025, 0.85),
)  # fmt: skip
"""Runs of a forecast: how many times smaller than the largest that is allowed, the share of the budget that it may
take, and the share of the factor (of its logarithm) that makes the network smaller. The rest takes tokens away, less of
it: after few tokens every network is still learning what comes first, and a law of that says little of the rest."""
LEAST_TIMES, MOST_TIMES = 4.0, 1e6
"""Bounds of how many times smaller than the YAML's a run is; one below the last would say nothing of it."""
LEAST_STEPS = 50
"""A run of fewer is still warming up, whatever its size."""


def choose(
    own: Sized, seconds: Callable[[Sized], float], budget_s: float, least_times: float = LEAST_TIMES
) -> list[Sized]:
    """The runs to make, short ones first; fewer where the budget, or the YAML's run, is small.

    seconds: that a run takes
    """
    runs: list[Sized] = []
    for times, share, mix in RUNS:
        run = within(own, least_times * times, mix, seconds, share * budget_s)
        if run is not None and not any(alike(run, other) for other in runs):
            runs.append(run)
    return sorted(runs, key=seconds)


def within(own: Sized, times: float, mix: float, seconds: Callable[[Sized], float], longest_s: float) -> Sized | None:
    """The largest run that is at least `times` smaller than the YAML's and short enough; None where there is none."""
    while times <= MOST_TIMES:
        network = nearest(own, times**-mix)
        run = with_tokens(own, network, own.flops / times / network.flops_per_token)
        if run.steps < LEAST_STEPS:
            return None
        if seconds(run) <= longest_s:
            return run
        times *= 1.1
    return None


def alike(run: Sized, other: Sized) -> bool:
    return run.network == other.network and 0.8 < run.tokens / other.tokens < 1.25


class SizedRuns(ShortRuns[Sized]):
    """Short runs of the family of a YAML's run."""

    def __init__(
        self, settings: Any, device: str, clock: Callable[[], float], asked: Callable[[], bool] = lambda: False
    ) -> None:
        super().__init__(settings, device, clock, asked)
        trainer = settings.trainer
        network = config_of(settings.model)
        self.own = sized(network, trainer.max_steps, self.data.batch_size, trainer.accumulate_grad_batches)
        """The YAML's run."""

    def build(self, tried: Sized, steps: int) -> LitNanoGPT:
        model: Mapping[str, Any] = self.settings.model
        optim, by = dict(model["optim"]), rate(self.own, tried)
        optim["lr"] *= by
        if optim["muon_lr"] is not None:
            optim["muon_lr"] *= by
        # Weights are averages over 1 / (lr * weight_decay) steps: the same share of every run (arXiv:2405.13698).
        optim["weight_decay"] *= self.own.steps / tried.steps / by
        return self.module({"optim": optim, "schedule": dict(model["schedule"])}, described(tried.network), steps)
