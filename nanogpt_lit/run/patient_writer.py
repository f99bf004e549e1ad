"""TensorBoard's curves on a disk that may be full: training is worth more than some points of them."""

import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from torch.utils.tensorboard import SummaryWriter


class PatientWriter(SummaryWriter):
    """Says once that the disk takes nothing, and leaves points out. It tries again at each flush: before a checkpoint.

    TensorBoard's own writer ends with its first error, and hands it to every call from then on.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._failing = False
        super().__init__(*arguments, **options)

    def add_scalar(self, *arguments: Any, **options: Any) -> None:
        self._unless_failing(super().add_scalar, *arguments, **options)

    def add_text(self, *arguments: Any, **options: Any) -> None:
        self._unless_failing(super().add_text, *arguments, **options)

    def flush(self) -> None:
        was_failing, self._failing = self._failing, False
        try:
            if was_failing:
                self._get_file_writer()
            super().flush()
        except OSError as error:
            self._fail(error, say=not was_failing)
        else:
            if was_failing:
                tell("the curves are written again")

    def close(self) -> None:
        if not self._failing:
            self._unless_failing(super().close)

    def _unless_failing(self, write: Callable[..., None], *arguments: Any, **options: Any) -> None:
        if self._failing:
            return
        try:
            write(*arguments, **options)
        except OSError as error:
            self._fail(error, say=True)

    def _fail(self, error: OSError, say: bool) -> None:
        if say:
            tell(
                f"warning: the curves cannot be written: {error}. Training goes on without them, and tries again at "
                "the next checkpoint."
            )
        self._failing = True
        # TensorBoard reads nothing behind half a record: what comes next goes into a file of its own.
        writers: dict[str, Any] = self.all_writers or {}
        for writer in writers.values():
            with suppress(OSError):
                writer.close()
        self.file_writer = self.all_writers = None


def tell(line: str) -> None:
    with suppress(OSError):  # the output may go to a file on the same disk
        print(line, file=sys.stderr, flush=True)
