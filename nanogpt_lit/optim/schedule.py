"""Linear warm-up, then a cosine or a late straight line down to a floor, counted in optimizer steps that really
happened."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from nanogpt_lit.errors import UserError


@dataclass(frozen=True)
class ScheduleConfig:
    warmup_steps: int = 100
    """Optimizer steps over which the learning rate rises linearly to its peak."""
    min_lr_ratio: float = 0.1
    """The floor that the decay ends at, as a fraction of the peak."""
    decay: Literal["cosine", "cooldown"] = "cosine"
    """cosine: falls from the end of warm-up on, as in nanoGPT. cooldown: stays at the peak, then falls in a straight
    line (arXiv:2404.06395, arXiv:2405.18392)."""
    cooldown_ratio: float = 0.4
    """The last part of the run, as a share of its steps, over which cooldown falls."""
    total_steps: int | None = None
    """Optimizer steps of the whole run: filled in from trainer.max_steps. Without them nothing decays."""

    def __post_init__(self) -> None:
        if self.total_steps is not None and self.total_steps < 1:
            raise UserError(
                f"trainer.max_steps={self.total_steps} gives the learning rate no end to decay to; "
                "set the number of optimizer steps, for example trainer.max_steps=1000, or begin with a YAML that "
                "has it: --config quickstart."
            )
        if self.warmup_steps < 0:
            raise UserError(f"model.schedule.warmup_steps={self.warmup_steps} must not be negative; 0 means none.")
        if not 0 <= self.min_lr_ratio <= 1:
            raise UserError(
                f"model.schedule.min_lr_ratio={self.min_lr_ratio} is outside [0, 1]; "
                "0.1 ends at a tenth of the peak, 1 keeps the rate constant after warm-up."
            )
        if self.decay not in ("cosine", "cooldown"):
            raise UserError(f"model.schedule.decay={self.decay!r} is not known; use cosine or cooldown.")
        if not 0 < self.cooldown_ratio <= 1:
            raise UserError(
                f"model.schedule.cooldown_ratio={self.cooldown_ratio} is outside (0, 1]; 0.4 falls over the last 40 %."
            )


def short_of_peak(config: ScheduleConfig) -> str | None:
    """A sentence where the run ends before its warm-up does; None where the learning rate reaches its peak."""
    if config.total_steps is None or config.warmup_steps < config.total_steps:
        return None
    reached = config.total_steps / (config.warmup_steps + 1)
    tenth = config.total_steps // 10
    return (
        f"model.schedule.warmup_steps={config.warmup_steps} does not end within "
        f"trainer.max_steps={config.total_steps}: the learning rate reaches {reached:.0%} of its peak; "
        + (f"{tenth} warms up over a tenth" if tenth else "0 begins at it")
    )


def warmup_decay(step: int, config: ScheduleConfig) -> float:
    """Learning rate of the given step (0 is the first) as a fraction of the peak, as in nanoGPT's train.py.

    With decay=cooldown it is the lesser of warm-up and cooldown where the two overlap.
    """
    warmup = (step + 1) / (config.warmup_steps + 1)
    if config.total_steps is None:
        return min(1.0, warmup)
    if config.decay == "cooldown":
        # 1 at the first step of the fall, 0 one step after the last.
        left = max(0.0, config.total_steps - step) / (config.cooldown_ratio * config.total_steps)
        return min(1.0, warmup, config.min_lr_ratio + (1 - config.min_lr_ratio) * left)
    if step < config.warmup_steps:
        return warmup
    done = min(1.0, (step - config.warmup_steps) / max(1, config.total_steps - config.warmup_steps))
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * done))


class WarmupDecay(LambdaLR):
    """The schedule of one run. `step()` is called once per optimizer step, by whichever loop runs.

    It holds still for a step that GradScaler skipped, or that had no gradients. Lightning would advance it there and
    accelerate would not (Lightning #5558), so it is decided here, where every loop passes, and not in the loops.
    """

    def __init__(self, optimizer: Optimizer, config: ScheduleConfig) -> None:
        self.skipped_steps = 0
        self._step_happened = True  # LRScheduler.__init__ calls step() once, to set the rate of the first step
        super().__init__(optimizer, lambda step: warmup_decay(step, config))
        self._step_happened = False
        optimizer.register_step_post_hook(self._note_step)

    def _note_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # A scaler that finds an overflow does not call step(), except on a fused optimizer: that one is always
        # called, with the overflow flag beside it, and skips inside its kernel.
        found_inf = getattr(optimizer, "found_inf", None)
        # Gradients that are not finite are taken away before the step (run/guards.py).
        self._step_happened = False
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_happened = found_inf is None or not found_inf.item()
                    return

    def step(self, epoch: int | None = None) -> None:
        if self._step_happened:
            self._step_happened = False
            super().step()
        else:
            self.skipped_steps += 1
