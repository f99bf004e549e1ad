"""Saving on a disk that may be full: training is worth more than one checkpoint of it."""

import shutil
import sys
from pathlib import Path

from torch import Tensor

from nanogpt_lit.checkpoint.run_file import save_run
from nanogpt_lit.checkpoint.state import RunState
from nanogpt_lit.checkpoint.tree import take_apart

BESIDES = 2**20
"""Bytes, for the header and what is not in tensors."""


class PatientSaver:
    """Saves where it can. Where it cannot, it says so once, keeps what there is, and tries again at the next save."""

    def __init__(self) -> None:
        self.failing = False
        """Whether the latest save failed."""

    def save(self, path: Path, state: RunState) -> bool:
        """Whether the checkpoint was written. Raises ValueError as `save_run` does."""
        try:
            check_space(path.parent, bytes_of(state))
            save_run(path, state)
        except OSError as error:
            if not self.failing:
                self._say(
                    f"{path} could not be saved at step {state.step:,}: {error}. Training goes on, and tries again at "
                    "the next save; the checkpoints that are there stay."
                )
            self.failing = True
            return False
        if self.failing:
            self._say(f"{path} is saved again, at step {state.step:,}.")
        self.failing = False
        return True

    def _say(self, line: str) -> None:
        print(f"warning: {line}" if not self.failing else line, file=sys.stderr, flush=True)


def check_space(folder: Path, needed: int) -> None:
    """Raises OSError where a file of so many bytes does not fit: found out before, not after writing for a minute."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f"it takes {needed / 2**20:,.0f} MiB and the disk has {free / 2**20:,.0f} MiB left")


def bytes_of(state: RunState) -> int:
    tensors: dict[str, Tensor] = {}
    take_apart(state.optimizer, "optimizer", tensors)
    tensors |= {f"weights.{tensor.data_ptr()}": tensor for tensor in state.weights.values()}
    return sum(tensor.nbytes for tensor in tensors.values()) + BESIDES
