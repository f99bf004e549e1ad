"""The folder that accelerate's save_state writes and its load_state reads, to and from a RunState.

It needs no accelerate: the folder is safetensors and torch.save. What accelerate has no place for lies beside its
files, in nanogpt_lit.json, which load_state leaves alone.
"""

import codecs
import json
import random
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanogpt_lit.checkpoint.exchange import PREFIX, Described, new_run, with_moments
from nanogpt_lit.checkpoint.foreign_files import read_torch_file
from nanogpt_lit.checkpoint.run_file import check_counts, stored_once
from nanogpt_lit.checkpoint.state import RunState
from nanogpt_lit.checkpoint.tensor_file import flatten, unflatten
from nanogpt_lit.errors import UserError
from nanogpt_lit.gpt.network import HEAD
from nanogpt_lit.gpt.networks import config_of, network_class
from nanogpt_lit.runtime.durable import durable_folder
from nanogpt_lit.runtime.process_settings import RandomState

WEIGHTS, OPTIMIZER, SCALER = "model.safetensors", "optimizer.bin", "scaler.pt"
RANDOM = "random_states_{}.pkl"
SCHEDULE = "custom_checkpoint_0.pkl"
"""The first object of register_for_checkpointing: a prepared schedule would step once per process."""
PREPARED_SCHEDULE = "scheduler.bin"
BESIDE = "nanogpt_lit.json"
PREFIXES = re.compile(r"^(module\.|_orig_mod\.|gpt\.)+")
"""Prefixes that DDP, torch.compile and LitNanoGPT put before the names of the network's weights."""
KEPT_BESIDE = (
    "hyper_parameters", "data", "batches", "processes", "accumulate_grad_batches", "tokens", "validations", "elastic",
)  # fmt: skip

# What NumPy's random state is pickled with. They build arrays, and run nothing.
NUMPY_TYPES = [np._core.multiarray._reconstruct, np.ndarray, np.dtype, np.dtypes.UInt32DType, codecs.encode]  # type: ignore[attr-defined]


def write_folder(folder: Path, state: RunState) -> None:
    """Write a folder for `Accelerator.load_state`, after `prepare(module, optimizer)` and
    `register_for_checkpointing(schedule)`."""
    with durable_folder(folder) as partial:
        save_file(stored_once(state.weights)[0], partial / WEIGHTS, metadata={"format": "pt"})
        torch.save(state.optimizer, partial / OPTIMIZER)
        torch.save(state.schedule, partial / SCHEDULE)
        if state.scaler is not None:
            torch.save(state.scaler, partial / SCALER)
        for rank, random_state in enumerate(state.random):
            torch.save(with_accelerates_names(random_state, state.batches), partial / RANDOM.format(rank))
        beside = {name: flatten(getattr(state, name), name, {}) for name in KEPT_BESIDE}
        (partial / BESIDE).write_text(json.dumps(beside, indent=1), encoding="utf-8")


def with_accelerates_names(state: RandomState, batches: int) -> dict[str, Any]:
    """A random state as accelerate names it. load_state restores all generators or, without a word, none: so those of
    Python and NumPy, from which nothing here draws, are there too."""
    names = {"cpu": "torch_manual_seed", "cuda": "torch_cuda_manual_seed"}
    return {
        "step": batches,
        "random_state": random.Random(0).getstate(),
        "numpy_random_seed": np.random.RandomState(0).get_state(),
        **{names[kind]: [tensor] if kind == "cuda" else tensor for kind, tensor in state.items() if kind in names},
    }


def read_folder(folder: Path, described: Described | None = None) -> RunState:
    """The run of a folder by `write_folder`, or by somebody's own save_state.

    described: what the YAML of the run says; for the latter
    Raises UserError, naming the file, for one that is missing, damaged, or holds more than data.
    """
    if described is not None and not (folder / BESIDE).is_file():
        return read_users_folder(folder, described)
    beside = read_beside(folder)
    schedule = read_schedule(folder)
    random_states = list(read_random_states(folder))
    if not random_states:
        raise UserError(f"{folder / RANDOM.format(0)} is missing: it says after how many micro-batches the run stands.")
    weights = read_weights(folder)
    optimizer = read_pickle(folder / OPTIMIZER)
    scaler = read_pickle(folder / SCALER) if (folder / SCALER).is_file() else None
    try:
        batches, data = random_states[0]["step"], beside["data"]
        if "network" in beside["hyper_parameters"] or "gpt" in beside["hyper_parameters"]:  # or a user's own module
            config = config_of(beside["hyper_parameters"])
            if config.tied_head:  # save_state keeps a tied matrix once
                embedding = PREFIX + network_class(config).EMBEDDING
                weights.setdefault(PREFIX + HEAD, weights[embedding])
        since = (batches - beside.pop("batches")) * beside["processes"]
        beside["tokens"] += since * data.get("batch_size", 0) * data.get("block_size", 0)
        state = RunState(
            weights=weights,
            optimizer=optimizer,
            schedule=schedule,
            scaler=scaler,
            random=[with_our_names(state) for state in random_states],
            # The schedule counts the steps that happened and those that the scaler skipped.
            step=schedule["last_epoch"] + schedule["skipped_steps"],
            batches=batches,
            **beside,
        )
        check_counts(state)
    except (AttributeError, KeyError, TypeError, IndexError) as error:
        raise UserError(
            f"{folder} is not as accelerate and `python -m nanogpt_lit convert` wrote it ({type(error).__name__})."
        ) from error
    return state


def read_users_folder(folder: Path, described: Described) -> RunState:
    """The run of a loop of somebody's own, with LitNanoGPT and the optimizer of its configure_optimizers()."""
    weights = {PREFIXES.sub("", name): tensor for name, tensor in read_weights(folder).items()}
    optim, schedule = described.optim, described.schedule
    begun = new_run(folder, weights, described.network, described.tokenizer, optim, schedule)
    optimizer = read_pickle(folder / OPTIMIZER)
    random_states = list(read_random_states(folder))
    try:
        # Our schedule knows the steps that were left out, too. Any other may count something else than steps.
        rate = read_schedule(folder)
        step = int(rate["last_epoch"]) + int(rate["skipped_steps"])
    except UserError:
        step = max((int(moments.get("step", 0)) for moments in optimizer.get("state", {}).values()), default=0)
        rate = {**begun.schedule, "last_epoch": step, "_step_count": step + 1}
    accumulate, processes = described.accumulate_grad_batches, max(1, len(random_states))
    state = replace(
        begun,
        optimizer=with_moments(folder, begun, optim, optimizer),
        schedule=rate,
        scaler=read_pickle(folder / SCALER) if (folder / SCALER).is_file() else None,
        random=[with_our_names(state) for state in random_states],
        step=step,
        batches=step * accumulate,
        processes=processes,
        accumulate_grad_batches=accumulate,
    )
    return described.complete(state)


def read_weights(folder: Path) -> dict[str, Tensor]:
    try:
        return load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / WEIGHTS} cannot be read: {error}.") from error


def read_beside(folder: Path) -> dict[str, Any]:
    path = folder / BESIDE
    if not path.is_file():
        raise UserError(
            f"{folder} does not say what network and data it belongs to; give the YAML of its run: convert {folder} TO "
            "--config FILE.yaml."
        )
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        return {name: unflatten(kept[name], {}) for name in KEPT_BESIDE}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not as `python -m nanogpt_lit convert` wrote it ({error}).") from error


def read_schedule(folder: Path) -> dict[str, Any]:
    for path in (folder / SCHEDULE, folder / PREPARED_SCHEDULE):
        if path.is_file():
            schedule = read_pickle(path)
            if "last_epoch" in schedule and "skipped_steps" in schedule:
                return schedule
    raise UserError(
        f"{folder} holds no state of the schedule; register it first: accelerator.register_for_checkpointing(schedule)."
    )


def read_random_states(folder: Path) -> Iterator[dict[str, Any]]:
    rank = 0
    while (path := folder / RANDOM.format(rank)).is_file():
        yield read_pickle(path)
        rank += 1


def with_our_names(state: dict[str, Any]) -> RandomState:
    cuda = state.get("torch_cuda_manual_seed")
    return {"cpu": state["torch_manual_seed"], **({"cuda": cuda[0]} if cuda else {})}


def read_pickle(path: Path) -> dict[str, Any]:
    """A dictionary of tensors and plain values; anything else in the file is refused before it can run."""
    try:
        with torch.serialization.safe_globals(NUMPY_TYPES):
            content = read_torch_file(path)
        if not isinstance(content, dict):
            raise TypeError(f"a {type(content).__name__}")
    except Exception as error:
        raise UserError(
            f"{path} is damaged, missing, or holds more than tensors and numbers ({type(error).__name__})."
        ) from error
    return content
