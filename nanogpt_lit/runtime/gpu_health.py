"""Heat, power and clock of the GPU, as its driver tells them: why the same code runs slower than an hour ago."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from types import ModuleType
from typing import Any

import torch


class GpuHealth:
    """Reads an NVIDIA GPU. Without one, or without nvidia-ml-py (the extra `card`), it has nothing to say."""

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
