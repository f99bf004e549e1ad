"""The YAML's trainer section, for a loop that is not Lightning's Trainer."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nanogpt_lit.loops.compatibility import TEXT_SAMPLES
from nanogpt_lit.runtime.precision import full_precision_name

if TYPE_CHECKING:  # whose torch takes a second to import, and the section can be read without
    from nanogpt_lit.loops.contract import LoopSettings


def loop_settings(trainer: Mapping[str, Any], val_batches: int, seed: int | None) -> "LoopSettings":
    """The settings of a run. val_batches: that there are, of which limit_val_batches may be a share"""
    from nanogpt_lit.loops.contract import LoopSettings

    interval, limit = trainer["val_check_interval"], trainer["limit_val_batches"]
    if isinstance(limit, float):  # a share, as Lightning counts it
        limit = int(val_batches * limit)
    if limit == 0:
        interval, limit = None, None
    return LoopSettings(
        max_steps=trainer["max_steps"],
        accumulate_grad_batches=trainer["accumulate_grad_batches"],
        gradient_clip_val=trainer["gradient_clip_val"],
        precision=full_precision_name(trainer["precision"]),
        val_check_interval=interval,
        limit_val_batches=limit,
        seed=seed,
        deterministic=trainer["deterministic"],
    )


def text_samples(trainer: Mapping[str, Any]) -> dict[str, Any]:
    """What the YAML says of the text samples: prompt, tokens, temperature, seed."""
    of_samples = (c for c in trainer["callbacks"] or [] if c["class_path"].endswith(TEXT_SAMPLES))
    return {key: value for c in of_samples for key, value in vars(c["init_args"]).items()}


def asked_processes(trainer: Mapping[str, Any]) -> int | None:
    """trainer.devices times trainer.num_nodes; None when the YAML leaves it open."""
    devices = trainer["devices"]
    if isinstance(devices, str) and devices.isdigit():
        devices = int(devices)
    if isinstance(devices, list):
        devices = len(devices)
    return devices * trainer["num_nodes"] if isinstance(devices, int) and devices > 0 else None
