"""The proof on a card, as far as it goes without one."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nanogpt_lit.errors import UserError
from nanogpt_lit.gpt.gpt2 import GPT, GPTConfig
from nanogpt_lit.plan.budget import choose_budget, parse_mib

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("gpu_proof", ROOT / "scripts" / "gpu_proof.py")
gpu_proof = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(gpu_proof)

ROW = {"planned_reserved_mib": 1000.0, "measured_reserved_mib": 1040.0}


@pytest.mark.skipif(torch.cuda.is_available(), reason="is for machines without a card")
def test_without_a_card_it_says_so_in_one_sentence(capsys):
    assert gpu_proof.main([]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: torch sees no CUDA GPU here")
    assert len(said.err.splitlines()) == 1


def dry_run(run, out, configs, *more):
    assert run(["--dry-run", f"--out={out}", "--configs", *configs, *more]) == 0
    record = json.loads(out.read_text())
    assert record["dry_run"] is True
    assert record["holds"] is None
    assert {"hardware", "cuda", "date", "command"} <= record.keys()
    return record


def test_a_dry_run_trains_beside_its_plan_and_claims_nothing(tmp_path, capsys):
    record = dry_run(
        gpu_proof.main, tmp_path / "record.json", ["rtx2050_xl.yaml"], "--skip", "ladder", "parity", "tests"
    )
    (row,) = record["configs"]
    assert row["steps"] == gpu_proof.STEPS
    assert 0 < row["planned_allocated_mib"] <= row["planned_reserved_mib"]
    assert "measured_reserved_mib" not in row  # a processor has nothing to measure here
    assert "rtx2050_xl.yaml, at most 3,200 MiB" in capsys.readouterr().out


@pytest.mark.long
@pytest.mark.skipif(os.name == "nt" or shutil.which("bash") is None, reason="needs bash")
def test_the_command_goes_through_every_part(tmp_path, capfd):
    def run(arguments):
        command = ["bash", str(ROOT / "scripts" / "gpu_proof.sh"), *arguments]
        return subprocess.run(command, env=os.environ | {"PYTHON": sys.executable}).returncode

    configs = ["rtx2050.yaml"]
    record = dry_run(run, tmp_path / "record.json", configs)
    assert [row["config"] for row in record["configs"]] == configs
    assert [row["rung"] for row in record["ladder"]] == ["nothing", "as configured"]
    for row in [*record["configs"], *record["ladder"]]:
        assert "failed" not in row
        assert row["steps"] == gpu_proof.STEPS
        assert row["tokens_per_s"] > 0
        assert 0 < row["planned_allocated_mib"] <= row["planned_reserved_mib"]
        assert "measured_reserved_mib" not in row  # a processor has nothing to measure here
    assert record["ladder"][0]["slowdown_to_first_that_ran"] == 1
    assert record["parity"]["identical"] is True
    assert "tests/test_host_weights.py" in record["tests"]["files"]
    assert "rtx2050.yaml, at most 3,200 MiB" in capfd.readouterr().out


def run_at(tokens_per_s):
    """What a fit keeps of its run, as far as the proof reads it."""
    return SimpleNamespace(run=SimpleNamespace(metrics=SimpleNamespace(tokens_per_s=tokens_per_s)))


def test_utilisation_is_the_arithmetic_of_the_tokens_over_the_rate_of_the_card(monkeypatch):
    with torch.device("meta"):
        gpt = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=16))
    trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cuda")), precision="16-mixed")
    cli = SimpleNamespace(trainer=trainer, model=SimpleNamespace(gpt=gpt), lightning_run=run_at(50.0))
    asked = []
    monkeypatch.setattr(gpu_proof, "peak_flops_of", lambda *card: asked.append(card) or 1e7)
    multiplied = sum(p.numel() for p in gpt.parameters()) - 8 * 16  # all but the positions
    assert gpu_proof.mfu(cli) == 50.0 * (6 * multiplied + 12 * 2 * 16 * 8) / 1e7
    assert asked == [(torch.device("cuda"), "16-mixed", 1)]
    monkeypatch.setattr(gpu_proof, "peak_flops_of", lambda *card: None)
    assert gpu_proof.mfu(cli) is None


def test_it_holds_only_where_everything_does():
    record = {"configs": [ROW], "parity": {"identical": True}, "tests": {"passed": True}}
    assert gpu_proof.holds(record)
    assert not gpu_proof.holds(record | {"configs": [ROW | {"measured_reserved_mib": 1060.0}]})
    assert not gpu_proof.holds(record | {"configs": [ROW | {"failed": "CUDA out of memory"}]})
    assert not gpu_proof.holds(record | {"parity": {"identical": False}})
    assert not gpu_proof.holds(record | {"tests": {"passed": False}})
    assert gpu_proof.holds(record | {"ladder": [{"failed": "CUDA out of memory"}, ROW]})
    assert not gpu_proof.holds(record | {"ladder": [ROW | {"measured_reserved_mib": 940.0}]})
    assert not gpu_proof.holds({})


def test_a_run_that_fell_back_is_no_success(monkeypatch):
    class Fit:
        def __init__(self, args):
            self.model = SimpleNamespace(fallback={"sequences": 2})

    monkeypatch.setattr(gpu_proof, "NanoGPTCLI", Fit)
    assert "fell back" in gpu_proof.run_here([], None)["failed"]


def test_out_of_memory_is_recorded(monkeypatch):
    def fit(args):
        raise UserError("memory ended in forward (CUDA out of memory. Tried to allocate 20.00 MiB); ...")

    monkeypatch.setattr(gpu_proof, "NanoGPTCLI", fit)
    assert gpu_proof.run_here([], None)["failed"].startswith("memory ended in forward")


def test_the_limit_is_set_on_the_device_that_is_in_use(monkeypatch):
    limits = []
    fit = SimpleNamespace(
        model=SimpleNamespace(fallback={}), device="cpu", trainer=SimpleNamespace(global_step=1),
        lightning_run=run_at(1.0),
    )  # fmt: skip
    monkeypatch.setattr(gpu_proof, "NanoGPTCLI", lambda args: fit)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=4000 * 2**20))
    # What lies below the function that refuses: a build for CPUs does not have it.
    monkeypatch.setattr(torch.cuda.memory, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch._C, "_cuda_setMemoryFraction", lambda *limit: limits.append(limit), raising=False)
    assert gpu_proof.run_here([], 3200)["steps"] == 1
    assert limits == [(0.8, 0)]


def test_no_limit_is_more_than_a_4_gb_card_can_give():
    usable_mib = choose_budget("rtx2050", system="linux").usable_mib
    assert all(parse_mib("--caps", cap) <= usable_mib for cap in gpu_proof.CAPS)
