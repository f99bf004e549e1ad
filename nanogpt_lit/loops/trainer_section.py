"""The YAML's trainer section, for a loop that is not Lightning's Trainer."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nanogpt_lit.errors import UserError

if TYPE_CHECKING:  # whose torch takes a second to import, and the section can be read without
    from nanogpt_lit.loops.contract import LoopSettings

FOLLOWED = {
    "accelerator", "strategy", "devices", "num_nodes", "precision", "max_steps", "accumulate_grad_batches",
    "gradient_clip_val", "val_check_interval", "limit_val_batches", "log_every_n_steps", "default_root_dir",
    "enable_progress_bar", "enable_checkpointing", "callbacks", "max_time", "deterministic",
}  # fmt: skip
WITHOUT_EFFECT = {"enable_model_summary", "num_sanity_val_steps", "use_distributed_sampler", "barebones"}
TEXT_SAMPLES = "lightning_callbacks.TextSamples"  # the one callback that has its like here: journal.py
SHORT_PRECISIONS = {None: "32-true", "32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}


def full_precision_name(precision: Any) -> str:
    """ "16-mixed" for 16, as Lightning reads it."""
    return SHORT_PRECISIONS.get(precision if precision is None else str(precision), str(precision))


def check_followed(trainer: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Raises UserError for a key that is set and that only Lightning's Trainer follows: it would be ignored."""
    from nanogpt_lit.loops.contract import AUTOCAST_DTYPES

    foreign = [c["class_path"] for c in trainer["callbacks"] or [] if not c["class_path"].endswith(TEXT_SAMPLES)]
    if foreign:
        raise UserError(
            f"trainer.callbacks holds {foreign[0]}, and only Lightning's Trainer calls it; "
            "take it out, or train with `python -m nanogpt_lit fit`."
        )
    for key, value in trainer.items():
        if key not in FOLLOWED | WITHOUT_EFFECT and value != defaults.get(key):
            raise UserError(
                f"trainer.{key} is set, and only Lightning's Trainer follows it; "
                "take it out, or train with `python -m nanogpt_lit fit`."
            )
    if trainer["strategy"] not in ("auto", "ddp"):
        raise UserError(f"trainer.strategy={trainer['strategy']} does not run here; auto and ddp do.")
    if full_precision_name(trainer["precision"]) not in AUTOCAST_DTYPES:
        raise UserError(f"trainer.precision={trainer['precision']} does not run here; {', '.join(AUTOCAST_DTYPES)} do.")
    interval = trainer["val_check_interval"]
    if interval is not None and not isinstance(interval, int):
        raise UserError(
            f"trainer.val_check_interval={interval} should be an integer: micro-batches between validations."
        )


def check_saves_whole_steps(trainer: Mapping[str, Any]) -> None:
    """Raises UserError when checkpoints, which are made at validations, would be made inside a step.

    Gradients are in no checkpoint: one of half a step would go on to other weights than the run it was made in.
    """
    interval, accumulate = trainer["val_check_interval"], trainer["accumulate_grad_batches"]
    if trainer["enable_checkpointing"] is False or trainer["limit_val_batches"] == 0 or not isinstance(interval, int):
        return
    below = interval // accumulate * accumulate
    if interval != below:
        works = " or ".join(str(n) for n in (below, below + accumulate) if n)
        raise UserError(
            f"trainer.val_check_interval={interval} would save a checkpoint inside a step of "
            f"trainer.accumulate_grad_batches={accumulate} micro-batches; {works} works."
        )


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
    return {key: value for c in trainer["callbacks"] or [] for key, value in vars(c["init_args"]).items()}


def asked_processes(trainer: Mapping[str, Any]) -> int | None:
    """trainer.devices times trainer.num_nodes; None when the YAML leaves it open."""
    devices = trainer["devices"]
    if isinstance(devices, str) and devices.isdigit():
        devices = int(devices)
    if isinstance(devices, list):
        devices = len(devices)
    return devices * trainer["num_nodes"] if isinstance(devices, int) and devices > 0 else None
