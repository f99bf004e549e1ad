"""What the headers of the 4 GB configurations say, against the plan."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from nanogpt_lit.cli.settings import SettingsCLI
from nanogpt_lit.gpt.networks import section_of
from nanogpt_lit.memory.techniques import MemoryConfig
from nanogpt_lit.plan.budget import choose_budget, gpu_named
from nanogpt_lit.plan.command import network, own_rung, plan_rung

CONFIGS = Path(__file__).parents[1] / "configs"
LARGEST_MIB = {
    "rtx2050": 2450,
    "finetune_rtx2050": 1950,
    "smollm2_rtx2050": 2450,
    "rtx2050_medium": 3350,
    "rtx2050_large": 2900,
    "rtx2050_xl": 1000,
}
"""What each has to stay below: reserved, on a card of 4 GiB with a desktop beside it."""
PARAMETERS = {
    "rtx2050": 124e6,
    "finetune_rtx2050": 124e6,
    "smollm2_rtx2050": 134.515e6,
    "rtx2050_medium": 355e6,
    "rtx2050_large": 774e6,
    "rtx2050_xl": 1558e6,
}


def settings_of(name):
    return SettingsCLI(args=[f"--config={CONFIGS / name}.yaml"]).settings


def header(name):
    """(reserved MiB, MiB of host memory, seconds per step)"""
    text = (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8")
    found = re.search(
        r"# Planned: ([\d,]+) MiB reserved on the GPU, ([\d,]+) MiB of host memory, ([\d.]+) s per step", text
    )
    return [float(number.replace(",", "")) for number in found.groups()]


def planned(name, n_layer=None):
    """(reserved MiB, MiB of host memory, seconds per step, parameters) of the configured rung, and no other."""
    settings = settings_of(name)
    shape = settings.model[section_of(settings.model)]
    shape.n_layer = n_layer or shape.n_layer
    footprint = plan_rung(settings, own_rung(settings), gpu_named("rtx2050"))
    return footprint.reserved_mib, footprint.host_memory_mib, footprint.step_s, footprint.parameters


@pytest.mark.parametrize("name", LARGEST_MIB)
def test_the_header_keeps_below_the_limit_and_names_its_command(name):
    assert header(name)[0] <= LARGEST_MIB[name]
    text = (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8")
    assert f"python -m nanogpt_lit plan --config configs/{name}.yaml" in text


@pytest.mark.parametrize("name", [*LARGEST_MIB, "modern_rtx2050"])
def test_each_fits_what_the_plan_counts_on_without_any_option(name):
    text = (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8")
    reserved = re.search(r"# Planned: ([\d,]+) MiB reserved on the GPU", text)[1]
    assert float(reserved.replace(",", "")) <= choose_budget("rtx2050").usable_mib


@pytest.mark.slow
def test_the_medium_one_is_exact_below_its_limit_where_the_header_says_how():
    """Weights and gradients on the card, as the header says, and by how much that misses what `plan` counts on."""
    settings = settings_of("rtx2050_medium")
    own = own_rung(settings)
    exact = replace(own, memory=replace(own.memory, weights="device", optimizer_state="host"))
    reserved_mib = plan_rung(settings, exact, gpu_named("rtx2050")).reserved_mib
    assert reserved_mib <= LARGEST_MIB["rtx2050_medium"]
    text = (CONFIGS / "rtx2050_medium.yaml").read_text(encoding="utf-8")
    assert f"{reserved_mib - choose_budget('rtx2050').usable_mib:.0f} MiB more than `plan` counts on" in text


@pytest.mark.parametrize("name", ["rtx2050_medium", "rtx2050_large", "rtx2050_xl"])
def test_host_memory_and_time_follow_from_networks_of_two_and_four_layers(name):
    """Each layer takes as much as the one before; what is reserved has gaps, which no line foretells."""
    n_layer = network(settings_of(name)).n_layer
    two, four = planned(name, 2), planned(name, 4)
    _, host_mib, step_s, parameters = (a + (b - a) / 2 * (n_layer - 2) for a, b in zip(two, four, strict=True))
    assert host_mib == pytest.approx(header(name)[1], rel=0.02)
    assert step_s == pytest.approx(header(name)[2], rel=0.01)
    assert parameters == pytest.approx(PARAMETERS[name], rel=0.01)


# The two largest take a minute of a busy CPU: of them the suite derives time and host memory from a few layers.
MARKED = dict.fromkeys(LARGEST_MIB, pytest.mark.slow) | dict.fromkeys(("rtx2050_large", "rtx2050_xl"), pytest.mark.long)


@pytest.mark.parametrize("name", [pytest.param(name, marks=MARKED[name]) for name in LARGEST_MIB])
def test_the_header_says_what_is_planned(name):
    reserved_mib, host_mib, step_s, parameters = planned(name)
    said = header(name)
    assert reserved_mib == pytest.approx(said[0], abs=1)
    assert host_mib == pytest.approx(said[1], abs=1)
    assert step_s == pytest.approx(said[2], abs=0.051)
    assert parameters == pytest.approx(PARAMETERS[name], rel=0.01)


def test_the_small_one_costs_little_time():
    settings = settings_of("rtx2050")
    plain = replace(own_rung(settings), memory=MemoryConfig())
    footprint = plan_rung(settings, plain, gpu_named("rtx2050"))
    assert header("rtx2050")[2] <= 1.11 * footprint.step_s
