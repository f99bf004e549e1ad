"""Numbers of a configuration: finite, of at most 64 bits, and in the range in which they mean something.

What checks itself (optimizers, schedules, the network) is left to do so; these are the keys that nobody checks, or that
end in a division by zero, in a loop without end or in an allocation that no machine has.
"""

import math
from collections.abc import Mapping
from typing import Any

from nanogpt_lit.errors import UserError
from nanogpt_lit.untrusted.config_paths import values_of

COUNT = 2**31
"""More than anything here is counted to."""
RANGES: Mapping[str, tuple[float, float]] = {
    "seed_everything": (0, 2**32 - 1),  # NumPy's
    "data.seed": (0, 2**62),
    "trainer.num_nodes": (1, 2**16),
    "trainer.accumulate_grad_batches": (1, COUNT),
    "trainer.log_every_n_steps": (1, COUNT),
    "trainer.val_check_interval": (1, 2**62),
    "trainer.check_val_every_n_epoch": (1, COUNT),
    "trainer.gradient_clip_val": (0, math.inf),
    **{f"trainer.limit_{of}_batches": (0, 2**62) for of in ("train", "val", "test", "predict")},
    "data.block_size": (-math.inf, 2**24),
    "data.batch_size": (-math.inf, 2**24),
    "model.gpt.n_layer": (-math.inf, 2**12),
    "model.gpt.n_head": (-math.inf, 2**16),
    "model.gpt.n_embd": (-math.inf, 2**18),
    "model.gpt.vocab_size": (-math.inf, 2**24),
    "model.optim.eps": (0, math.inf),
}


def check_numbers(settings: Mapping[str, Any]) -> None:
    """Raises UserError for a number that no run can use. settings: of fit, as nested mappings"""
    for keys, value, _ in values_of(settings):
        if not isinstance(value, int | float) or isinstance(value, bool) or "init_args" in keys:
            continue
        key = ".".join(keys)
        if not math.isfinite(value):
            raise UserError(f"{key}={value} is not a number to train with; a finite one works.")
        if isinstance(value, int) and abs(value) >= 2**63:
            raise UserError(f"{key}={value} is more than 64 bits hold; a smaller number works.")
        least, most = RANGES.get(key, (-math.inf, math.inf))
        if value < least:
            raise UserError(f"{key}={value} must be at least {least:,}.")
        if value > most:
            raise UserError(f"{key}={value} must be at most {most:,}.")
