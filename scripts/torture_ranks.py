"""The processes of one piece of a run: one, or several that train together."""

import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
from torture_process import Forked, Piece, start

PATIENCE_S = 240
"""For a process that should have ended long before."""
AFTER_ANOTHER_S = 30
"""For a process whose companion has failed."""


class Failed(Exception):  # noqa: N818 - of a trial, not of this program
    pass


def start_all(piece: Piece, processes: int, fresh: bool = False) -> "list[Forked | subprocess.Popen[bytes]]":
    if processes == 1:
        return [start(piece, fresh)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [replace(piece, rank=rank, processes=processes, port=port) for rank in range(processes)]
    others = [replace(piece, output=f"{piece.output}_rank{piece.rank}") for piece in ranks[1:]]
    return [start(piece, fresh) for piece in (ranks[0], *others)]


def wait_for_training(running: "list[Forked | subprocess.Popen[bytes]]", output: Path) -> None:
    """Until the first process says where its run is, or one has ended."""
    while all(process.poll() is None for process in running):
        if output.exists() and "\nrun: " in output.read_text(encoding="utf-8", errors="replace"):
            return
        time.sleep(0.01)


def wait(running: "list[Forked | subprocess.Popen[bytes]]") -> list[int]:
    """The exit codes. Of several processes, those that wait for one that has failed are ended, as torchrun does it."""
    deadline_s = time.monotonic() + PATIENCE_S
    one_failed = False
    while any(process.poll() is None for process in running):
        if not one_failed and any(process.poll() for process in running):
            one_failed, deadline_s = True, time.monotonic() + AFTER_ANOTHER_S
        if time.monotonic() > deadline_s:
            for process in running:
                if process.poll() is None:
                    psutil.Process(process.pid).kill()
            if not one_failed:
                raise Failed(f"a process did not end within {PATIENCE_S} s")
        time.sleep(0.02)
    return [process.poll() or 0 for process in running]


def alive(group: int) -> bool:
    if sys.platform == "win32":
        return False
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
