"""The loops on the device: the same bits from each, and from a run that stopped and went on in another."""

import os
import signal

import pytest
import torch
from apart import apart, command
from short_run import PLACEMENTS, fit
from torch.optim.optimizer import register_optimizer_step_post_hook

from nanogpt_lit.__main__ import main

DROPOUT = "--model.gpt.dropout=0.1"


def accelerate(options, before=None):
    return command(options, before=before, program=lambda words: main(["fit-accelerate", *words]))


LOOPS = {"lightning": None, "accelerate": accelerate}
CHANGES = [("lightning", "lightning"), ("lightning", "accelerate"), ("accelerate", "lightning")]


class Stop:
    """Ctrl-C in the middle of the first step."""

    found = None

    def __call__(self):
        self.steps = 0
        register_optimizer_step_post_hook(self._step)

    def _step(self, *_):
        self.steps += 1
        if self.steps == 1:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(scope="session")
def whole(tmp_path_factory, text):
    runs = {}

    def run(placement):
        if placement not in runs:
            runs[placement] = fit(tmp_path_factory.mktemp("whole"), text, PLACEMENTS[placement], DROPOUT)
            assert runs[placement].code == 0, runs[placement].said
        return runs[placement]

    return run


@pytest.mark.parametrize("placement", ["all on the GPU", "optimizer on the host", "weights on the host"])
def test_accelerate_gives_the_bits_of_lightning(placement, whole, text, tmp_path):
    same_bits(fit(tmp_path / "run", text, PLACEMENTS[placement], DROPOUT, loop=accelerate), whole(placement))


@pytest.mark.parametrize("placement", ["all on the GPU", "optimizer on the host", "weights streamed"])
@pytest.mark.parametrize(("first", "second"), CHANGES)
def test_a_stopped_run_goes_on_to_the_same_bits(placement, first, second, whole, text, tmp_path):
    """Dropout draws from the device's generator, whose place is in the checkpoint."""
    memory = PLACEMENTS[placement]
    stopped = fit(tmp_path / "stopped", text, memory, DROPOUT, before=Stop(), loop=LOOPS[first])
    assert stopped.state, stopped.said
    last = next((tmp_path / "stopped").glob("*/checkpoints/last.safetensors"))
    went_on = fit(tmp_path / "on", text, memory, DROPOUT, f"--ckpt_path={last}", loop=LOOPS[second])
    same_bits(went_on, whole(placement))


def same_bits(run, expected):
    assert run.code == 0, run.said
    assert run.state.keys() == expected.state.keys()
    different = [name for name, tensor in expected.state.items() if not torch.equal(run.state[name], tensor)]
    assert different == []


def test_plain_pytorch_accelerate_and_lightning_are_identical(text, tmp_path):
    grid = [
        "--config=configs/parity.yaml", "--on=cuda", "--precision", "16-mixed", "16-mixed overflow", "bf16-mixed",
        "--optimizer", "fused", "--accumulate", "4", "--clip", "on", "--dropout", "0.0", "0.1", "--ragged", "no",
        "--processes", "1", "--steps=2", f"--data.source={text}", "--skip-memory",
        f"--trainer.default_root_dir={tmp_path / 'run'}", f"--out={tmp_path / 'out'}",
    ]  # fmt: skip
    assert apart(parity, grid, log=tmp_path / "log") == 0


def parity(grid):
    return command(grid, program=lambda words: main(["parity", *words]))


def test_the_device_computes_what_a_cpu_does(text, tmp_path):
    """Up to rounding: attention and products of 16 bits are not those of the CPU's own kernels."""
    runs = [
        fit(tmp_path / name, text, {}, "--trainer.precision=32-true", f"--trainer.accelerator={name}")
        for name in ("cuda", "cpu")
    ]
    on_device, on_cpu = (run.curves["train/loss"] for run in runs)
    assert on_device == {step: pytest.approx(loss, abs=1e-4) for step, loss in on_cpu.items()}


def test_generate_writes_on_the_device_what_it_writes_on_a_cpu(text, tmp_path):
    run = fit(tmp_path / "run", text, {}, "--trainer.precision=32-true")
    assert run.code == 0, run.said
    last = next((tmp_path / "run").glob("*/checkpoints/last.safetensors"))
    written = []
    for device in ("cuda", "cpu"):
        log = tmp_path / f"{device}.log"
        options = [f"--ckpt={last}", "--prompt=def ", "--temperature=0", "--max-new-tokens=20", f"--device={device}"]
        assert apart(generate, options, log=log) == 0
        written.append(log.read_text())
    assert written[0] == written[1]
    assert "def " in written[0]


def generate(options):
    return command(["generate", *options])
