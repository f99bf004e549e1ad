"""What starts `fit --keep-alive` again after a reboot: a unit for systemd, a task for the Windows Task Scheduler."""

import getpass
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from nanogpt_lit.errors import UserError

TASK_NAMESPACE = "http://schemas.microsoft.com/windows/2004/02/mit/task"

SYSTEMD = """\
# To start it now and whenever this machine starts:
#   save this as ~/.config/systemd/user/nanogpt_lit.service
#   systemctl --user daemon-reload && systemctl --user enable --now nanogpt_lit
#   loginctl enable-linger                     (without it: whenever you log in)
# To watch it: journalctl --user -fu nanogpt_lit. To stop it, saved: systemctl --user stop nanogpt_lit.
# Once the run has ended: systemctl --user disable nanogpt_lit.

[Unit]
Description=nanogpt_lit in {description}

[Service]
WorkingDirectory={folder}
ExecStart={command}
# The supervisor hands a stop on to the fit, which saves; of two it would hear the second as "at once".
KillMode=mixed
TimeoutStopSec=120
# The fit may be what the system kills for memory; the supervisor then starts it again.
OOMPolicy=continue
# Of the supervisor itself. When it ends with a code, there is no sense in starting it again.
Restart=on-abnormal
RestartSec=10
SuccessExitStatus=129 130 143

[Install]
WantedBy=default.target
"""


def systemd_unit(command: Sequence[str], folder: Path) -> str:
    """The text of a unit of the user's systemd which runs `command` in `folder`."""
    return SYSTEMD.format(
        description=one_line(folder), folder=one_line(folder), command=" ".join(systemd_word(word) for word in command)
    )


def systemd_word(word: str) -> str:
    """As ExecStart= reads it, after systemd.service(5): in quotes, with its own signs doubled."""
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped.replace("%", "%%").replace("$", "$$")}"'


def one_line(folder: Path) -> str:
    """As settings without quotes read it. Raises UserError for a folder that they cannot name."""
    if "\n" in str(folder) or str(folder) != str(folder).strip():
        raise UserError(f"{str(folder)!r} is a folder that systemd cannot name; one without line breaks works.")
    return str(folder).replace("%", "%%")


def scheduled_task(command: Sequence[str], folder: Path) -> str:
    """The text of a task which runs `command` in `folder` when its user logs on, in plain ASCII.

    Without an encoding in its first line: the shell that saves it decides on one, and the reader sees which.
    """
    user = "\\".join(filter(None, [os.environ.get("USERDOMAIN"), getpass.getuser()]))
    task = ElementTree.Element("Task", version="1.2", xmlns=TASK_NAMESPACE)
    task.append(
        ElementTree.Comment(
            " Save this as nanogpt_lit.xml, then: schtasks /Create /TN nanogpt_lit /XML nanogpt_lit.xml\n"
            "     To start it now: schtasks /Run /TN nanogpt_lit. To stop it, saved: Ctrl-C in its window.\n"
            "     Once the run has ended: schtasks /Delete /TN nanogpt_lit "
        )
    )
    # With the user's name: a task for whoever logs on is the administrator's to make.
    add(task, "Triggers", "LogonTrigger", UserId=user)
    add(task, "Principals", "Principal", UserId=user, LogonType="InteractiveToken")
    add(
        task,
        "Settings",
        MultipleInstancesPolicy="IgnoreNew",
        DisallowStartIfOnBatteries="false",
        StopIfGoingOnBatteries="false",
        ExecutionTimeLimit="PT0S",  # for ever; otherwise a task is ended after three days
        Priority="5",  # normal; otherwise below, for the disk too
    )
    add(
        task,
        "Actions",
        "Exec",
        Command=command[0],
        Arguments=subprocess.list2cmdline(command[1:]),
        WorkingDirectory=str(folder),
    )
    ElementTree.indent(task)
    return ElementTree.tostring(task, encoding="us-ascii", xml_declaration=False).decode() + "\n"


def add(element: ElementTree.Element, *path: str, **values: str) -> None:
    """Elements within each other, the innermost with elements for values."""
    for name in path:
        element = ElementTree.SubElement(element, name)
    for name, value in values.items():
        ElementTree.SubElement(element, name).text = value
