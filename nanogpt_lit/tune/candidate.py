"""What is tried: a recipe, a learning rate and a batch, and what they change in the YAML."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from nanogpt_lit.tune.recipes import RECIPES

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
    """The same optimizer step in other pieces, smaller and larger by factors of 2; the YAML's own first."""
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


def model_section(model: Mapping[str, Any], own: Candidate, candidate: Candidate) -> dict[str, dict[str, Any]]:
    """gpt, optim and schedule of the YAML's model section as the candidate has them."""
    changed = {name: dict(model[name]) for name in ("gpt", "optim", "schedule")}
    if candidate.recipe != own.recipe:
        for section, keys in RECIPES[candidate.recipe].items():
            changed[section].update(keys)
    changed["optim"]["lr"] = candidate.lr
    if changed["optim"]["muon_lr"] is not None:  # the two rates of the YAML keep their ratio
        changed["optim"]["muon_lr"] *= candidate.lr / own.lr
    return changed
