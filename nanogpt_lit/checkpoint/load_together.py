"""One checkpoint for all processes of a run, whose machines may have no disk in common."""

from pathlib import Path

from nanogpt_lit.checkpoint.run_file import load_run
from nanogpt_lit.checkpoint.state import RunState
from nanogpt_lit.checkpoint.tensor_file import HEADER_DIGEST, TensorFile
from nanogpt_lit.errors import UserError
from nanogpt_lit.runtime.processes import are_several, broadcast, gathered, rank


def load_together(path: Path | None) -> RunState | None:
    """The checkpoint that the first process goes on from, for all of them: their machines may have no disk in common.

    Who has the same file reads it, the others are sent it. path: the first one's counts; None starts anew
    Raises UserError, on all of them, where the first one cannot read it.
    """
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
    """Of a checkpoint's header, which holds those of its tensors; None for a file that cannot be read."""
    try:
        return None if path is None else TensorFile(path).metadata[HEADER_DIGEST]
    except (ValueError, OSError):
        return None
