"""One process of a run that scripts/torture.py disturbs: started, and where it is to fail from within, made to.

Nothing of the product knows of it: files are told by their calls to the system, gradients by a hook on the loss.
"""

import functools
import inspect
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from nanogpt_lit.__main__ import main
from nanogpt_lit.checkpoint import disk
from nanogpt_lit.cli.fit import NanoGPTCLI
from nanogpt_lit.cli.settings import quiet_lightning
from nanogpt_lit.module import LitNanoGPT
from nanogpt_lit.runtime.durable import PARTIAL


@dataclass(frozen=True)
class Within:
    """What happens inside the process.

    kill at call: SIGKILL before or after the `number`-th call to open, sync or rename a file of a checkpoint
    kill at byte: the kernel ends the process where the `number`-th file of a checkpoint would pass `size` bytes
    full disk: there the file can grow no further, as on a full disk; the next file can
    full to the end: nor can the next ones; what is tried again at the end is tried for a second
    """

    kind: Literal["kill at call", "kill at byte", "full disk", "full to the end"]
    number: int
    after: bool = False
    size: int = 0
    rank: int = 0
    """The process that it happens in."""


@dataclass(frozen=True)
class Piece:
    """A process, of `processes`, that runs from its start or a checkpoint to wherever it gets."""

    loop: str
    options: list[str]
    output: str
    temporary: str
    nan_every: int = 0
    """One micro-batch in so many has gradients that are NaN; which ones, its tokens say."""
    within: Within | None = None
    rank: int = 0
    processes: int = 1
    port: int = 0


class Forked:
    """A copy of this process, which has imported torch already; as subprocess.Popen to the outside."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._code: int | None = None

    def poll(self) -> int | None:
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code


def warm_up() -> None:
    """Half of a start goes into finding the texts of --help in the sources: forked processes inherit what is read."""
    inspect.getsource = functools.cache(inspect.getsource)  # type: ignore[assignment]
    with suppress(SystemExit), redirect_stdout(io.StringIO()):
        quiet_lightning()
        NanoGPTCLI(args=["fit", "--print_config"])


def start(piece: Piece, fresh: bool = False) -> "Forked | subprocess.Popen[bytes]":
    """fresh: with an interpreter of its own, as a user starts it. A fork saves the ten seconds of the imports.

    The copy ends by SystemExit through its callers' frames: so it closes as any interpreter does, hanging threads and
    all. No caller may hold a context that clears up.
    """
    if fresh or not hasattr(os, "fork"):
        text = json.dumps(asdict(piece))
        return subprocess.Popen([sys.executable, __file__, text], start_new_session=True)
    pid = os.fork()
    if pid == 0:
        os.setsid()
        try:
            code = run(piece)
        except Exception:
            traceback.print_exc()  # here, or a caller of the copy might take it for its own
            code = 1
        sys.exit(code)
    return Forked(pid)


def run(piece: Piece) -> int:
    file = os.open(piece.output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    # What runs in the background of a script ignores them.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_DFL)
    os.environ["TMPDIR"] = piece.temporary
    tempfile.tempdir = None
    torch.set_num_threads(1)
    if piece.processes > 1:
        os.environ |= of_torchrun(piece)
    if piece.nan_every:
        LitNanoGPT.forward = with_nan(LitNanoGPT.forward, piece.nan_every)  # type: ignore[method-assign]
    if piece.within is not None:
        arrange(piece.within, piece.rank)
    return main(["fit" if piece.loop == "fit" else "fit-accelerate", *piece.options])


def of_torchrun(piece: Piece) -> dict[str, str]:
    """What torchrun tells the processes that it starts."""
    count, rank = str(piece.processes), str(piece.rank)
    return {
        "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(piece.port), "TORCHELASTIC_RUN_ID": "torture",
    }  # fmt: skip


def with_nan(forward: Callable[..., Tensor], every: int) -> Callable[..., Tensor]:
    """A forward whose gradients are NaN for micro-batches that their tokens choose: the same ones after a resume."""

    def poisoned(self: LitNanoGPT, tokens: Tensor, targets: Tensor) -> Tensor:
        loss = forward(self, tokens, targets)
        if loss.requires_grad and int(tokens.sum()) % every == 0:
            loss.register_hook(lambda gradient: gradient * float("nan"))
        return loss

    return poisoned


def arrange(within: Within, rank: int) -> None:
    if within.kind == "full to the end":  # of all: the first process may be waiting for another's disk
        disk.END_S, disk.PAUSE_S = 1.0, 0.2
    if within.rank != rank:
        return
    if within.kind == "kill at call":
        kill_at_call(within.number, within.after)
    else:
        limit_nth_file(within)


def kill_at_call(number: int, after: bool) -> None:
    calls = 0

    def reached() -> bool:
        nonlocal calls
        calls += 1
        return calls == number

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*arguments: Any, **options: Any) -> Any:
            if not reached():
                return call(*arguments, **options)
            if after:
                call(*arguments, **options)
            return kill()

        return counting

    def on_event(event: str, arguments: tuple[Any, ...]) -> None:
        if opens_partial(event, arguments) and reached():
            kill()

    os.fsync, os.replace = counted(os.fsync), counted(os.replace)
    sys.addaudithook(on_event)


def limit_nth_file(within: Within) -> None:
    import resource  # there is none on Windows

    files, hard = 0, resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if within.kind == "kill at byte":
        # Python ignores SIGXFSZ, and a write then fails; by default the signal ends the process at that byte.
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)

    def on_event(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal files
        if not opens_partial(event, arguments):
            return
        files += 1
        if files == within.number:
            resource.setrlimit(resource.RLIMIT_FSIZE, (within.size, hard))
        elif files == within.number + 1 and within.kind != "full to the end":
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))

    sys.addaudithook(on_event)


def opens_partial(event: str, arguments: tuple[Any, ...]) -> bool:
    """Whether an event of Python's auditing opens a checkpoint to write it."""
    return event == "open" and str(arguments[0]).endswith(f".safetensors{PARTIAL}") and "w" in str(arguments[1])


def kill() -> None:
    # Windows has no SIGKILL; os.kill with another number ends the process there just as suddenly.
    os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))


if __name__ == "__main__":
    fields = json.loads(sys.argv[1])
    fields["within"] = fields["within"] and Within(**fields["within"])
    sys.exit(run(Piece(**fields)))
