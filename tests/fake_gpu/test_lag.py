"""What offloading takes of the device, and of page-locked memory, however far the device lags behind Python."""

import pytest
import torch
from apart import apart, peaks
from fake_device import configure
from torch.utils._python_dispatch import _disable_current_modes

from nanogpt_lit.gpt.gpt2 import GPTConfig
from nanogpt_lit.loops import reference
from nanogpt_lit.loops.contract import LoopSettings
from nanogpt_lit.memory.host import HELD
from nanogpt_lit.memory.ladder import Rung
from nanogpt_lit.memory.techniques import MemoryConfig
from nanogpt_lit.module import LitNanoGPT
from nanogpt_lit.plan.budget import choose_budget
from nanogpt_lit.plan.plan import measure
from nanogpt_lit.plan.step import StepShape

B, T, V = 4, 1024, 8192
GPT = GPTConfig(block_size=T, vocab_size=V, n_layer=8, n_head=8, n_embd=512)
ON_THEIR_WAY_MIB = (HELD + 1) * B * T * GPT.n_embd * 4 / 2**20
"""Inputs of blocks, or gradients, which need room on the host until their copy is over: a plan copies at once."""
LAGS = (0, 1_000, 10_000)
FULL = {"loss_chunk_tokens": 256, "recompute": "full"}
TECHNIQUES = {
    "block inputs": {**FULL, "block_inputs": "host"},
    "optimizer": {**FULL, "optimizer_state": "host"},
    "weights": {**FULL, "weights": "host"},
    "weights, block inputs": {**FULL, "weights": "host", "block_inputs": "host"},
    "streamed": {**FULL, "weights": "streamed", "block_inputs": "host"},
}


def trained(memory, lag):
    """Train three steps, in a process of its own. MiB reserved and allocated of the device, page-locked of the host."""
    with _disable_current_modes():  # a dispatch mode, as of arithmetic, has gradients added up in other memory
        configure(lag=lag, arithmetic=0)
        module = LitNanoGPT(GPT, memory=memory).cuda()
        batch = torch.zeros(B, T, dtype=torch.int64), torch.zeros(B, T, dtype=torch.int64)
        settings = LoopSettings(max_steps=3, accumulate_grad_batches=2, gradient_clip_val=1.0, precision="16-mixed")
        reference.train(module, [batch] * 6, [], settings)
    return [peaks()[name] for name in ("reserved_mib", "allocated_mib", "page_locked_mib")]


def planned(memory):
    shape = StepShape(B, T, V, accumulate_grad_batches=2, precision="16-mixed", validates=False)
    with _disable_current_modes():
        footprint = measure(
            lambda memory: LitNanoGPT(GPT, memory=memory), Rung("", memory, B, 2), shape, choose_budget("rtx2050").gpu
        )
    return footprint.reserved_mib, footprint.allocated_mib, footprint.page_locked_mib


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_offloading_takes_what_was_planned_at_every_lag(technique, tmp_path):
    memory = MemoryConfig(**TECHNIQUES[technique])
    reserved, allocated, locked = apart(planned, memory, log=tmp_path / "plan")
    first, *others = (apart(trained, memory, lag, log=tmp_path / f"{lag}") for lag in LAGS)
    assert first == [
        pytest.approx(reserved, abs=20),  # a segment, more than 1 % of so little
        pytest.approx(allocated, rel=0.01),
        pytest.approx(locked, abs=ON_THEIR_WAY_MIB),
    ]
    for lagging in others:
        assert lagging[:2] == [first[0], pytest.approx(first[1], rel=0.005)]
        assert lagging[2] == pytest.approx(first[2], abs=ON_THEIR_WAY_MIB)
