"""Candidates (a recipe, a learning rate, a batch), and short training runs of the user's network with each."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from nanogpt_lit.gpt.network import NetworkConfig
from nanogpt_lit.gpt.networks import config_of, described, section_of
from nanogpt_lit.module import LitNanoGPT
from nanogpt_lit.tune.short_runs import ShortRuns

# The recipes of docs/recipes.md: the network of each, what it sets in the sections of `model`, and nothing else.
Recipe = Mapping[str, Any]

NANOGPT: Recipe = {
    "network": "gpt2",
    "gpt": {"tied_head": True},
    "optim": {"matrices": "adamw", "muon_lr": None},
    "schedule": {"decay": "cosine", "min_lr_ratio": 0.1},
}
MODERN: Recipe = {
    "network": "llama",
    "llama": {"qk_norm": True, "tied_head": False},
    "optim": {"matrices": "muon"},
    "schedule": {"decay": "cooldown", "min_lr_ratio": 0.0},
}
RECIPES = {"nanogpt": NANOGPT, "modern": MODERN}
MUON_SHARE = 0.5
"""Muon's learning rate in the modern recipe as a share of AdamW's. A YAML that has another keeps it."""


def recipe_of(model: Mapping[str, Any]) -> str | None:
    """The recipe that a model section follows in all its keys; None for a mixture of one's own."""
    for name, recipe in RECIPES.items():
        has_network = model.get("network", "gpt2") == recipe["network"]
        if has_network and all(model[section][key] == value for section, key, value in options_of(recipe)):
            return name
    return None


def options_of(recipe: Recipe) -> Iterator[tuple[str, str, Any]]:
    """Section, key and value of what a recipe sets beside its network."""
    for section, options in recipe.items():
        if section != "network":
            yield from ((section, key, value) for key, value in options.items())


OWN = "your own"
"""A mixture of recipes: the YAML's, as it is."""


@dataclass(frozen=True)
class Candidate:
    recipe: str
    lr: float
    batch_size: int
    accumulate_grad_batches: int

    @property
    def sequences(self) -> int:
        """Per optimizer step."""
        return self.batch_size * self.accumulate_grad_batches

    def __str__(self) -> str:
        return f"{self.recipe}, lr {self.lr:.2g}, {self.batch_size} x {self.accumulate_grad_batches} sequences a step"


def micro_batches(own: Candidate) -> list[Candidate]:
    """The same optimizer step in micro-batches smaller and larger by factors of 2; the YAML's own first."""
    sizes = [own.batch_size * 2**n for n in range(1, 11)] + [own.batch_size // 2**n for n in (1, 2)]
    sizes = [B for B in dict.fromkeys(sizes) if 0 < B <= own.sequences and own.sequences % B == 0]
    return [own, *(replace(own, batch_size=B, accumulate_grad_batches=own.sequences // B) for B in sizes)]


def other_steps(candidate: Candidate) -> list[Candidate]:
    """Twice and half the tokens a step. AdamW's rate goes with the root of the batch: Malladi et al.
    (arXiv:2205.10287)."""
    B, accumulate = candidate.batch_size, candidate.accumulate_grad_batches
    steps = [(B, accumulate * 2, 2**0.5)]
    if accumulate % 2 == 0:
        steps.append((B, accumulate // 2, 0.5**0.5))
    elif B % 2 == 0:
        steps.append((B // 2, accumulate, 0.5**0.5))
    return [Candidate(candidate.recipe, candidate.lr * by, B, accumulate) for B, accumulate, by in steps]


SIZES = tuple(field.name for field in fields(NetworkConfig))
"""Fields that all networks have: a candidate with another network has the YAML's."""


def model_section(model: Mapping[str, Any], own: Candidate, candidate: Candidate) -> dict[str, Any]:
    """network, its shape, optim and schedule of the YAML's model section as the candidate has them."""
    network, section = model.get("network", "gpt2"), section_of(model)
    changed: dict[str, Any] = {"network": network, section: dict(model[section])}
    changed |= {name: dict(model[name]) for name in ("optim", "schedule")}
    if candidate.recipe != own.recipe:
        recipe = RECIPES[candidate.recipe]
        if recipe["network"] != network:
            sizes = {name: changed[section][name] for name in SIZES}
            del changed[section]
            changed["network"] = recipe["network"]
            changed[section_of(recipe)] = {**model[section_of(recipe)], **sizes}
        for name, key, value in options_of(recipe):
            changed[name][key] = value
        if recipe is MODERN:
            changed["optim"]["muon_lr"] = MUON_SHARE * own.lr
    changed["optim"]["lr"] = candidate.lr
    if changed["optim"]["muon_lr"] is not None:  # the two rates keep their ratio
        changed["optim"]["muon_lr"] *= candidate.lr / own.lr
    return changed


class Trials(ShortRuns[Candidate]):
    """Short runs of candidates.   own: the YAML's"""

    def __init__(
        self, settings: Any, own: Candidate, device: str, clock: Callable[[], float], asked: Callable[[], bool]
    ) -> None:
        super().__init__(settings, device, clock, asked)
        self._own = own

    def build(self, tried: Candidate, steps: int) -> LitNanoGPT:
        """Raises UserError where the candidate's recipe does not go with the rest of the YAML."""
        changed = model_section(self.settings.model, self._own, tried)
        return self.module(changed, described(config_of(changed)), steps)
