"""Candidates (a recipe, a learning rate, a batch), and short training runs of the user's network with each."""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from nanogpt_lit.data.datamodule import TokenDataModule
from nanogpt_lit.gpt.network import NetworkConfig
from nanogpt_lit.gpt.networks import config_of, described, section_of
from nanogpt_lit.loops import reference
from nanogpt_lit.loops.contract import LoopSettings, Observer
from nanogpt_lit.memory.techniques import MemoryConfig
from nanogpt_lit.module import LitNanoGPT
from nanogpt_lit.optim.adamw import AdamWConfig
from nanogpt_lit.optim.schedule import ScheduleConfig
from nanogpt_lit.run.guards import NotFinite
from nanogpt_lit.run.observers import always
from nanogpt_lit.runtime.precision import full_precision_name

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
    "optim": {"matrices": "muon", "muon_lr": None},
    "schedule": {"decay": "cooldown", "min_lr_ratio": 0.0},
}
RECIPES = {"nanogpt": NANOGPT, "modern": MODERN}


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
    changed["optim"]["lr"] = candidate.lr
    if changed["optim"]["muon_lr"] is not None:  # the two rates of the YAML keep their ratio
        changed["optim"]["muon_lr"] *= candidate.lr / own.lr
    return changed


SPEED_STEPS = 4
"""Steps of a measurement of speed; the first, which sets up, is not counted."""


class Trials:
    """Short runs of candidates.

    settings: the sections of the YAML, completed   own: their candidate   asked: after each step, whether to stop
    """

    def __init__(
        self, settings: Any, own: Candidate, device: str, clock: Callable[[], float], asked: Callable[[], bool]
    ) -> None:
        self._settings, self._own, self._device = settings, own, device
        self._clock, self._asked = clock, asked
        self._data = TokenDataModule(**settings.data)
        self._data.setup()
        self.val_batches = len(self._data.val_dataloader())
        limit = settings.trainer.limit_val_batches
        if isinstance(limit, int) and limit:
            self.val_batches = min(self.val_batches, limit)

    def build(self, candidate: Candidate, steps: int) -> LitNanoGPT:
        """Raises UserError where the candidate's recipe does not go with the rest of the YAML."""
        model = self._settings.model
        changed = model_section(model, self._own, candidate)
        # A schedule of the run's own shape, and as short as the trial.
        warmup = model.schedule["warmup_steps"] * steps / self._settings.trainer.max_steps
        changed["schedule"] |= {"warmup_steps": round(warmup), "total_steps": steps}
        # Without torch.compile, which every run would wait for.
        return LitNanoGPT(
            optim=AdamWConfig(**changed["optim"]),
            schedule=ScheduleConfig(**changed["schedule"]),
            memory=MemoryConfig(**model.memory),
            **described(config_of(changed)),
        )

    def speeds(self, candidates: Sequence[Candidate], budget_s: float) -> dict[Candidate, float]:
        """Seconds per optimizer step, medians of steps taken by turns: what slows the machine slows them all."""
        started_s, times = self._clock(), {candidate: list[float]() for candidate in candidates}
        while True:
            for candidate, found in times.items():
                watch = StepWatch(self._clock, self._device, self._asked)
                self._train(candidate, SPEED_STEPS, self._data.seed, None, watch)
                found += watch.step_s[1:] or watch.step_s  # the first alone where the run was stopped
            if self._asked() or self._clock() - started_s > budget_s:
                break
        return {candidate: statistics.median(found) for candidate, found in times.items()}

    def run(self, candidate: Candidate, steps: int, seed: int, val_batches: int) -> tuple[float, list[float]] | None:
        """The validation loss after so many steps, infinite where the run diverged, and the training loss of each.

        None where the run was stopped. The validation reads the same windows for every candidate.
        """
        watch = StepWatch(self._clock, self._device, self._asked)
        try:
            self._train(candidate, steps, seed, val_batches, watch)
        except NotFinite:
            return math.inf, watch.losses()
        if watch.loss is None:
            return None
        losses = watch.losses()
        # Above where it began, by more than one batch differs from the validation: it went astray.
        held = math.isfinite(watch.loss) and all(map(math.isfinite, losses)) and watch.loss < 1.1 * losses[0]
        return watch.loss if held else math.inf, losses

    def _train(self, candidate: Candidate, steps: int, seed: int, val_batches: int | None, watch: "StepWatch") -> None:
        trainer, data = self._settings.trainer, self._data
        accumulate = candidate.accumulate_grad_batches
        settings = LoopSettings(
            steps,
            accumulate,
            trainer.gradient_clip_val,
            full_precision_name(trainer.precision),
            val_check_interval=val_batches and steps * accumulate,
            limit_val_batches=val_batches,
            seed=seed,
            deterministic=trainer.deterministic,
        )
        torch.manual_seed(seed)
        module = self.build(candidate, steps).to(self._device)
        own_seed, own_batch_size = data.seed, data.batch_size
        validation = data.val_dataloader()
        try:
            data.seed, data.batch_size = seed, candidate.batch_size
            training = data.train_dataloader()
        finally:
            data.seed, data.batch_size = own_seed, own_batch_size
        reference.train(module, training, validation, settings, [*always(), watch])


class StepWatch(Observer):
    """The time and the training loss of each step, and the validation loss at the end.   asked: whether to stop"""

    def __init__(self, clock: Callable[[], float], device: str, asked: Callable[[], bool]) -> None:
        self.step_s: list[float] = []
        self.loss: float | None = None
        self._clock, self._device, self._asked = clock, device, asked
        self._window: list[Tensor] = []
        self._losses: list[Tensor] = []
        self._last_s = clock()

    def losses(self) -> list[float]:
        return [float(loss) for loss in self._losses]

    def on_batch_end(self, loss: Tensor, tokens: int) -> None:
        self._window.append(loss)

    def on_step_end(self, step: int, lr: float, grad_norm: Tensor) -> None:
        if self._device == "cuda":
            torch.cuda.synchronize()
        now_s = self._clock()
        self.step_s.append(now_s - self._last_s)
        self._last_s = now_s
        self._losses.append(torch.stack(self._window).mean())
        self._window = []

    def between_steps(self, step: int) -> bool:
        return self._asked()

    def on_validation_end(self, step: int, loss: Tensor) -> None:
        self.loss = float(loss)
