"""Packages, CPU, GPU and sleep of this machine. torch is imported only where there is a GPU for it to compute on."""

import math
import os
import platform as python_platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from typing import TYPE_CHECKING

from nanogpt_lit.doctor.finding import Finding, unless_it_fails
from nanogpt_lit.errors import UserError

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
CROWDED = 0.25
"""Share of a GPU's memory in other hands that is worth a word."""
AWAKE = {
    "win32": "powercfg /change standby-timeout-ac 0 keeps Windows awake while plugged in, its lid open",
    "darwin": "a Mac sleeps with its lid closed: start the run with caffeinate -i before it",
}
AWAKE_LINUX = (
    "a closed lid or an idle desktop puts a laptop to sleep, and the run with it: start it as "
    "systemd-inhibit --what=sleep:idle:handle-lid-switch python -m nanogpt_lit fit --keep-alive ..."
)
"""Commands that keep a laptop awake, by its system."""


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


def check_sleep(platform: str = sys.platform) -> Iterator[Finding]:
    """Say how a laptop is kept awake through a run, and whether it runs on its battery."""
    import psutil

    if (battery := psutil.sensors_battery()) is None:
        yield Finding("ok", "sleep", "no battery is here, so no laptop that sleeps with its lid closed")
        return
    if battery.power_plugged is False:
        text = "on battery: the GPU is slowed down, and the run ends when it is empty; plug it in"
        yield Finding("look", "power", text)
    yield Finding("look", "sleep", AWAKE.get(platform, AWAKE_LINUX))


def content(path: Path) -> str:
    """The text of a file of the system's; empty where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
