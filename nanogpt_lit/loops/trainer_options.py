"""The arguments that make a Trainer of your own train as `fit` does."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback

from nanogpt_lit.loops.contract import Observer
from nanogpt_lit.loops.lightning_run import LightningRun, run_plugins
from nanogpt_lit.loops.trainer_section import TRAINER_DEFAULTS
from nanogpt_lit.run.stops import seconds_of
from nanogpt_lit.runtime.machine import device_type
from nanogpt_lit.runtime.precision import full_precision_name


def trainer_options(
    precision: str = "32-true",
    accelerator: str = "auto",
    seed: int | None = None,
    callbacks: Sequence[Callback] = (),
    observers: Sequence[Observer] = (),
    **options: Any,
) -> dict[str, Any]:
    """Return the arguments of a Trainer, one process on one device, that trains to the bits of `fit`.

    With them it clips beside a fused optimizer, starts dropout where every loop starts it, survives a step that runs
    out of memory, saves checkpoints that every loop resumes from, and resumes from them to the bit (`ckpt_path`).

    precision: 32-true, bf16-mixed or 16-mixed   seed: of dropout, as seed_everything in a YAML
    callbacks: of your own, which come first   observers: of your own (loops/contract.py)
    options: any others of the Trainer; each wins over TRAINER_DEFAULTS. max_time ends the run as a signal
    does, between two steps and saved: trainer.fit then raises run.stops.Stopped

        Trainer(**trainer_options("bf16-mixed", seed=1337, max_steps=1000))
    """
    options = {**TRAINER_DEFAULTS, **options}
    max_time_s = seconds_of(options.pop("max_time", None))  # Lightning's timer ends inside a step
    run = LightningRun(
        seed=seed, observers=observers, log_every_n_steps=options["log_every_n_steps"], max_time_s=max_time_s
    )
    plugins = run_plugins(options.pop("plugins", None), full_precision_name(precision), device_type(accelerator))
    return {
        "accelerator": accelerator,
        "enable_checkpointing": False,  # Lightning's own, besides those of the run
        **options,
        **plugins,
        "callbacks": [*callbacks, run],  # which has drawn its random numbers before dropout is seeded
    }
