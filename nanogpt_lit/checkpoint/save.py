"""A checkpoint with the keys of Lightning's, written without it."""

import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def save_checkpoint(
    path: Path,
    *,
    state_dict: dict[str, Any],
    hyper_parameters: dict[str, Any],
    data: dict[str, Any],
    optimizer: dict[str, Any],
    schedule: dict[str, Any],
    scaler: dict[str, Any] | None,
    step: int,
) -> None:
    """`generate --ckpt` and `validate --ckpt_path` read it. It appears whole, or the previous one stays.

    data: TokenDataModule.state_dict()   step: optimizer steps so far
    """
    checkpoint = {
        "state_dict": state_dict,
        "hyper_parameters": hyper_parameters,
        "TokenDataModule": data,
        "optimizer_states": [optimizer],
        "lr_schedulers": [schedule],
        "global_step": step,
        "epoch": 0,
        "pytorch-lightning_version": version("lightning"),
    }
    if scaler is not None:
        checkpoint["MixedPrecision"] = scaler  # where Lightning's precision plugin looks for it
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
