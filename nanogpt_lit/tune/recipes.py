"""The two recipes of docs/recipes.md: what each sets of model.gpt, model.optim and model.schedule, and nothing else."""

from collections.abc import Mapping
from typing import Any

Recipe = Mapping[str, Mapping[str, Any]]

NANOGPT: Recipe = {
    "gpt": {"positions": "learned", "qk_norm": False},
    "optim": {"matrices": "adamw", "muon_lr": None},
    "schedule": {"decay": "cosine", "min_lr_ratio": 0.1},
}
MODERN: Recipe = {
    "gpt": {"positions": "rotary", "qk_norm": True},
    "optim": {"matrices": "muon", "muon_lr": None},
    "schedule": {"decay": "cooldown", "min_lr_ratio": 0.0},
}
RECIPES = {"nanogpt": NANOGPT, "modern": MODERN}


def recipe_of(model: Mapping[str, Any]) -> str | None:
    """The recipe that a model section follows in all its keys; None for a mixture of one's own."""
    for name, recipe in RECIPES.items():
        if all(model[section][key] == value for section, keys in recipe.items() for key, value in keys.items()):
            return name
    return None
