"""`fit --keep-alive`: starts a run again, from its newest checkpoint, whenever it dies of something that may pass; and
after a reboot, by the two template files beside this one.
"""

import getpass
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any
from xml.sax.saxutils import escape

from nanogpt_lit.cli.options import parser_of
from nanogpt_lit.errors import UserError
from nanogpt_lit.runtime.launch import COMMAND, ERROR, FOLDER, KEEP_ALIVE, TOKENS

MISTAKE = 2
"""The exit code of what only the user can mend."""
STOPPED = (130, 143, 129, 0xC000013A)
"""The exit codes of a stop that was asked for, by Ctrl-C, SIGTERM or SIGHUP; the last is Windows' own for Ctrl-C."""
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name)]
CUDA_AFTER_SLEEP = (
    "the driver has not come back from sleep; `sudo rmmod nvidia_uvm && sudo modprobe nvidia_uvm` or a reboot brings "
    "it back, and `python -m nanogpt_lit doctor` says how to keep it"
)


def keep_alive(arguments: Sequence[str]) -> int:
    """Run `fit` or `fit-accelerate` with its options until it ends by itself, by the user, or twice at the same place.

    arguments: of this process, --keep-alive among them

    Returns the exit code of the last run, as a shell counts it. Raises UserError for arguments that name a checkpoint.
    """
    check_no_checkpoint(arguments)
    command = python_command(word for word in arguments if word != KEEP_ALIVE)
    if not any(word.partition("=")[0] == "--resume" for word in command):
        command += ["--resume", "auto"]
    return Supervisor(command, on_gpu=["--trainer.accelerator=gpu"]).run()


def supervised_fit(options: Sequence[str]) -> list[str]:
    """The command of `fit --keep-alive` with these options. Raises UserError as `keep_alive` does."""
    check_no_checkpoint(options)
    return python_command(["fit", KEEP_ALIVE, *options])


def python_command(arguments: Iterable[str]) -> list[str]:
    # -P keeps what is in the current folder from being imported: see SECURITY.md.
    return [sys.executable, *(["-P"] if sys.flags.safe_path else []), "-m", "nanogpt_lit", *arguments]


def check_no_checkpoint(words: Sequence[str]) -> None:
    for word, following in pairwise([*words, ""]):
        option, equals, value = word.partition("=")
        if option in ("--ckpt_path", "--resume") and (value if equals else following) != "auto":
            raise UserError(
                f"{option} names one checkpoint and {KEEP_ALIVE} goes on from the newest each time; leave {option} out."
            )


@dataclass(frozen=True)
class End:
    """The end of a child."""

    code: int
    """The exit code as a shell counts it: 128 and the signal for a killed child."""
    error: str
    tokens: int | None
    """Trained on so far by the whole run; None when it ended before its first step."""

    @property
    def kind(self) -> tuple[str, int | None]:
        """Key of the same error at the same step. Sizes and addresses in a message differ from time to time."""
        return re.sub(r"0x[0-9a-fA-F]+|\d[\d.,]*", "#", self.error), self.tokens

    def __str__(self) -> str:
        place = "before its first step" if self.tokens is None else f"after {self.tokens:,} tokens"
        return f"{self.error}, {place}"


class Supervisor:
    """Runs a command again and again until there is no sense in it.

    command: resumes by itself
    on_gpu: added to the command once it died of CUDA, so that a run which began on the GPU does not go on without
    pause_s: before the first start again; each further one without progress waits twice as long
    """

    def __init__(
        self,
        command: Sequence[str],
        on_gpu: Sequence[str] = (),
        pause_s: float = 5.0,
        longest_pause_s: float = 300.0,
    ) -> None:
        self._command = list(command)
        self._on_card = list(on_gpu)
        self._pause_s, self._longest_pause_s = pause_s, longest_pause_s
        self._child: subprocess.Popen[bytes] | None = None
        self._asked_to_stop: signal.Signals | None = None

    def run(self) -> int:
        """Returns the exit code of the last child, or of the signal that came while none was running."""
        # One that is ignored stays so, in the child too: nohup means it.
        heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, self._forward) for number in heard}
        try:
            with tempfile.TemporaryDirectory(prefix="nanogpt_lit_") as folder:
                return self._run(Path(folder))
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _run(self, folder: Path) -> int:
        furthest, seen = -1, set[tuple[str, int | None]]()
        while True:
            end = self._one(folder)
            if end.code == 0 or self._asked_to_stop is not None or end.code in STOPPED:
                return end.code
            # Once it has trained, 2 is a disk or a file that failed, and may pass.
            if end.code == MISTAKE and end.tokens is None:
                say(f"stopped: {end.error}, which starting again does not mend")
                return end.code
            if end.kind in seen:
                advice = f"; {CUDA_AFTER_SLEEP}" if "CUDA" in end.error and "unknown error" in end.error else ""
                say(f"stopped: the same again, {end}{advice}")
                return end.code
            if end.tokens is not None and end.tokens > furthest:
                furthest, seen = end.tokens, set()
            seen.add(end.kind)
            if "CUDA" in end.error:
                self._command += [option for option in self._on_card if option not in self._command]
            pause_s = min(self._longest_pause_s, self._pause_s * 2.0 ** min(len(seen) - 1, 30))
            say(f"{end}; starting again in {pause_s:g} s")
            self._sleep(pause_s)
            if self._asked_to_stop is not None:
                return 128 + self._asked_to_stop

    def _one(self, folder: Path) -> End:
        """Starts the command and waits for its end."""
        for name in (TOKENS, ERROR):
            (folder / name).unlink(missing_ok=True)
        # A group of its own: a terminal sends Ctrl-C to a whole group, and with ours it would get each signal twice,
        # the second of which aborts. Its standard input ends when we do (runtime/launch.py).
        apart: dict[str, Any] = {"process_group": 0}
        if sys.platform == "win32":
            apart = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
        environment = {**os.environ, FOLDER: str(folder), COMMAND: json.dumps(sys.orig_argv)}
        with subprocess.Popen(self._command, stdin=subprocess.PIPE, env=environment, **apart) as child:
            self._child = child
            if self._asked_to_stop is not None:  # it came while the child was being started
                self._send(self._asked_to_stop)
            wait_s = None if os.name == "posix" else 0.5  # Windows runs no handler of ours while it waits
            while child.returncode is None:
                with suppress(subprocess.TimeoutExpired):
                    child.wait(wait_s)
            self._child = None
        return ending(child.returncode, folder)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        self._asked_to_stop = signal.Signals(number)
        self._send(self._asked_to_stop)

    def _send(self, number: signal.Signals) -> None:
        if self._child is None:
            return
        if sys.platform == "win32":
            number = signal.CTRL_BREAK_EVENT  # the only one that reaches another group
        with suppress(OSError):  # it ended just now
            self._child.send_signal(number)

    def _sleep(self, pause_s: float) -> None:
        until_s = time.monotonic() + pause_s
        while self._asked_to_stop is None and (left_s := until_s - time.monotonic()) > 0:
            time.sleep(min(left_s, 0.5))  # a handler does not cut a sleep short


def ending(returncode: int, folder: Path) -> End:
    """Read the reports that a child has left in the folder."""
    reports = {name: (folder / name).read_text("utf-8") if (folder / name).exists() else "" for name in (TOKENS, ERROR)}
    error = reports[ERROR]
    if returncode < 0:
        error = f"killed by {name_of(-returncode)}"
    return End(
        code=returncode if returncode >= 0 else 128 - returncode,
        error=error or f"exit code {returncode}",
        tokens=int(reports[TOKENS]) if reports[TOKENS].strip() else None,
    )


def name_of(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # of a real-time signal, which has none
        return f"signal {number}"


def say(line: str) -> None:
    # After a progress line, which the child has left unfinished.
    start = "\n" if sys.stderr.isatty() else ""
    print(f"{start}{time.strftime('%Y-%m-%d %H:%M:%S')} keep-alive: {line}", file=sys.stderr, flush=True)


# After a reboot.


def keep_alive_unit(arguments: list[str]) -> int:
    """`keep-alive-unit --config FILE`: prints what starts `fit --keep-alive` again after a reboot."""
    parser = parser_of(
        "keep-alive-unit",
        "Print a unit for systemd, or a task for the Windows Task Scheduler, which starts "
        "`fit --keep-alive` with these options in this folder after a reboot. Its beginning says how to install it.",
        usage="[--systemd | --task-scheduler] [--option.of.fit VALUE ...]",
    )
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--systemd", action="store_true", help="the default everywhere but on Windows")
    kind.add_argument("--task-scheduler", action="store_true", help="the default on Windows")
    options, settings_of_fit = parser.parse_known_args(arguments[1:])

    command = supervised_fit(settings_of_fit)
    as_task = options.task_scheduler or (os.name == "nt" and not options.systemd)
    print((scheduled_task if as_task else systemd_unit)(command, Path.cwd()), end="")
    return 0


def systemd_unit(command: Sequence[str], folder: Path) -> str:
    """A unit of the user's systemd which runs `command` in `folder`. Raises UserError for a folder it cannot name."""
    if "\n" in str(folder) or str(folder) != str(folder).strip():
        raise UserError(f"{str(folder)!r} is a folder that systemd cannot name; one without line breaks works.")
    words = " ".join(map(systemd_word, command))
    return template("systemd.service").format(folder=str(folder).replace("%", "%%"), command=words)


def systemd_word(word: str) -> str:
    """A word as ExecStart= reads it, after systemd.service(5): in quotes, with its own signs doubled."""
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped.replace("%", "%%").replace("$", "$$")}"'


def scheduled_task(command: Sequence[str], folder: Path) -> str:
    """A task of Windows which runs `command` in `folder` when its user logs on, in plain ASCII.

    Without an encoding in its first line: the shell that saves it decides on one, and the reader sees which.
    """
    values = {
        "user": "\\".join(filter(None, [os.environ.get("USERDOMAIN"), getpass.getuser()])),
        "program": command[0],
        "arguments": subprocess.list2cmdline(command[1:]),
        "folder": str(folder),
    }
    filled = template("task.xml").format(**{name: escape(value) for name, value in values.items()})
    return filled.encode("ascii", "xmlcharrefreplace").decode()


def template(name: str) -> str:
    return files("nanogpt_lit.supervise").joinpath(name).read_text(encoding="utf-8")
