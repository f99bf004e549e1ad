"""`fit --keep-alive` after a reboot: the two template files beside this one, filled in for a command and a folder."""

import getpass
import os
import subprocess
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from xml.sax.saxutils import escape

from nanogpt_lit.cli.options import parser_of
from nanogpt_lit.errors import UserError
from nanogpt_lit.supervise.supervisor import supervised_fit


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
