"""Whether there is a card, a driver that answers, and a torch that can use both."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from nanogpt_lit.doctor.finding import Finding

NVIDIA = "0x10de"
DISPLAY_CLASS = "0x03"
CROWDED = 0.25
"""The part of a card's memory that others may hold before it is worth a word."""


def check_card(root: Path = Path("/"), platform: str = sys.platform) -> Iterator[Finding]:
    """root: where /sys is"""
    if shutil.which("nvidia-smi") is None:
        if card_without_driver(root):
            yield Finding(
                "wrong",
                "card",
                "an NVIDIA card is here and its driver is not: install the driver of your system, reboot",
            )
        else:
            yield Finding("ok", "card", "no NVIDIA card is here; training runs on what torch finds")
        return
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,memory.used", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, errors="replace", timeout=10)
    except (OSError, subprocess.SubprocessError) as error:
        yield Finding("wrong", "card", f"nvidia-smi does not answer ({type(error).__name__}): reboot")
        return
    if answer.returncode != 0 or not answer.stdout.strip():
        said = " ".join((answer.stdout + answer.stderr).split())[:150] or "nothing"
        yield Finding("wrong", "card", f"nvidia-smi says: {said}; after an update of the driver a reboot mends it")
        return
    for line in answer.stdout.strip().splitlines():
        yield from card(line)
    yield torch_on_card()
    if platform == "win32":
        yield Finding(
            "look",
            "spill",
            "Windows lets a full card spill into the computer's memory, and training then crawls instead of saying so: "
            "NVIDIA Control Panel, Manage 3D settings, CUDA - Sysmem Fallback Policy, Prefer No Sysmem Fallback",
        )


def card(line: str) -> Iterator[Finding]:
    """Of one card, as nvidia-smi lists it."""
    name, driver, *memory = (part.strip() for part in line.split(","))
    if len(memory) != 2 or not all(mib.isdigit() for mib in memory):
        yield Finding("ok", "card", f"{name}, driver {driver}")
        return
    total, used = map(int, memory)
    told = f"{name}, driver {driver}, {total - used:,} of {total:,} MiB free"
    if used > CROWDED * total:
        yield Finding("look", "card", f"{told}: close what else computes or draws on it (nvidia-smi lists it)")
    else:
        yield Finding("ok", "card", told)


def torch_on_card() -> Finding:
    """Lets torch compute on the card. Only now is it imported."""
    try:
        import torch
    except ImportError as error:
        return Finding("wrong", "cuda", f"torch cannot be imported ({error}): pip install --force-reinstall torch")

    from nanogpt_lit.runtime.machine import unused_card

    if sentence := unused_card():
        return Finding("wrong", "cuda", sentence.rstrip("."))
    build = f"torch {torch.__version__}"
    try:
        torch.ones(1, device="cuda").add_(1).item()
    except Exception as error:  # whatever CUDA answers with
        return Finding("wrong", "cuda", f"{build} cannot compute on the card: {advice(str(error))}")
    return Finding("ok", "cuda", f"{build} computes on it")


def advice(error: str) -> str:
    said = error.partition("\n")[0].rstrip(".")
    if "no kernel image" in error:
        return f"{said}; the build is too new or too old for the card: pytorch.org/get-started/locally names others"
    if "unknown error" in error:
        return f"{said}; after sleep, `sudo rmmod nvidia_uvm && sudo modprobe nvidia_uvm` or a reboot mends it"
    if "driver" in error:
        return f"{said}; update the driver, or take a build for an older CUDA from pytorch.org/get-started/locally"
    return f"{said}; a reboot may mend it"


def card_without_driver(root: Path) -> bool:
    """Whether the bus has a graphics card of NVIDIA; only Linux tells."""

    def first(path: Path) -> str:
        return path.read_text(encoding="utf-8").strip() if path.is_file() else ""

    devices = (root / "sys/bus/pci/devices").glob("*")
    return any(
        first(device / "vendor") == NVIDIA and first(device / "class").startswith(DISPLAY_CLASS) for device in devices
    )
