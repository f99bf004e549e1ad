"""The checkpoint that a run goes on from: by itself the latest one that is whole, and one for all of its processes."""

from dataclasses import dataclass
from pathlib import Path

from nanogpt_lit.checkpoint.run_file import SUFFIX, load_run, step_of, verify_run
from nanogpt_lit.checkpoint.state import RunState
from nanogpt_lit.checkpoint.tensor_file import HEADER_DIGEST, TensorFile
from nanogpt_lit.errors import UserError
from nanogpt_lit.runtime.processes import are_several, broadcast, gathered, rank

PREFERRED = ("last", "best", "previous")
"""Names in the order of preference among those that hold the same step."""


@dataclass(frozen=True)
class Newest:
    path: Path
    step: int
    remarks: list[str]
    """A line for each that would have come first and cannot be read."""

    @property
    def run_folder(self) -> Path:
        return self.path.parent.parent


def newest_run(root: Path) -> Path | None:
    """The run below `root` that was saved last, by the modification times of its checkpoints; None if there is none."""
    found = [path for path in root.glob(f"*/checkpoints/*{SUFFIX}") if not path.is_dir()]
    return max(found, key=modified_ns).parent.parent if found else None


def newest_checkpoint(root: Path) -> Newest | None:
    """The newest checkpoint of the run below `root` that was saved last; None where no run has one.

    Raises UserError as `latest_of` does.
    """
    run = newest_run(root)
    return None if run is None else latest_of(run)


def latest_of(run: Path) -> Newest:
    """The checkpoint of the highest step whose every byte is as it was written; never another run's.

    Modification times only choose between runs: inside one, a clock that was set back, or a copy that did not keep
    them, must not cost steps. Raises UserError where no checkpoint is whole: starting anew would bury them.
    """
    damaged: list[str] = []
    tried: list[tuple[int, int, Path]] = []
    for path in sorted((run / "checkpoints").glob(f"*{SUFFIX}"), key=preference):
        try:
            tried.append((-step_of(path), preference(path), path))
        except (UserError, OSError) as error:
            damaged.append(reason(path, error))
    for _, _, path in sorted(tried):
        try:
            step = verify_run(path)
        except (UserError, OSError) as error:
            damaged.append(reason(path, error))
            continue
        if damaged:
            damaged[-1] += f" Going on from {path}, step {step:,}."
        return Newest(path, step, damaged)
    raise UserError(
        f"resume=auto finds no whole checkpoint in {run / 'checkpoints'}: {damaged[0]} Move that run away to start "
        "anew, or name another run's checkpoint with ckpt_path."
    )


def modified_ns(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:  # a link to nothing: the disk that it leads to may only be away
        return path.lstat().st_mtime_ns


def preference(path: Path) -> int:
    return PREFERRED.index(path.stem) if path.stem in PREFERRED else len(PREFERRED)


def reason(path: Path, error: Exception) -> str:
    if path.is_symlink() and not path.exists():
        return f"{path} is a link to {path.readlink()}, which is not there."
    return f"{str(error).rstrip('.')}."


def load_together(path: Path | None, sharded: bool = False) -> RunState | None:
    """The checkpoint that the first process goes on from, for all of them: their machines may have no disk in common.

    Who has the same file reads it, the others are sent it. path: the first one's counts; None starts anew
    sharded: the network is, and takes its weights and moments itself (UnreadRun), from a disk that all have in common
    Raises UserError, on all of them, where the first one cannot read it.
    """
    if sharded:
        from nanogpt_lit.checkpoint.sharded_network import unread_run  # late, for few runs are sharded

        path = broadcast(path)
        return None if path is None else unread_run(path)
    if not are_several():
        return None if path is None else load_run(path)
    named, digest = broadcast((path is not None, digest_of(path)))
    if not named:
        return None
    state, error = None, None
    if path is not None and (rank() == 0 or digest_of(path) == digest):
        try:
            state = load_run(path)
        except (UserError, OSError) as problem:
            error = str(problem)
    if (error := broadcast(error)) is not None:
        raise UserError(error)
    if not all(gathered(state is not None)):
        sent = broadcast(state if rank() == 0 else None)
        state = state if state is not None else sent
    return state


def digest_of(path: Path | None) -> str | None:
    """The digest of a checkpoint's header, which holds those of its tensors; None for a file that cannot be read."""
    try:
        return None if path is None else TensorFile(path).metadata[HEADER_DIGEST]
    except (ValueError, OSError):
        return None
