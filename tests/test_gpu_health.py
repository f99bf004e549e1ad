"""A card that only the driver's library knows is stood in for by what that library answers."""

import sys
from types import SimpleNamespace

import pytest
import torch
from trainings import training_of

from nanogpt_lit.module import LitNanoGPT
from nanogpt_lit.run import metrics as metrics_module
from nanogpt_lit.run.metrics import StepMetrics
from nanogpt_lit.runtime.gpus import GpuHealth

CUDA = torch.device("cuda", 1)


class NVMLError(Exception):
    pass


def unsupported(*_):
    raise NVMLError("Not Supported")


@pytest.fixture
def pynvml(monkeypatch):
    """A card in the second place on the bus, which CUDA counts as cuda:1 and the driver may count otherwise."""
    real = pytest.importorskip("pynvml")
    constants = {name: getattr(real, name) for name in dir(real) if name.startswith(("nvmlClocks", "NVML_"))}
    library = SimpleNamespace(
        **constants,
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByPciBusId=lambda place: {"00000000:2b:00.0": "card"}[place],
        nvmlDeviceGetTemperature=lambda card, sensor: {("card", 0): 87}[card, sensor],
        nvmlDeviceGetPowerUsage=lambda card: 45_500,
        nvmlDeviceGetClockInfo=lambda card, kind: {1: 1102}[kind],
        nvmlDeviceGetCurrentClocksThrottleReasons=lambda card: 0x20,
    )
    monkeypatch.setitem(sys.modules, "pynvml", library)
    found = SimpleNamespace(pci_domain_id=0, pci_bus_id=0x2B, pci_device_id=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: {CUDA: found}[device])
    monkeypatch.setattr(torch.version, "hip", None)
    return library


def test_the_card_is_read_in_degrees_watts_and_megahertz(pynvml):
    assert GpuHealth(CUDA).curves() == {
        "gpu/temperature_c": 87.0,
        "gpu/power_w": 45.5,
        "gpu/clock_mhz": 1102.0,
        "gpu/slowed_by_heat": 1.0,
        "gpu/slowed_by_power": 0.0,
    }


@pytest.mark.parametrize(
    ("reasons", "slowed"), [(0, (0, 0)), (0x40, (1, 0)), (0x4 | 0x80, (0, 1)), (0x1 | 0x10, (0, 0))]
)
def test_only_heat_and_power_slow_it(pynvml, reasons, slowed):
    pynvml.nvmlDeviceGetCurrentClocksThrottleReasons = lambda card: reasons
    values = GpuHealth(CUDA).curves()
    assert (values["gpu/slowed_by_heat"], values["gpu/slowed_by_power"]) == slowed


def test_what_a_card_does_not_know_is_left_out_and_the_rest_is_not(pynvml):
    pynvml.nvmlDeviceGetPowerUsage = unsupported
    assert sorted(set(GpuHealth(CUDA).curves())) == [
        "gpu/clock_mhz", "gpu/slowed_by_heat", "gpu/slowed_by_power", "gpu/temperature_c",
    ]  # fmt: skip


def test_without_a_driver_there_is_nothing(pynvml):
    pynvml.nvmlInit = unsupported
    assert GpuHealth(CUDA).curves() == {}


def test_without_the_package_there_is_nothing(pynvml, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert GpuHealth(CUDA).curves() == {}


def test_a_processor_is_not_asked_after(pynvml):
    pynvml.nvmlInit = lambda: pytest.fail("the driver was asked")
    assert GpuHealth(torch.device("cpu")).curves() == {}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_the_real_library_without_a_card_says_nothing(monkeypatch):
    pytest.importorskip("pynvml")
    found = SimpleNamespace(pci_domain_id=0, pci_bus_id=1, pci_device_id=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    assert GpuHealth(CUDA).curves() == {}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or torch.version.hip is not None, reason="needs an NVIDIA card")
def test_a_real_card_has_a_temperature():
    pytest.importorskip("pynvml")
    values = GpuHealth(torch.device("cuda", 0)).curves()
    assert 0 < values["gpu/temperature_c"] < 120
    assert values["gpu/clock_mhz"] > 0


def test_the_curves_of_a_step_have_the_card_in_them(pynvml, monkeypatch, tiny_gpt):
    for name in ("max_memory_allocated", "max_memory_reserved"):
        monkeypatch.setattr(torch.cuda, name, lambda device: 0)
    monkeypatch.setattr(metrics_module, "peak_flops_of", lambda *_: None)
    logged = []
    metrics = StepMetrics(lambda values, step: logged.append(values), 1, plans=False)
    training = training_of(LitNanoGPT(tiny_gpt))
    training.device = CUDA
    metrics.on_train_start(training)
    metrics.on_batch_end(torch.tensor(1.0), tokens=8)
    metrics.on_step_end(1, 0.1, torch.tensor(1.0))
    (values,) = logged
    assert values["gpu/temperature_c"] == 87.0
