"""The share of a GPU's memory that a run can have."""

import re
from dataclasses import dataclass, replace
from typing import Literal

import torch

from nanogpt_lit.errors import UserError
from nanogpt_lit.runtime.gpus import GPUS, Gpu, listed_gpu

System = Literal["linux", "windows"]

# What others hold of a 4 GB laptop GPU, in MiB: driver, display, desktop, and a margin for what no plan can see (the
# libraries' own kernels and workspaces). From what users report of such GPUs: 3.68 of 4 GiB visible under Linux, 0.82
# GiB of it with the desktop where that is drawn by the GPU (Robbyant/lingbot-map #73, an RTX A500); all gone at 3.46
# GiB reserved under Windows (invoke-ai/InvokeAI #745), 0.79 and 0.82 GiB beyond what was reserved with a desktop
# (lllyasviel/Fooocus #1316, jhc13/taggui #188).
OTHERS: dict[System | None, int] = {"linux": 530, "windows": 630, None: 830}
"""MiB that other programs may hold, by system; None is any, unless Linux draws its desktop on the GPU."""
DESKTOP: dict[System | None, int] = {"linux": 800, "windows": 200, None: 500}


@dataclass(frozen=True)
class Budget:
    gpu: Gpu
    system: System | None = None
    desktop_on_gpu: bool = False
    measured_mib: int | None = None
    """Memory that the user found to be free, in place of all estimates."""

    @property
    def usable_mib(self) -> int:
        """Memory that PyTorch may reserve."""
        if self.measured_mib is not None:
            return self.measured_mib
        others = OTHERS[self.system] + (DESKTOP[self.system] if self.desktop_on_gpu else 0)
        return self.gpu.vram_mib - context_mib(self.gpu.multiprocessors) - others

    def __post_init__(self) -> None:
        if self.measured_mib is None and self.usable_mib < 256:
            raise UserError(
                f"--vram={self.gpu.vram_mib}MiB leaves {self.usable_mib} MiB after the driver and the CUDA context; "
                "a GPU of 2 GiB or more can train."
            )


def choose_budget(
    gpu: str | None = None,
    vram: str | None = None,
    usable: str | None = None,
    system: System | None = None,
    desktop_on_gpu: bool = False,
) -> Budget:
    """The budget for the options of `plan`; without a GPU among them that of this machine, or else an RTX 2050."""
    chosen = gpu_named(gpu) if gpu is not None else gpu_here() or GPUS[0]
    if vram is not None:
        # Its speed is not known: that of an RTX 2050 still says what a technique costs against another.
        chosen = replace(GPUS[0], name=f"a GPU of {vram}", vram_mib=parse_mib("--vram", vram))
    measured = None if usable is None else parse_mib("--usable", usable)
    return Budget(chosen, system, desktop_on_gpu, measured)


def gpu_here() -> Gpu | None:
    """The GPU that torch sees, with its own size; None without one."""
    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(0)
    listed = listed_gpu(found.name) or replace(GPUS[0], name=found.name)
    return replace(
        listed,
        vram_mib=found.total_memory // 2**20,
        multiprocessors=found.multi_processor_count,
        capability=(found.major, found.minor),
    )


def context_mib(multiprocessors: int) -> int:
    """The CUDA context and its loaded kernels, per process: it grows with the multiprocessors.

    A line through two measurements: 70 MiB on 16 (RTX A500, lingbot-map #73) and 426 MiB on 142 (RTX 6000 Ada, PyTorch
    2.10, unslothai/unsloth-zoo #1053).
    """
    return round(70 + (multiprocessors - 16) * (426 - 70) / (142 - 16))


def gpu_named(name: str) -> Gpu:
    """The GPU of `plan --gpu`, in any spelling: rtx2050, "RTX 2050". Raises UserError for one that is not listed."""
    plain = re.sub(r"[^a-z0-9]", "", name.lower().removeprefix("nvidia").replace("geforce", ""))
    for gpu in GPUS:
        if plain == gpu.name.replace("-", ""):
            return gpu
    raise UserError(
        f"--gpu={name} is not known; known are {', '.join(gpu.name for gpu in GPUS)}. "
        "For another, give its memory: --vram 4GiB."
    )


def parse_mib(option: str, text: str) -> int:
    """MiB of "4GiB", "4GB", "3200MiB" or "3200": makers of GPUs write GB for GiB. Raises UserError for others."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(gib|gb|g|mib|mb|m)?\s*", text.lower())
    if match is None or float(match[1]) == 0:
        raise UserError(f"{option}={text} is not an amount of memory; 4GiB or 3200MiB is.")
    if match[2] is None and float(match[1]) < 256:
        raise UserError(f"{option}={text} has no unit and would be MiB; did you mean {option} {match[1]}GiB?")
    if len(text) > 20:
        raise UserError(f"{option}={text[:20]}... is more memory than there is; 4GiB or 3200MiB works.")
    return round(float(match[1]) * (1024 if (match[2] or "m").startswith("g") else 1))
