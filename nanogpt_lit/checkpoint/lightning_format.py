"""Lightning's checkpoint dictionary, to and from a RunState. It needs no Lightning: the dictionary is plain."""

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from nanogpt_lit.checkpoint.state import RunState

SCALER = "MixedPrecision"
"""Lightning files a scaler under the class name of its precision plugin."""
DATA = "TokenDataModule"
CURVES = "TrainingCurves"
"""The callback whose state is what a run has counted."""
MARKS = {"pytorch-lightning_version", "state_dict", "global_step"}
"""Keys that tell its files from others of torch.save."""
RUN = "nanogpt_lit"
"""Where a checkpoint of ours keeps what Lightning does not: random states, processes, accumulation."""


def from_lightning(checkpoint: dict[str, Any]) -> RunState:
    """Raises KeyError for a dictionary that lacks what every Lightning checkpoint of a training has."""
    rest = dict(checkpoint)
    step = rest.pop("global_step")
    weights = rest.pop("state_dict")
    (optimizer,) = rest.pop("optimizer_states")
    (schedule,) = rest.pop("lr_schedulers")
    rest.pop("pytorch-lightning_version", None)
    callbacks = dict(rest.pop("callbacks", {}))
    counted = callbacks.pop(CURVES, {})
    run = rest.pop(RUN, {})
    processes = run.get("processes", 1)
    data = {name: value for name, value in rest.pop(DATA, {}).items() if name != "batches"}
    batches = rest["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["processed"]
    return RunState(
        weights=weights,
        hyper_parameters=dict(rest.pop("hyper_parameters", {})),
        data=data,
        optimizer=optimizer,
        schedule=schedule,
        scaler=rest.pop(SCALER, None),
        random=run.get("random", []),
        step=step,
        batches=batches,
        processes=processes,
        accumulate_grad_batches=run.get("accumulate_grad_batches", max(1, batches // max(1, step))),
        tokens=counted.get("tokens", batches * processes * data.get("batch_size", 0) * data.get("block_size", 0)),
        trained_s=counted.get("trained_s", 0.0),
        validations=counted.get("validations", {"latest": None, "best": None}),
        elastic=run.get("elastic", {}),
        spikes=run.get("spikes", {}),
        lightning={**rest, "callbacks": callbacks},
    )


def numbered(optimizer: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer's state by the numbers that it gives its own parameters, which go through the groups.

    Under FSDP2, Lightning numbers them as the network does, and in a folder of shards it keeps their names.
    """
    names = [name for group in optimizer["param_groups"] for name in group["params"]]
    number_of = {name: number for number, name in enumerate(names)}
    return {
        "state": {number_of[name]: moments for name, moments in optimizer["state"].items()},
        "param_groups": [
            {**group, "params": [number_of[name] for name in group["params"]]} for group in optimizer["param_groups"]
        ],
    }


def to_lightning(state: RunState) -> dict[str, Any]:
    """What Trainer.fit goes on from, and LitNanoGPT.load_from_checkpoint reads."""
    lightning = dict(state.lightning or {"epoch": 0, "loops": loops(state.step, state.batches)})
    checkpoint = {
        **lightning,
        "pytorch-lightning_version": version("lightning"),
        "global_step": state.step,
        "state_dict": state.weights,
        "optimizer_states": [state.optimizer],
        "lr_schedulers": [state.schedule],
        "hyper_parameters": dict(state.hyper_parameters),
        "callbacks": {
            **lightning.get("callbacks", {}),
            CURVES: {
                "tokens": state.tokens,
                "trained_s": state.trained_s,
                "validations": dict(state.validations),
            },
        },
        RUN: {
            "random": [dict(random) for random in state.random],
            "processes": state.processes,
            "accumulate_grad_batches": state.accumulate_grad_batches,
            "elastic": dict(state.elastic),
            "spikes": dict(state.spikes),
        },
    }
    if state.data:
        checkpoint[DATA] = {**state.data, "batches": state.batches}
    if state.scaler is not None:
        checkpoint[SCALER] = state.scaler
    return checkpoint


def loops(step: int, batches: int) -> dict[str, Any]:
    """Lightning's counters where it would have saved after a validation, in the one endless epoch of our data."""
    idle = {"state_dict": {}, "batch_progress": {**at(counts(0, "started", "processed")), "is_last_batch": False}}
    return {
        "fit_loop": {
            "state_dict": {},
            "epoch_progress": at({"ready": 1, "completed": 0, "started": 1, "processed": 0}),
            # One less: Lightning counts a step here after the validation that follows it.
            "epoch_loop.state_dict": {"_batches_that_stepped": max(0, step - 1)},
            "epoch_loop.batch_progress": {**at(counts(batches, "started", "processed")), "is_last_batch": False},
            "epoch_loop.scheduler_progress": at(counts(step)),
            "epoch_loop.automatic_optimization.state_dict": {},
            "epoch_loop.automatic_optimization.optim_progress": {
                "optimizer": {"step": at(counts(step)), "zero_grad": at(counts(step, "started"))}
            },
            "epoch_loop.manual_optimization.state_dict": {},
            "epoch_loop.manual_optimization.optim_step_progress": at(counts(0)),
            "epoch_loop.val_loop.state_dict": {},
            "epoch_loop.val_loop.batch_progress": idle["batch_progress"],
        },
        "validate_loop": idle,
        "test_loop": idle,
        "predict_loop": {"state_dict": {}, "batch_progress": at(counts(0, "started", "processed"))},
    }


def counts(n: int, *more: str) -> dict[str, int]:
    return dict.fromkeys(("ready", "completed", *more), n)


def at(counted: dict[str, int]) -> dict[str, Any]:
    return {"total": counted, "current": dict(counted)}
