"""AdamW's moments in 8 bits, through bitsandbytes: what they weigh, and that a run with them goes on exactly."""

import builtins
import shutil

import pytest
import torch
from small_runs import accelerate, different, fit, leaves, small_run
from test_resume import LAST, crash

from nanogpt_lit.checkpoint.run_file import load_run
from nanogpt_lit.gpt.gpt2 import GPTConfig
from nanogpt_lit.memory.ladder import Rung, ladder
from nanogpt_lit.memory.techniques import MemoryConfig
from nanogpt_lit.module import LitNanoGPT
from nanogpt_lit.optim.adamw import AdamWConfig
from nanogpt_lit.plan.budget import gpu_named
from nanogpt_lit.plan.plan import measure
from nanogpt_lit.plan.step import StepShape

GPT = GPTConfig(block_size=64, vocab_size=300, n_layer=2, n_head=2, n_embd=64)
IN_8_BITS = AdamWConfig(state_bits=8)


def stepped(optim, steps=3):
    torch.manual_seed(1)
    module = LitNanoGPT(GPT, optim)
    optimizer = module.configure_optimizers()["optimizer"]
    for _ in range(steps):
        tokens = torch.randint(300, (4, 64))
        module(tokens, tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
    return module, optimizer


def test_matrices_keep_one_byte_a_moment_and_what_is_planned_for_the_state_is_what_it_weighs():
    _, optimizer = stepped(IN_8_BITS)
    for p, state in optimizer.state.items():
        assert state["state1"].dtype == state["state2"].dtype == (torch.uint8 if p.numel() >= 4096 else torch.float32)
    tensors = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for state in optimizer.state.values()
        for tensor in state.values()
        if isinstance(tensor, torch.Tensor)
    }
    blocks = sum(max(512, -(-size // 512) * 512) for size in tensors.values())
    rung = Rung("", MemoryConfig(), 4, 1, state_bits=8, state_moves=False)
    footprint = measure(
        lambda memory: LitNanoGPT(GPT, IN_8_BITS, memory=memory), rung, StepShape(4, 64, 300), gpu_named("rtx2050")
    )
    assert footprint.categories_mib["optimizer"] * 2**20 == blocks


def test_it_trains_nearly_as_with_32_bits_and_not_to_the_same_bits():
    (eight, _), (full, _) = stepped(IN_8_BITS), stepped(AdamWConfig())
    weights = [torch.cat([p.detach().flatten() for p in module.parameters()]) for module in (eight, full)]
    assert not torch.equal(*weights)
    # Three steps move a weight by three times the rate at most.
    assert (weights[0] - weights[1]).abs().mean() < 0.2 * 3 * AdamWConfig().lr


def test_a_crashed_run_goes_on_to_the_same_bits_under_either_framework(text, tmp_path, monkeypatch):
    """The 8-bit moments, their blocks' measures and the count of steps are all in the checkpoint."""
    wide = ["--model.gpt.n_embd=64", "--model.optim.state_bits=8"]
    assert fit(*small_run(text, tmp_path / "undisturbed"), *wide) == 0
    crash(lambda *arguments: fit(*arguments, *wide), text, tmp_path / "crashed", monkeypatch, forward_call=17)
    folder = tmp_path / "crashed" / "version_0"
    assert any(getattr(value, "dtype", None) == torch.uint8 for _, value in leaves("", vars(load_run(folder / LAST))))
    copy = shutil.copytree(tmp_path / "crashed", tmp_path / "copy")
    for loop, root in ((fit, tmp_path / "crashed"), (accelerate, copy)):
        assert loop(*small_run(text, root), *wide, "--resume=auto") == 0
        assert not different(root / "version_0" / LAST, tmp_path / "undisturbed" / "version_0" / LAST)


def test_its_ladder_moves_no_state_and_says_that_the_numerics_change():
    own = Rung("mine", MemoryConfig(), 4, 1, state_bits=8, state_moves=False)
    plain = Rung("mine", MemoryConfig(), 4, 1)
    rungs = list(ladder(own, 64, casts_weights=True))
    assert {rung.state_bits for rung in rungs} == {8}
    assert {(rung.memory.optimizer_state, rung.memory.weights) for rung in rungs} == {("device", "device")}
    assert not any(rung.same_bits(plain) for rung in rungs)


@pytest.mark.parametrize(
    ("optim", "memory", "says"),
    [
        ({"state_bits": 4}, {}, "model.optim.state_bits=4 is not known; use 32 or 8"),
        ({"state_bits": 8, "matrices": "muon"}, {}, "matrices is muon; set model.optim.state_bits=32"),
        ({"state_bits": 8}, {"optimizer_state": "host"}, "set model.memory.optimizer_state=device, or"),
        ({"state_bits": 8}, {"weights": "streamed"}, "set model.memory.weights=device, or"),
    ],
)
def test_what_it_does_not_go_with_is_refused(optim, memory, says):
    with pytest.raises(ValueError, match=says):
        LitNanoGPT(GPT, AdamWConfig(**optim), memory=MemoryConfig(**memory))


def test_without_bitsandbytes_a_run_says_what_to_install(monkeypatch):
    found = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("bitsandbytes"):
            raise ImportError(name)
        return found(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r'pip install "nanogpt_lit\[eight_bit\]"'):
        LitNanoGPT(GPT, IN_8_BITS).configure_optimizers()
