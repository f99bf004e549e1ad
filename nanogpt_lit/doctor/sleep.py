"""Whether the machine will fall asleep in the middle of a run, and whether the card survives it."""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from nanogpt_lit.doctor.finding import Finding

WINDOWS_QUESTIONS = {
    ("SUB_SLEEP", "STANDBYIDLE"): (
        "sleeps when nobody types, even plugged in, and the run with it: powercfg /change standby-timeout-ac 0"
    ),
    ("SUB_BUTTONS", "LIDACTION"): (
        "does something when its lid is closed, most likely sleep: powercfg /setacvalueindex SCHEME_CURRENT "
        "SUB_BUTTONS LIDACTION 0, then powercfg /setactive SCHEME_CURRENT"
    ),
}


def check_sleep(root: Path = Path("/"), platform: str = sys.platform) -> Iterator[Finding]:
    """root: where /proc and /sys are"""
    if platform == "win32":
        yield from windows()
    elif platform == "darwin":
        yield Finding("look", "sleep", "a Mac sleeps with its lid closed: start the run with caffeinate -i before it")
    else:
        yield from linux(root)


def windows() -> Iterator[Finding]:
    found = False
    for (group, setting), sentence in WINDOWS_QUESTIONS.items():
        # The words of the answer are in the user's language. Its last two numbers are: plugged in, on battery.
        numbers = re.findall(r"0x[0-9a-fA-F]{8}", powercfg("/query", "SCHEME_CURRENT", group, setting))
        if len(numbers) >= 2 and int(numbers[-2], 16) != 0:
            found = True
            yield Finding("look", "sleep", f"this machine {sentence}")
    if not found:
        yield Finding("ok", "sleep", "nothing that powercfg shows puts this machine to sleep while it is plugged in")


def powercfg(*arguments: str) -> str:
    """What it prints; nothing where it is not there or does not answer."""
    program = shutil.which("powercfg")
    if program is None:
        return ""
    try:
        return subprocess.run([program, *arguments], capture_output=True, text=True, errors="replace", timeout=5).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def linux(root: Path) -> Iterator[Finding]:
    supplies = {path.parent: text(path) for path in (root / "sys/class/power_supply").glob("*/type")}
    batteries = [
        folder for folder, kind in supplies.items() if kind == "Battery" and text(folder / "scope") != "Device"
    ]
    mains = [text(folder / "online") for folder, kind in supplies.items() if kind in ("Mains", "USB")]
    if batteries and mains and "1" not in mains:
        yield Finding(
            "look", "power", "on battery: the card is slowed down, and the run ends when it is empty; plug it in"
        )
    target = root / "etc/systemd/system/suspend.target"
    if target.is_symlink() and str(target.readlink()) == "/dev/null":
        yield Finding("ok", "sleep", "suspend.target is masked: this machine does not sleep")
    elif batteries:
        yield Finding(
            "look",
            "sleep",
            "a closed lid or an idle desktop puts a laptop to sleep, and the run with it; start it as "
            "systemd-inhibit --what=sleep:idle:handle-lid-switch python -m nanogpt_lit fit --keep-alive ...",
        )
    else:
        yield Finding("ok", "sleep", "no battery is here, so no laptop that sleeps with its lid closed")
    parameters = text(root / "proc/driver/nvidia/params")
    kept = re.search(r"^(PreserveVideoMemoryAllocations|UseKernelSuspendNotifiers): 1", parameters, re.MULTILINE)
    if batteries and parameters and not kept:
        yield Finding(
            "look",
            "sleep",
            "the driver drops the card's memory in sleep, which ends a run; to keep it, write "
            "options nvidia NVreg_PreserveVideoMemoryAllocations=1 NVreg_TemporaryFilePath=/var/tmp into "
            "/etc/modprobe.d/nvidia-sleep.conf, sudo systemctl enable nvidia-suspend nvidia-resume, reboot",
        )


def text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
