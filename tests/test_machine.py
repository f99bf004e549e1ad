"""What a run says of the machine when that is not what the YAML asks for."""

import itertools

import pytest
import torch
from small_runs import fit, small_run

from nanogpt_lit.errors import UserError
from nanogpt_lit.runtime import machine
from nanogpt_lit.runtime.machine import chosen_device, device_type, product_gflops, slow_precision


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


NO_UNITS = {torch.float32: 176.0, torch.bfloat16: 20.0}


def test_a_processor_that_is_slower_in_bfloat16_is_told_of_with_its_rates(monkeypatch):
    monkeypatch.setattr(machine, "product_gflops", NO_UNITS.get)
    sentence = slow_precision("bf16-mixed", "cpu")
    assert "20 GFLOP/s in bfloat16 and at 176 in float32; bf16-mixed will be slower than 32-true" in sentence


def test_nothing_is_said_where_bfloat16_is_faster_or_not_asked_for_or_the_processor_does_not_compute(monkeypatch):
    monkeypatch.setattr(machine, "product_gflops", {torch.float32: 20.0, torch.bfloat16: 176.0}.get)
    assert slow_precision("bf16-mixed", "cpu") is None
    monkeypatch.setattr(machine, "product_gflops", None)  # not measured
    assert slow_precision("32-true", "cpu") is None
    assert slow_precision("bf16-mixed", "cuda") is None


def test_a_rate_is_that_of_the_best_product_after_the_first_and_draws_nothing_at_random(monkeypatch):
    # Four products of 512 x 512, begun and ended: the first takes no time at all, the best of the others 0.25 s.
    monkeypatch.setattr(machine.time, "perf_counter", itertools.cycle([0, 0, 1, 1.5, 2, 2.25, 3, 3.5]).__next__)
    before = torch.get_rng_state()
    assert product_gflops(torch.float32) == pytest.approx(2 * 512**3 / 0.25 / 1e9)
    assert torch.equal(torch.get_rng_state(), before)


def test_fit_says_so_once_and_trains_in_bfloat16_all_the_same(text, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(machine, "product_gflops", NO_UNITS.get)
    assert fit(*small_run(text, tmp_path, "--trainer.precision=bf16-mixed", "--trainer.max_steps=1")) == 0
    out = capsys.readouterr().out
    assert out.count("bf16-mixed will be slower than 32-true") == 1
    assert "parameters, bf16-mixed on 1 x" in out
