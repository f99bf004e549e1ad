"""Checkpoints from and to the formats of the two frameworks."""

import zipfile
from pathlib import Path

import torch

from nanogpt_lit.checkpoint.accelerate_format import read_folder, write_folder
from nanogpt_lit.checkpoint.lightning_format import from_lightning, to_lightning
from nanogpt_lit.checkpoint.run_file import SUFFIX, check_counts, load_run, save_run
from nanogpt_lit.checkpoint.state import RunState
from nanogpt_lit.checkpoint.torch_file import read_torch_file
from nanogpt_lit.durable import durable_file
from nanogpt_lit.errors import UserError


def convert(source: Path, target: Path) -> RunState:
    """Writes the checkpoint at `source` as what the name of `target` says, and returns it.

    .safetensors is the format of every loop here, .ckpt Lightning's, a name without a suffix accelerate's folder.
    Raises UserError for a source that is none of the three, and for a target that is there already.
    """
    if target.exists():
        raise UserError(f"{target} exists already; name another, or remove it first.")
    if target.suffix not in (SUFFIX, ".ckpt", ""):
        raise UserError(
            f"{target} names no format; FILE{SUFFIX} is nanogpt_lit's, FILE.ckpt Lightning's, and a name without a "
            "suffix accelerate's folder."
        )
    state = read(source)
    if target.suffix == SUFFIX:
        save_run(target, state)
    elif target.suffix == ".ckpt":
        with durable_file(target) as file:
            torch.save(to_lightning(state), file)
    else:
        write_folder(target, state)
    return state


def read(source: Path) -> RunState:
    if source.is_dir():
        return read_folder(source)
    if source.is_file() and zipfile.is_zipfile(source):
        return read_ckpt(source)
    return load_run(source)


def read_ckpt(path: Path) -> RunState:
    """Of a file that Trainer.save_checkpoint wrote."""
    try:
        state = from_lightning(read_torch_file(path))
        check_counts(state)
        return state
    except Exception as error:  # what the readers of zip, of pickle and of a dictionary raise is not one family
        reason = " ".join(str(error).split())[:100]
        raise UserError(
            f"{path} is damaged, or is not a checkpoint that Lightning wrote of one optimizer and one schedule "
            f"({type(error).__name__}: {reason})."
        ) from error
