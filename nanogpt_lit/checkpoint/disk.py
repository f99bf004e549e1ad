"""Saving beside the training, on a disk that may be full: training is worth more than one checkpoint of it."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from nanogpt_lit.checkpoint.run_file import RunContent, check_finite
from nanogpt_lit.checkpoint.shards import Index, sweep_shards
from nanogpt_lit.checkpoint.state import RunState
from nanogpt_lit.errors import UserError, tell
from nanogpt_lit.runtime.durable import check_space
from nanogpt_lit.runtime.processes import broadcast, rank

END_S, STOP_S = 300.0, 20.0
"""Seconds for which a save that failed is tried again at a run's end, and where the run was asked to stop."""
PAUSE_S = 5.0


class BestEffortSaver:
    """Saves where it can. Where it cannot, it says so once, keeps what there is, and tries again at the next save.

    In the background, what it writes are the run's own tensors, not copies: they stay as they are through the forward
    and backward passes that follow, until the next optimizer step, which has to call `let_go`. A sharded network is
    saved by all processes together, and not in the background, where they could not wait for each other.
    """

    def __init__(self) -> None:
        self.failing = False
        """True where the latest save failed."""
        self.in_background = False
        """True where the loop calls `let_go` before each optimizer step; otherwise `save` waits."""
        self.holds_tensors = False
        """True while the run's own tensors are still to be written: until `let_go`."""
        self._thread: ThreadPoolExecutor | None = None  # not yet: a Trainer that starts processes pickles its plugins
        self._writing: list[Future[None]] = []
        self._unsaved: dict[Path, tuple[RunContent, int]] = {}
        """Checkpoints that the disk did not take, of the step that the run stands at, with that step."""
        self._shards: dict[tuple[int, Path], Index] = {}
        """The latest that are written, by step and folder: for another file of the same step there."""

    def save(self, path: Path, state: RunState) -> None:
        """Raises UserError as `save_run` does."""
        check_finite(path, state.weights)
        content = RunContent.of(state)
        if content.sharded:
            if any(step != state.step for _, step in self._unsaved.values()):
                self._unsaved.clear()  # not every precision of a sharded strategy calls let_go
            self._write(path, content, state.step)
            return
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.holds_tensors = True
        self._writing.append(self._thread.submit(self._write, path, content, state.step))
        if not self.in_background:
            self.wait()

    def wait(self) -> None:
        """Returns once nothing is being written any more. Raises what went wrong, unless it was the disk."""
        while self._writing:
            self._writing.pop(0).result()

    def let_go(self) -> None:
        """Returns once the run's tensors may change."""
        self.wait()
        self._unsaved.clear()
        self.holds_tensors = False

    def insist(self, patience_s: float, asked_to_stop: Callable[[], bool] = lambda: False) -> None:
        """Tries again what the disk did not take of this step: for a run that ends here, and has nothing better to do.

        asked_to_stop: whether a signal came; then it is tried once more
        Raises UserError where it is still not saved.
        """
        self.wait()
        started_s = time.monotonic()
        until_s = started_s + patience_s
        # Processes that save together end together, by the clock and the signals of the first.
        together = any(content.sharded for content, _ in self._unsaved.values())
        agreed: Callable[[bool], bool] = broadcast if together else bool
        while self._unsaved and agreed(time.monotonic() < until_s):
            tries_at_s = min(time.monotonic() + PAUSE_S, until_s)
            while not asked_to_stop() and (pause_s := tries_at_s - time.monotonic()) > 0:
                time.sleep(min(pause_s, 0.2))
            for path, (content, step) in list(self._unsaved.items()):
                self._write(path, content, step)
            if agreed(asked_to_stop()):
                break
        if self._unsaved:
            path, (_, step) = next(iter(self._unsaved.items()))
            tried_s = time.monotonic() - started_s
            raise UserError(
                f"the run ended at step {step:,} and {path} could not be saved: the disk took nothing for "
                f"{tried_s:,.0f} s. Make room, and --resume auto repeats the steps since the last checkpoint."
            )

    def _write(self, path: Path, content: RunContent, step: int) -> None:
        try:
            if not content.sharded:  # whose processes find out together
                check_space(path.parent, content.nbytes)
            if (shards := content.write(path, self._shards.get((step, path.parent)))) is not None:
                self._shards = {(step, path.parent): shards}
            if rank() == 0:
                sweep_shards(path.parent)
        except OSError as error:
            if not self.failing:
                self._say(
                    f"{path} could not be saved at step {step:,}: {error}. The checkpoints that are there stay. It is "
                    f"tried again at the next save; at the end of the run, for {END_S / 60:g} minutes."
                )
            self.failing = True
            self._unsaved[path] = content, step
            return
        self._unsaved.pop(path, None)
        if self.failing:
            self._say(f"{path} is saved again, at step {step:,}.")
        self.failing = False

    def _say(self, line: str) -> None:
        if rank() == 0:
            tell(f"warning: {line}" if not self.failing else line)
