"""A loss that jumps: every loop goes back to its last checkpoint alike, goes on with other samples, and counts it."""

import copy

import pytest
import torch
from small_runs import LOOPS, accelerate, curves, different, fit, small_run
from trainings import training_of

from nanogpt_lit.checkpoint.run_file import load_run, save_run
from nanogpt_lit.module import LitNanoGPT
from nanogpt_lit.parity.record import leaves, same
from nanogpt_lit.run import guards
from nanogpt_lit.run.guards import NotFinite, SpikeGuard
from nanogpt_lit.run.resume import capture

LAST = "checkpoints/last.safetensors"
OPTIONS = ["--spike_factor=2", "--model.schedule.warmup_steps=0"]


@pytest.fixture
def jumping(monkeypatch):
    """jumping(ns) makes the loss of the n-th training forwards ten times as large, and with it their gradients."""
    monkeypatch.setattr(guards, "RECENT", 4)
    forward = LitNanoGPT.forward

    def arrange(ns, dies_at=None):
        calls = iter(range(1, 10**6))

        def high(self, tokens, targets):
            loss = forward(self, tokens, targets)
            if not self.training:
                return loss
            call = next(calls)
            if call == dies_at:
                raise ZeroDivisionError
            return loss * 10 if call in ns else loss

        monkeypatch.setattr(LitNanoGPT, "forward", high)

    return arrange


def test_every_loop_goes_back_alike_and_counts_it(text, tmp_path, jumping, capsys):
    for loop, name in LOOPS.items():
        jumping({9, 10})  # step 5, of two micro-batches; step 4 was saved
        assert loop(*small_run(text, tmp_path, *OPTIONS)) == 0
        assert "step 5: the loss" in (err := capsys.readouterr().err)
        assert err.count("weights and moments are those of step 4 again") == 1
        drawn = curves(tmp_path / name)
        assert [drawn["train/rollbacks", step] for step in range(1, 9)] == [0, 0, 0, 0, 1, 1, 1, 1]
        state = load_run(tmp_path / name / LAST)
        # No sample and no rate is taken twice; Adam's own count is that of the weights.
        assert (state.step, state.batches, state.schedule["last_epoch"]) == (8, 16, 8)
        assert {float(moments["step"]) for moments in state.optimizer["state"].values()} == {7.0}
    assert not different(*(tmp_path / name / LAST for name in LOOPS.values()))


def test_a_run_that_is_taken_up_again_goes_back_again_to_the_same_bits(text, tmp_path, jumping):
    """It knows the losses before: those of steps 1 to 4 are in the checkpoint of step 4."""
    jumping({9, 10})
    assert fit(*small_run(text, tmp_path / "whole", *OPTIONS)) == 0
    jumping({9, 10}, dies_at=12)
    with pytest.raises(ZeroDivisionError):
        fit(*small_run(text, tmp_path / "cut", *OPTIONS))
    jumping({1, 2})
    assert accelerate(*small_run(text, tmp_path / "cut", *OPTIONS, "--resume=auto")) == 0
    assert not different(*(tmp_path / root / "version_0" / LAST for root in ("whole", "cut")))


@pytest.mark.parametrize("option", ["--spike_factor=1", "--trainer.enable_checkpointing=false"])
def test_what_cannot_be_guarded_is_refused(option, text, tmp_path, capsys):
    assert fit(*small_run(text, tmp_path), "--spike_factor=2", option) == 2
    assert "error: spike_factor=" in capsys.readouterr().err.splitlines()[-1]


@pytest.fixture
def training(tiny_gpt):
    torch.manual_seed(0)
    module = LitNanoGPT(tiny_gpt)
    return training_of(module, accumulate_grad_batches=2)


def take_step(training):
    tokens = torch.zeros(2, 8, dtype=torch.int64)
    training.module(tokens, tokens).backward()
    training.optimizer.step()
    training.schedule.step()
    training.optimizer.zero_grad()


def state_of(training, step):
    training.step = step
    return copy.deepcopy(capture(training, data={}))


def guard_of(folder, training, monkeypatch):
    monkeypatch.setattr(guards, "RECENT", 4)
    guard = SpikeGuard(2.0, folder)
    guard.on_train_start(training)
    return guard


def losses(guard, step, *values):
    for value in values:
        guard.on_batch_end(torch.tensor(value), 8)
        guard.on_batch_end(torch.tensor(value), 8)
        guard.on_step_end(step, 0.1, None)


def test_weights_and_moments_go_back_to_the_bit_and_the_rates_stay(training, tmp_path, monkeypatch):
    guard = guard_of(tmp_path, training, monkeypatch)
    take_step(training)
    saved = state_of(training, 1)
    save_run(tmp_path / "last.safetensors", saved)
    take_step(training)
    now = state_of(training, 2)
    losses(guard, 2, 3.0, 3.0, 3.0, 3.0, 6.0)
    assert guard.rollbacks == 0  # not above
    losses(guard, 2, 6.1)
    after = state_of(training, 2)
    assert guard.rollbacks == 1
    for part in ("weights", "optimizer"):
        before = dict(leaves("", getattr(saved, part)))
        back = dict(leaves("", getattr(after, part)))
        assert {name for name in before if not same(before[name], back[name])} == (
            {name for name in before if name.endswith(" lr")} if part == "optimizer" else set()
        )
    assert [g["lr"] for g in after.optimizer["param_groups"]] == [g["lr"] for g in now.optimizer["param_groups"]]
    assert after.schedule == now.schedule


def test_a_second_jump_goes_further_back_and_a_third_ends_the_run(training, tmp_path, monkeypatch):
    guard = guard_of(tmp_path, training, monkeypatch)
    for step in (1, 2):
        take_step(training)
        save_run(tmp_path / "last.safetensors", state_of(training, step))
    losses(guard, 3, 3.0, 3.0, 3.0, 3.0, 9.0)
    assert {float(s["step"]) for s in training.optimizer.state.values()} == {2.0}
    losses(guard, 4, 9.0)
    assert {float(s["step"]) for s in training.optimizer.state.values()} == {1.0}
    with pytest.raises(
        NotFinite, match=r"step 5: the loss 9\.000 is above 2 times the median .*lower model\.optim\.lr"
    ):
        losses(guard, 5, 9.0)


def test_neither_the_first_steps_nor_those_that_are_left_out_anyway_are_jumps(training, tmp_path, monkeypatch, capsys):
    guard = guard_of(tmp_path, training, monkeypatch)
    losses(guard, 1, 9.0, 1.0, float("nan"), float("inf"), 9.0)
    assert capsys.readouterr().err == ""
    losses(guard, 6, 1.0, 99.0)
    assert "there is no checkpoint yet to go back to" in capsys.readouterr().err
    assert guard.rollbacks == 0
