"""The abilities of this machine, and what to say when they are less than the YAML asks for."""

import platform
import shutil
import subprocess
import time
from importlib.metadata import version
from pathlib import Path

import torch

from nanogpt_lit.errors import UserError
from nanogpt_lit.runtime.precision import PRECISIONS
from nanogpt_lit.runtime.process_settings import restored_matmul_backend, set_matmul_backend

GPUS = ("cuda", "mps")


def device_type(accelerator: str) -> str:
    """ "cuda", "mps" or "cpu": what Lightning's trainer.accelerator comes to here.

    Raises UserError for a GPU that is not there, and for what this project does not run on.
    """
    here = gpus_here()
    if accelerator in ("auto", "gpu") and here:
        return here[0]
    if accelerator in ("auto", "cpu"):
        return "cpu"
    if accelerator in here:
        return accelerator
    if accelerator not in ("gpu", *GPUS):
        raise UserError(f"trainer.accelerator={accelerator} is not known; auto, cpu, gpu, cuda and mps are.")
    raise UserError(f"trainer.accelerator={accelerator} is not here: {missing_gpu()}; cpu and auto work.")


def chosen_device(name: str) -> torch.device:
    """The device that --device names; "auto" takes a GPU if there is one. Raises UserError for one that is not here."""
    if name == "auto":
        return torch.device(device_type("auto"))
    kind, _, number = name.partition(":")
    if kind not in ("cpu", *GPUS) or (number and not number.isdecimal()) or name.endswith(":"):
        raise UserError(f"--device={name} is not known; auto, cpu, cuda, cuda:1 and mps are.")
    if kind in GPUS and kind not in gpus_here():
        raise UserError(f"--device={name} is not here: {missing_gpu()}; --device cpu works.")
    count = torch.cuda.device_count() if kind == "cuda" else 1
    if number and int(number) >= count:
        raise UserError(f"--device={name} is not here: there is {kind}:0" + (f" to {count - 1}" * (count > 1)) + ".")
    return torch.device(name)


def gpus_here() -> list[str]:
    """The kinds of GPU that torch can use, the first of which is taken where none is named."""
    is_here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    return [kind for kind in GPUS if is_here[kind]]


def missing_gpu() -> str:
    """Why torch has no GPU, and what to do about it."""
    if sentence := unused_gpu():
        return sentence.rstrip(".")
    return f"torch {torch.__version__} finds no GPU (`python -m nanogpt_lit doctor` says why)"


def usable_precision(precision: str, device: str) -> str:
    """The precision that will run: float16 needs a GPU and becomes 32-true without one.

    Lightning would take bf16-mixed there and accelerate float32. Two backends that must agree need one answer, which is
    the same on every CPU; `precision_remark` says where another one is faster.
    """
    row = PRECISIONS.get(precision)
    return "32-true" if row is not None and row.multiplies_in == "float16" and device == "cpu" else precision


MUCH_FASTER = 1.5
"""Speed-up of bfloat16 products from which a training step on a CPU gains by them, for its casts cost time too. With
Intel's AMX it is 8 times, and a step takes 0.83 of its time in float32 with 64 channels and 0.56 with 768."""


def precision_remark(precision: str, device: str) -> str | None:
    """A sentence where the other of bfloat16 and float32 is faster on this CPU, as measured; None where none is.

    No flag of a CPU says it on all of them: torch has bfloat16 kernels for CPUs without units for it.
    """
    multiplies_in = PRECISIONS[precision].multiplies_in if precision in PRECISIONS else ""
    if device != "cpu" or multiplies_in not in ("float32", "bfloat16"):
        return None
    with restored_matmul_backend():
        set_matmul_backend(torch.device("cpu"), tf32=False)
        single, bfloat16 = (product_gflops(dtype) for dtype in (torch.float32, torch.bfloat16))
    if multiplies_in == "bfloat16" and bfloat16 < single:
        faster = "32-true"
    elif multiplies_in == "float32" and bfloat16 > MUCH_FASTER * single:
        faster = "bf16-mixed"
    else:
        return None
    return (
        f"precision: this CPU multiplies matrices at {bfloat16:,.0f} GFLOP/s in bfloat16 and at {single:,.0f} in "
        f"float32; trainer.precision={faster} will be faster than {precision}"
    )


def product_gflops(dtype: torch.dtype) -> float:
    """10^9 operations a second in a product of two square matrices, the best of three after one: milliseconds.

    A CPU without units for the dtype may take a fifth of a second for one of 512 x 512; its rate is that of 128 x 128.
    """
    for side in (128, 512):
        a = torch.ones(side, side, dtype=dtype)  # not random: the random state is the run's
        seconds = []
        for _ in range(4):
            started_s = time.perf_counter()
            a @ a
            seconds.append(time.perf_counter() - started_s)
        best = min(seconds[1:])
        if best > 1e-3:
            break
    return 2 * side**3 / best / 1e9


def unused_gpu() -> str | None:
    """A sentence about a GPU that the driver sees and this build of torch cannot use; None when all is well."""
    if torch.version.cuda is not None or torch.version.hip is not None or torch.backends.mps.is_available():
        return None
    nvidia_smi = shutil.which("nvidia-smi")
    if nvidia_smi is None:
        return None
    query = [nvidia_smi, "--query-gpu=name", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None  # a driver that does not answer is not a GPU that torch could use
    if not answer:
        return None
    return (
        f"The driver sees a {answer.splitlines()[0]}, but torch {torch.__version__} was built without CUDA and will "
        "not use it; install a CUDA build: pip install --force-reinstall torch "
        "--index-url https://download.pytorch.org/whl/cu130 (or the line for your driver from "
        "https://pytorch.org/get-started/locally)."
    )


def device_name(device: torch.device) -> str:
    """ "NVIDIA GeForce RTX 2050", or for a CPU its name and the threads torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return "Apple GPU"
    threads = torch.get_num_threads()
    return f"{cpu_name()}, {threads} thread{'s' if threads > 1 else ''}"


def peak_flops_of(device: torch.device, precision: str, processes: int) -> float | None:
    """FLOP/s of all processes' devices at best, taken to be alike; None where runtime/gpus.py does not know."""
    if device.type != "cuda":
        return None
    from nanogpt_lit.runtime.gpus import peak_flops  # late, for a run on a CPU needs nothing of GPUs

    one = peak_flops(torch.cuda.get_device_name(device), precision, torch.backends.cuda.matmul.fp32_precision == "tf32")
    return one and one * processes


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def hardware(*packages: str) -> str:
    """One line that a measurement must carry: the device, and the versions of torch and of the packages named."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", *packages))
    return f"{device_name(device)}; {platform.system()}, Python {platform.python_version()}, {versions}"
