"""The checkpoint that a run goes on from by itself: the newest one that is whole."""

from dataclasses import dataclass
from pathlib import Path

from nanogpt_lit.checkpoint.run_file import SUFFIX, verify_run
from nanogpt_lit.errors import UserError

PREFERRED = ("last", "best", "previous")
"""Of those written in the same instant."""


@dataclass(frozen=True)
class Newest:
    path: Path
    step: int
    remarks: list[str]
    """A line for each newer one that is damaged."""

    @property
    def run_folder(self) -> Path:
        return self.path.parent.parent


def newest_checkpoint(root: Path) -> Newest | None:
    """Of the run below `root` that was saved last: its newest checkpoint whose every byte is as it was written.

    None where no run has one. Raises UserError where there are some and none is whole: starting anew would bury them.
    """
    found = sorted(root.glob(f"*/checkpoints/*{SUFFIX}"), key=age)
    if not found:
        return None
    # Never another run's: it would go on from other weights than the user takes it to.
    of_the_run = [path for path in found if path.parent == found[0].parent]
    damaged: list[str] = []
    for path in of_the_run:
        try:
            step = verify_run(path)
        except ValueError as error:
            damaged.append(str(error))
            continue
        return Newest(path, step, [f"{sentence} Going on from {path}, step {step:,}." for sentence in damaged[:1]])
    raise UserError(
        f"resume=auto finds no whole checkpoint in {found[0].parent}: {damaged[0]} Move that run away to start anew, "
        "or name another run's checkpoint with ckpt_path."
    )


def age(path: Path) -> tuple[int, int]:
    """Sorts the newest first."""
    rank = PREFERRED.index(path.stem) if path.stem in PREFERRED else len(PREFERRED)
    return -path.stat().st_mtime_ns, rank
