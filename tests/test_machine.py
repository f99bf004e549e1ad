"""What a run says of the machine when that is not what the YAML asks for."""

import time

import pytest
import torch
from small_runs import fit, small_run

from nanogpt_lit.errors import UserError
from nanogpt_lit.runtime import machine
from nanogpt_lit.runtime.machine import chosen_device, device_type, precision_remark, product_gflops


def test_a_device_that_is_not_here_is_refused_with_those_that_are(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert [device_type(name) for name in ("auto", "cpu")] == ["cpu", "cpu"]
    assert [str(chosen_device(name)) for name in ("auto", "cpu", "cpu:0")] == ["cpu", "cpu", "cpu:0"]
    for name in ("gpu", "cuda", "mps"):
        with pytest.raises(UserError, match=f"trainer.accelerator={name} is not here: .*; cpu and auto work"):
            device_type(name)
    for name in ("cuda", "cuda:1", "mps", "cpu:7"):
        with pytest.raises(UserError, match=f"--device={name} is not here"):
            chosen_device(name)
    for name in ("", "0", "-1", "xpu", "meta", "cuda:", "cuda:x", "nonsense"):
        with pytest.raises(UserError, match=f"--device={name} is not known"):
            chosen_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [device_type(name) for name in ("auto", "gpu", "cuda", "cpu")] == ["cuda", "cuda", "cuda", "cpu"]
    assert [str(chosen_device(name)) for name in ("auto", "cuda:1")] == ["cuda", "cuda:1"]
    with pytest.raises(UserError, match="--device=cuda:2 is not here: there is cuda:0 to 1"):
        chosen_device("cuda:2")


@pytest.mark.parametrize(
    ("single", "bfloat16", "precision", "said"),
    [
        (
            176,
            20,
            "bf16-mixed",
            "at 20 GFLOP/s in bfloat16 and at 176 in float32; trainer.precision=32-true will be faster than bf16-mixed",
        ),
        (120, 900, "32-true", "precision=bf16-mixed will be faster than 32-true"),
        (176, 20, "32-true", None),
        (120, 900, "bf16-mixed", None),
        (100, 140, "32-true", None),  # the casts of a step would take what its products gain
    ],
)
def test_the_precision_that_this_cpu_is_faster_in_is_proposed_with_its_rates(
    monkeypatch, single, bfloat16, precision, said
):
    monkeypatch.setattr(machine, "product_gflops", {torch.float32: single, torch.bfloat16: bfloat16}.get)
    remark = precision_remark(precision, "cpu")
    assert remark is None if said is None else said in remark


def test_float32_is_measured_by_the_library_that_the_run_multiplies_with(monkeypatch):
    asked = []
    monkeypatch.setattr(machine, "set_matmul_backend", lambda device, tf32: asked.append(str(device)))
    monkeypatch.setattr(machine, "product_gflops", lambda dtype: asked.append(dtype) or 1.0)
    precision_remark("32-true", "cpu")
    assert asked == ["cpu", torch.float32, torch.bfloat16]


@pytest.mark.parametrize(("precision", "device"), [("bf16-mixed", "cuda"), ("32-true", "mps"), ("64-true", "cpu")])
def test_nothing_is_measured_where_nothing_could_be_proposed(monkeypatch, precision, device):
    monkeypatch.setattr(machine, "product_gflops", None)
    assert precision_remark(precision, device) is None


SMALL = [0, 0, 1, 1.0009, 2, 2.0008, 3, 3.0009]
"""When four products of 128 x 128 begin and end: the first takes no time at all, the best of the others 0.8 ms."""


def test_a_rate_is_that_of_the_best_product_after_the_first_and_draws_nothing_at_random(monkeypatch):
    large = [4, 4, 5, 5.5, 6, 6.25, 7, 7.5]
    monkeypatch.setattr(machine.time, "perf_counter", iter(SMALL + large).__next__)
    before = torch.get_rng_state()
    assert product_gflops(torch.float32) == pytest.approx(2 * 512**3 / 0.25 / 1e9)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_rate_of_a_dtype_without_units_for_it_is_told_by_the_small_product(monkeypatch):
    monkeypatch.setattr(machine.time, "perf_counter", iter([2 * moment for moment in SMALL]).__next__)
    assert product_gflops(torch.bfloat16) == pytest.approx(2 * 128**3 / 1.6e-3 / 1e9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_does_not_wait_for_the_rate_whatever_the_cpu_has_units_for(dtype):
    started = time.process_time()
    product_gflops(dtype)
    assert time.process_time() - started < 0.2  # four products of 512 x 512 in bfloat16 take 0.85 s with AVX2 alone


def test_fit_says_so_once_and_trains_in_bfloat16_all_the_same(text, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(machine, "product_gflops", {torch.float32: 176.0, torch.bfloat16: 20.0}.get)
    assert fit(*small_run(text, tmp_path, "--trainer.precision=bf16-mixed", "--trainer.max_steps=1")) == 0
    out = capsys.readouterr().out
    assert out.count("trainer.precision=32-true will be faster than bf16-mixed") == 1
    assert "parameters, bf16-mixed on 1 x" in out
