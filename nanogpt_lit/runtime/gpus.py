"""GPUs: what one can do at best, for a plan and for model FLOPs utilisation (MFU), and what its driver says of it now.

A wrong peak gives a wrong MFU, so a GPU that is not listed has none. Peaks are dense (no sparsity) and, for half
precision, with float32 accumulation, which is what cuBLAS uses under autocast.

GeForce RTX GPUs, Ampere and Ada alike, do 512 such operations per multiprocessor and clock (NVIDIA's Ampere GA102
and Ada whitepapers: RTX 3090, 82 x 512 x 1.695 GHz = 71 TFLOP/s) and 256 float32 ones. Those of laptops are listed at
the highest boost clock that NVIDIA publishes for them, beside the one of the lowest power limit that is sold: a laptop
runs somewhere between the two.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from nanogpt_lit.runtime.precision import PRECISIONS

PCIE_3_X8, PCIE_4_X8 = 6.2e9, 12.4e9


@dataclass(frozen=True)
class Gpu:
    name: str
    """The name that `plan --gpu` knows."""
    pattern: str
    """Regular expression found in torch.cuda.get_device_name(), in lower case. Strict: a GTX 1650 is no GTX 1650 Ti."""
    vram_mib: int
    multiprocessors: int
    capability: tuple[int, int]
    """CUDA's compute capability, major and minor: it decides which kernels PyTorch takes."""
    bandwidth: float
    """Bytes per second to and from its memory."""
    host_bandwidth: float
    """Bytes per second each way between it and the host: what PCIe leaves of its nominal rate, about four fifths."""
    fp32: float
    """Dense FLOP/s by numeric format; None where the GPU has no unit for it."""
    tf32: float | None
    fp16: float
    bf16: float | None
    lowest_clock: float = 1.0
    """The boost clock at the lowest power limit, as a share of the clock that these rates are of."""


def _geforce_rtx(
    name: str,
    pattern: str,
    vram_gib: int,
    multiprocessors: int,
    capability: tuple[int, int],
    boost_ghz: tuple[float, float],
    bandwidth: float,
    host_bandwidth: float = PCIE_4_X8,
) -> Gpu:
    lowest, highest = boost_ghz
    clocks = multiprocessors * highest * 1e9
    return Gpu(
        name, pattern, vram_gib * 1024, multiprocessors, capability, bandwidth, host_bandwidth,
        fp32=256 * clocks, tf32=256 * clocks, fp16=512 * clocks, bf16=512 * clocks, lowest_clock=lowest / highest,
    )  # fmt: skip


GPUS = (
    _geforce_rtx("rtx2050", r"\brtx 2050$", 4, 16, (8, 6), (1.155, 1.477), 112e9, PCIE_3_X8),
    _geforce_rtx("rtx3050-laptop", r"\brtx 3050 laptop gpu$", 4, 16, (8, 6), (1.057, 1.740), 192e9),
    _geforce_rtx("rtx3050ti-laptop", r"\brtx 3050 ti laptop gpu$", 4, 20, (8, 6), (1.035, 1.695), 192e9),
    _geforce_rtx("rtx4050-laptop", r"\brtx 4050 laptop gpu$", 6, 20, (8, 9), (1.605, 2.370), 192e9),
    _geforce_rtx("rtx4060-laptop", r"\brtx 4060 laptop gpu$", 8, 24, (8, 9), (1.470, 2.370), 256e9),
    # Turing without tensor cores: half precision at twice the float32 rate (TU117).
    Gpu("gtx1650", r"\bgtx 1650$", 4096, 14, (7, 5), 128e9, 2 * PCIE_3_X8,
        fp32=2.98e12, tf32=None, fp16=5.97e12, bf16=None),
    Gpu("t4", r"\btesla t4$", 15360, 40, (7, 5), 320e9, 2 * PCIE_3_X8,
        fp32=8.1e12, tf32=None, fp16=65e12, bf16=None),
    # The smaller of the two that bear the name.
    Gpu("a100", r"\ba100\b", 40960, 108, (8, 0), 1555e9, 2 * PCIE_4_X8,
        fp32=19.5e12, tf32=156e12, fp16=312e12, bf16=312e12),
    Gpu("h100-pcie", r"\bh100 pcie$", 81559, 114, (9, 0), 2.0e12, 4 * PCIE_4_X8,
        fp32=51e12, tf32=378e12, fp16=756e12, bf16=756e12),
    Gpu("h100", r"\bh100 80gb hbm3$", 81559, 132, (9, 0), 3.35e12, 4 * PCIE_4_X8,
        fp32=67e12, tf32=494.7e12, fp16=989.4e12, bf16=989.4e12),
)  # fmt: skip


def listed_gpu(device_name: str) -> Gpu | None:
    """The GPU of a device name, as torch.cuda.get_device_name() gives it; None when it is not listed."""
    return next((gpu for gpu in GPUS if re.search(gpu.pattern, device_name.lower())), None)


def peak_flops(device_name: str, precision: str, allow_tf32: bool = False) -> float | None:
    """Dense peak in FLOP/s of one GPU at a Lightning precision such as "16-mixed", or None when it is not known.

    device_name: as torch.cuda.get_device_name() gives it; a CPU has no entry
    allow_tf32: whether float32 matrix products run in TF32 (torch.backends.cuda.matmul.fp32_precision == "tf32")
    """
    gpu = listed_gpu(device_name)
    if gpu is None:
        return None
    if precision not in PRECISIONS:
        return None
    single = gpu.tf32 if allow_tf32 else gpu.fp32
    return {"float16": gpu.fp16, "bfloat16": gpu.bf16, "float32": single}[PRECISIONS[precision].multiplies_in]


class GpuHealth:
    """Reads an NVIDIA GPU. Without one, or without nvidia-ml-py (the extra `nvidia`), it has nothing to say."""

    def __init__(self, device: torch.device) -> None:
        self._pynvml, self._handle = handle_of(device)

    def curves(self) -> dict[str, float]:
        """The tags of this moment, those that the GPU knows: many a laptop does not know its power.

        gpu/slowed_by_heat and gpu/slowed_by_power are 1 while the driver holds the clock down for that reason.
        """
        if self._pynvml is None:
            return {}
        values = {}
        for tag, read in readings(self._pynvml, self._handle):
            with suppress(self._pynvml.NVMLError):
                values[tag] = read()
        return values


def readings(pynvml: ModuleType, handle: Any) -> Iterator[tuple[str, Callable[[], float]]]:
    def slowed(reasons: int) -> Callable[[], float]:
        return lambda: float(bool(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle) & reasons))

    heat = pynvml.nvmlClocksThrottleReasonSwThermalSlowdown | pynvml.nvmlClocksThrottleReasonHwThermalSlowdown
    power = pynvml.nvmlClocksThrottleReasonSwPowerCap | pynvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown
    yield "gpu/temperature_c", lambda: float(pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU))
    yield "gpu/power_w", lambda: pynvml.nvmlDeviceGetPowerUsage(handle) / 1000
    yield "gpu/clock_mhz", lambda: float(pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM))
    yield "gpu/slowed_by_heat", slowed(heat)
    yield "gpu/slowed_by_power", slowed(power)


def handle_of(device: torch.device) -> tuple[ModuleType | None, Any]:
    """nvidia-ml-py and its name for the GPU; (None, None) without either."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None, None
    try:
        import pynvml
    except ImportError:
        return None, None
    found: Any = torch.cuda.get_device_properties(device)
    # By its place on the bus: the driver's numbers are not CUDA's where CUDA_VISIBLE_DEVICES says so, or GPUs differ.
    place = f"{found.pci_domain_id:08x}:{found.pci_bus_id:02x}:{found.pci_device_id:02x}.0"
    try:
        pynvml.nvmlInit()
        return pynvml, pynvml.nvmlDeviceGetHandleByPciBusId(place)
    except pynvml.NVMLError:
        return None, None
