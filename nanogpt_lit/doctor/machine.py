"""Packages, CPU, GPU and sleep of this machine. torch is imported only where there is a GPU for it to compute on."""

import math
import os
import platform as python_platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from typing import TYPE_CHECKING

from nanogpt_lit.doctor.examination import Finding, unless_it_fails
from nanogpt_lit.errors import UserError
from nanogpt_lit.runtime.launch import RANKS, SIZES, whole_number

if TYPE_CHECKING:
    from packaging.requirements import Requirement

SHOWN = ("torch", "lightning", "accelerate")
"""Packages that get a line also when nothing is wrong with them."""
REASONS = {
    "lightning": " (before 2.6.6 a checkpoint could run code: CVE-2026-58659)",
    "torch": " (before 2.10 a checkpoint could corrupt its reader's memory: CVE-2026-24747)",
}
MALWARE = {"lightning": ("2.6.2", "2.6.3")}
NVIDIA, DISPLAY_CLASS = "0x10de", "0x03"
WINDOWS_LOCKS = 0.5
"""Share of the memory that Windows and WSL2 let be page-locked, about."""
DAY_S = 86_400
CROWDED = 0.25
"""Share of a GPU's memory in other hands that is worth a word."""
WINDOWS_QUESTIONS = {
    ("SUB_SLEEP", "STANDBYIDLE"): (
        "sleeps when nobody types, even plugged in, and the run with it: powercfg /change standby-timeout-ac 0"
    ),
    ("SUB_BUTTONS", "LIDACTION"): (
        "does something when its lid is closed, most likely sleep: powercfg /setacvalueindex SCHEME_CURRENT "
        "SUB_BUTTONS LIDACTION 0, then powercfg /setactive SCHEME_CURRENT"
    ),
}


def check_packages() -> Iterator[Finding]:
    """Compare Python and the packages with this project's own metadata."""
    from packaging.requirements import Requirement  # which may be what is missing
    from packaging.specifiers import SpecifierSet

    found, asked = python_platform.python_version(), SpecifierSet(metadata("nanogpt_lit")["Requires-Python"] or "")
    if asked.contains(found, prereleases=True):
        yield Finding("ok", "python", f"{found}, {python_platform.system()} {python_platform.machine()}")
    else:
        yield Finding("wrong", "python", f"{found} is not {asked}: make the virtual environment with another Python")
    for requirement in map(Requirement, requires("nanogpt_lit") or []):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield from unless_it_fails(requirement.name, lambda asked=requirement: check_package(asked))  # type: ignore[misc]


def check_package(requirement: "Requirement") -> Iterator[Finding]:
    name, asked = requirement.name, requirement.specifier
    try:
        found = version(name)
    except PackageNotFoundError:
        yield Finding("wrong", name, f'is not installed: pip install "{name}{asked}"')
        return
    if found in MALWARE.get(name, ()):
        yield Finding(
            "wrong",
            name,
            f"{found} is malware that steals credentials when it is imported (GHSA-w37p-236h-pfx3): "
            f"pip uninstall {name}, then change every password, token and key that this machine could read",
        )
    elif not asked.contains(found, prereleases=True):
        yield Finding("wrong", name, f'{found} is not {asked}{REASONS.get(name, "")}: pip install "{name}{asked}"')
    elif name in SHOWN:
        yield Finding("ok", name, found)


def check_environment(environ: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Look for variables that are no numbers where a launcher or a scheduler writes some, and folders that are gone."""
    for name in (*SIZES, *RANKS, "SLURM_RESTART_COUNT"):
        try:
            whole_number(name, environ)
        except UserError as error:
            yield Finding("wrong", "environment", str(error).rstrip("."))
    for name, use in (("HOME", "what is downloaded is not kept"), ("TMPDIR", "temporary files go elsewhere")):
        if (folder := environ.get(name)) and not (Path(folder).is_dir() and os.access(folder, os.W_OK | os.X_OK)):
            yield Finding("look", "environment", f"{name}={folder} is not a folder that can be written: {use}")
    if (encoding := sys.getfilesystemencoding()) != "utf-8":
        text = f"this system writes names of files in {encoding}, which lacks most characters: set PYTHONUTF8=1"
        yield Finding("look", "environment", text)


def check_clock() -> Iterator[Finding]:
    """Compare this machine's clock with the date of this program, which was written before it runs."""
    written_s = Path(__file__).stat().st_mtime
    if time.time() < written_s - DAY_S:
        now, written = (time.strftime("%Y-%m-%d", time.localtime(seconds)) for seconds in (time.time(), written_s))
        text = f"it is {now} by this machine, and this program was written on {written}: set the date"
        yield Finding("look", "clock", f"{text}; runs are told apart by the times of their checkpoints")


def check_cpu(root: Path = Path("/")) -> Iterator[Finding]:
    """Compare the CPUs that torch counts with those that the container may use. root: where /proc and /sys are"""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = limit_of(root, "cpu.max", lambda text: int(text.split()[0]) / int(text.split()[1]))
    memory = limit_of(root, "memory.max", int)
    asked = os.environ.get("OMP_NUM_THREADS", "")
    is_number = re.fullmatch("[0-9]{1,6}", asked) is not None
    if asked and not is_number:
        yield Finding("look", "cpu", f"OMP_NUM_THREADS={asked} is not a number of threads: set it to {cpus}")
    threads = int(asked) if is_number else cpus
    text = f"{cpus} core{'s' if cpus > 1 else ''}"
    if memory is not None:
        text += f", at most {memory / 2**30:.1f} GiB of memory"
    if quota is not None and threads > math.ceil(quota):
        text += (
            f", of which this container may use {quota:g}: torch would start {threads} threads that wait for each "
            f"other; set OMP_NUM_THREADS={math.ceil(quota)}"
        )
        yield Finding("look", "cpu", text)
    else:
        yield Finding("ok", "cpu", text)


def limit_of(root: Path, name: str, parse: Callable[[str], float]) -> float | None:
    """The least that the control group of this process and those around it allow (version 2); None without a limit."""
    line = content(root / "proc/self/cgroup").partition("\n")[0]
    if not line.startswith("0::"):
        return None
    mounted = root / "sys/fs/cgroup"
    group = mounted / line.removeprefix("0::").strip("/")
    around = [mounted, *(folder for folder in (group, *group.parents) if mounted in folder.parents)]
    limits = []
    for text in (content(folder / name) for folder in around):
        with suppress(ValueError, IndexError, ZeroDivisionError):  # "max", or nothing that a limit is written as
            limits.append(parse(text))
    return min(limits, default=None)


def check_gpu(root: Path = Path("/"), platform: str = sys.platform) -> Iterator[Finding]:
    """Look for a GPU, a driver that answers, and a torch that computes on it. root: where /sys is"""
    if shutil.which("nvidia-smi") is None:
        devices = (root / "sys/bus/pci/devices").glob("*")
        if any(content(d / "vendor") == NVIDIA and content(d / "class").startswith(DISPLAY_CLASS) for d in devices):
            text = "an NVIDIA GPU is here and its driver is not: install the driver of your system, reboot"
            yield Finding("wrong", "gpu", text)
        else:
            yield Finding("ok", "gpu", "no NVIDIA GPU is here; training runs on what torch finds")
        return
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,memory.used", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, errors="replace", timeout=10)
    except (OSError, subprocess.SubprocessError) as error:
        yield Finding("wrong", "gpu", f"nvidia-smi does not answer ({type(error).__name__}): reboot")
        return
    if answer.returncode != 0 or not answer.stdout.strip():
        said = " ".join((answer.stdout + answer.stderr).split())[:150] or "nothing"
        yield Finding("wrong", "gpu", f"nvidia-smi says: {said}; after an update of the driver a reboot mends it")
        return
    for line in answer.stdout.strip().splitlines():
        name, driver, *memory = (part.strip() for part in line.split(",")) if "," in line else (line, "unknown")
        text = f"{name}, driver {driver}"
        if len(memory) == 2 and all(mib.isdigit() for mib in memory):
            total, used = map(int, memory)
            text += f", {total - used:,} of {total:,} MiB free"
            if used > CROWDED * total:
                text += ": close what else computes or draws on it (nvidia-smi lists it)"
                yield Finding("look", "gpu", text)
                continue
        yield Finding("ok", "gpu", text)
    yield check_torch()
    if platform == "win32":
        yield Finding(
            "look",
            "spill",
            "Windows lets a full GPU spill into the computer's memory, and training then crawls instead of saying so: "
            "NVIDIA Control Panel, Manage 3D settings, CUDA - Sysmem Fallback Policy, Prefer No Sysmem Fallback",
        )


def check_page_locks(
    needed_mib: Callable[[], float], platform: str = sys.platform, release: str = python_platform.release()
) -> Iterator[Finding]:
    """Compare the host memory that a run page-locks with what Windows lets it lock; other systems lock all they have.

    needed_mib: plans the run   release: of the system; that of WSL2 has Microsoft's name in it
    """
    if platform != "win32" and "microsoft" not in release.lower():
        return
    import psutil

    try:
        memory_mib, mib = psutil.virtual_memory().total / 2**20, needed_mib()
    except UserError:  # which `plan` tells, and `fit`
        return
    text = f"the run page-locks {mib:,.0f} MiB of {memory_mib:,.0f}"
    if mib > memory_mib * WINDOWS_LOCKS:
        system = "Windows" if platform == "win32" else "WSL2"
        text += f", of which {system} allows about half: the rest is copied more slowly; a smaller model.gpt needs less"
        yield Finding("look", "memory", text)
    else:
        yield Finding("ok", "memory", text)


def check_torch() -> Finding:
    """Let torch compute on the GPU."""
    try:
        import torch
    except ImportError as error:
        return Finding("wrong", "cuda", f"torch cannot be imported ({error}): pip install --force-reinstall torch")

    from nanogpt_lit.runtime.machine import unused_gpu

    if sentence := unused_gpu():
        return Finding("wrong", "cuda", sentence.rstrip("."))
    build = f"torch {torch.__version__}"
    try:
        torch.ones(1, device="cuda").add_(1).item()
    except Exception as error:  # whatever CUDA answers with
        return Finding("wrong", "cuda", f"{build} cannot compute on the GPU: {advice(str(error))}")
    return Finding("ok", "cuda", f"{build} computes on it")


def advice(error: str) -> str:
    """An error of CUDA's with what mends it."""
    said = error.partition("\n")[0].rstrip(".")
    if "no kernel image" in error:
        return f"{said}; the build is too new or too old for the GPU: pytorch.org/get-started/locally names others"
    if "unknown error" in error:
        return f"{said}; after sleep, `sudo rmmod nvidia_uvm && sudo modprobe nvidia_uvm` or a reboot mends it"
    if "No CUDA GPUs" in error and "CUDA_VISIBLE_DEVICES" in os.environ:
        return f"{said}: CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']} hides it; unset that"
    if "driver" in error:
        return f"{said}; update the driver, or take a build for an older CUDA from pytorch.org/get-started/locally"
    return f"{said}; a reboot may mend it"


def check_sleep(root: Path = Path("/"), platform: str = sys.platform) -> Iterator[Finding]:
    """Check whether the machine may fall asleep in the middle of a run, and whether the GPU survives it."""
    if platform == "win32":
        yield from windows_sleep()
    elif platform == "darwin":
        yield Finding("look", "sleep", "a Mac sleeps with its lid closed: start the run with caffeinate -i before it")
    else:
        yield from linux_sleep(root)


def windows_sleep() -> Iterator[Finding]:
    program, sleeps = shutil.which("powercfg"), False
    for (group, setting), sentence in WINDOWS_QUESTIONS.items() if program is not None else ():
        command = [str(program), "/query", "SCHEME_CURRENT", group, setting]
        try:
            answer = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=5).stdout
        except (OSError, subprocess.SubprocessError):
            continue
        # The words of the answer are in the user's language. Its last two numbers are: plugged in, on battery.
        numbers = re.findall(r"0x[0-9a-fA-F]{8}", answer)
        if len(numbers) >= 2 and int(numbers[-2], 16) != 0:
            sleeps = True
            yield Finding("look", "sleep", f"this machine {sentence}")
    if not sleeps:
        yield Finding("ok", "sleep", "nothing that powercfg shows puts this machine to sleep while it is plugged in")


def linux_sleep(root: Path) -> Iterator[Finding]:
    supplies = {path.parent: content(path) for path in (root / "sys/class/power_supply").glob("*/type")}
    # A mouse has a battery too.
    batteries = [path for path, kind in supplies.items() if kind == "Battery" and content(path / "scope") != "Device"]
    mains = [content(path / "online") for path, kind in supplies.items() if kind in ("Mains", "USB")]
    if batteries and mains and "1" not in mains:
        text = "on battery: the GPU is slowed down, and the run ends when it is empty; plug it in"
        yield Finding("look", "power", text)
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
    parameters = content(root / "proc/driver/nvidia/params")
    kept = re.search(r"^(PreserveVideoMemoryAllocations|UseKernelSuspendNotifiers): 1", parameters, re.MULTILINE)
    if batteries and parameters and not kept:
        yield Finding(
            "look",
            "sleep",
            "the driver drops the GPU's memory in sleep, which ends a run; to keep it, write "
            "options nvidia NVreg_PreserveVideoMemoryAllocations=1 NVreg_TemporaryFilePath=/var/tmp into "
            "/etc/modprobe.d/nvidia-sleep.conf, sudo systemctl enable nvidia-suspend nvidia-resume, reboot",
        )


def content(path: Path) -> str:
    """The text of a file of the system's; empty where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
