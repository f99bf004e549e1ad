"""Saving beside the training, on a disk that may be full: training is worth more than one checkpoint of it."""

import shutil
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from nanogpt_lit.checkpoint.run_file import RunContent, check_finite
from nanogpt_lit.checkpoint.state import RunState

BESIDES = 2**20
"""Bytes, for the header and what is not in tensors."""


class PatientSaver:
    """Saves where it can. Where it cannot, it says so once, keeps what there is, and tries again at the next save.

    In the background, what it writes are the run's own tensors, not copies: they stay as they are through the forward
    and backward passes that follow, until the next optimizer step, which has to `wait`.
    """

    def __init__(self) -> None:
        self.failing = False
        """Whether the latest save failed."""
        self.in_background = False
        """Whether the loop calls `wait` before each optimizer step; otherwise `save` does."""
        self._thread: ThreadPoolExecutor | None = None  # not yet: a Trainer that starts processes pickles its plugins
        self._writing: list[Future[None]] = []

    def save(self, path: Path, state: RunState) -> None:
        """Raises UserError as `save_run` does."""
        check_finite(path, state.weights)
        content = RunContent.of(state)
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing.append(self._thread.submit(self._write, path, content, state.step))
        if not self.in_background:
            self.wait()

    def wait(self) -> None:
        """Returns once nothing is being written any more. Raises what went wrong, unless it was the disk."""
        while self._writing:
            self._writing.pop(0).result()

    def _write(self, path: Path, content: RunContent, step: int) -> None:
        try:
            check_space(path.parent, content.nbytes + BESIDES)
            content.write(path)
        except OSError as error:
            if not self.failing:
                self._say(
                    f"{path} could not be saved at step {step:,}: {error}. Training goes on, and tries again at "
                    "the next save; the checkpoints that are there stay."
                )
            self.failing = True
            return
        if self.failing:
            self._say(f"{path} is saved again, at step {step:,}.")
        self.failing = False

    def _say(self, line: str) -> None:
        with suppress(OSError):  # the output may go to a file on the same disk
            print(f"warning: {line}" if not self.failing else line, file=sys.stderr, flush=True)


def check_space(folder: Path, needed: int) -> None:
    """Raises OSError where a file of so many bytes does not fit: found out before, not after writing for a minute."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f"it takes {needed / 2**20:,.0f} MiB and the disk has {free / 2**20:,.0f} MiB left")
