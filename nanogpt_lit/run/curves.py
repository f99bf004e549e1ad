"""Where the curves and texts of a run go: TensorBoard, on a disk that may be full.

Training is worth more than some points of them.
"""

import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter


class Curves:
    """Takes what a run has to show, and shows nothing: on every process but the first."""

    def add(self, values: dict[str, float], step: int) -> None:
        """Points of curves, by their tags."""

    def add_text(self, tag: str, text: str, step: int) -> None:
        """Into the TEXT tab."""

    def flush(self) -> None:
        """To the disk: before a checkpoint, or the curves of a run that is killed would end before it."""

    def close(self) -> None: ...


class TensorBoardCurves(Curves):
    """purge_step: from which on TensorBoard forgets what an earlier process of the run drew, for it is drawn again"""

    def __init__(self, folder: Path, purge_step: int | None = None) -> None:
        self._writer = BestEffortWriter(str(folder), purge_step=purge_step)

    def add(self, values: dict[str, float], step: int) -> None:
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)

    def add_text(self, tag: str, text: str, step: int) -> None:
        self._writer.add_text(tag, code_block(text), step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def code_block(text: str) -> str:
    """For TensorBoard's TEXT tab, which reads Markdown: it then leaves line breaks and signs alone."""
    return "\n".join("    " + line for line in text.splitlines())


class BestEffortWriter(SummaryWriter):
    """Says once that the disk takes nothing, and leaves points out. It tries again at each flush: before a checkpoint.

    TensorBoard's own writer ends with its first error, and hands it to every call from then on.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._failing = False
        if not isinstance(threading.excepthook, LeaveToFlush):
            threading.excepthook = LeaveToFlush(threading.excepthook)
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
                f"warning: the curves cannot be written: {error.strerror or error}. Training goes on without them, and "
                "tries again at the next checkpoint."
            )
        self._failing = True
        # TensorBoard reads nothing behind half a record: what comes next goes into a file of its own.
        writers: dict[str, Any] = self.all_writers or {}
        for writer in writers.values():
            with suppress(OSError):
                writer.close()
        self.file_writer = self.all_writers = None


class LeaveToFlush:
    """threading.excepthook without TensorBoard's thread, whose error `flush` hands over, to be told in a sentence."""

    def __init__(self, before: Callable[[threading.ExceptHookArgs], object]) -> None:
        self._before = before

    def __call__(self, failure: threading.ExceptHookArgs) -> None:
        if not (isinstance(failure.exc_value, OSError) and type(failure.thread).__name__ == "_AsyncWriterThread"):
            self._before(failure)


def tell(line: str) -> None:
    with suppress(OSError):  # the output may go to a file on the same disk
        print(line, file=sys.stderr, flush=True)
