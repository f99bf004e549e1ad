"""Steps without finite gradients: left out by every loop alike, counted, and the end of a run if they do not cease."""

import copy
import errno
import math
import shutil
from collections import namedtuple

import pytest
import torch
from small_runs import LOOPS, different, fit, small_run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from trainings import training_of

from nanogpt_lit.checkpoint import disk
from nanogpt_lit.checkpoint.run_file import load_run, save_run
from nanogpt_lit.gpt import network
from nanogpt_lit.gpt.loss import cross_entropy
from nanogpt_lit.loops.contract import LoopSettings
from nanogpt_lit.loops.reference import train
from nanogpt_lit.memory.host_optimizer import HostAdamW
from nanogpt_lit.module import LitNanoGPT
from nanogpt_lit.parity.record import leaves, same
from nanogpt_lit.run import guards
from nanogpt_lit.run.guards import FiniteGuard, NotFinite
from nanogpt_lit.runtime import durable

LAST = "checkpoints/last.safetensors"


def six_steps(text, root):
    return small_run(text, root, "--trainer.max_steps=6")


@pytest.fixture
def poisoned(monkeypatch):
    """poisoned(ns) makes the loss of the n-th training forwards nan, and with it all their gradients."""
    forward = LitNanoGPT.forward

    def arrange(ns):
        calls = iter(range(1, 10**6))

        def failing(self, tokens, targets):
            loss = forward(self, tokens, targets)
            return loss * math.nan if self.training and next(calls) in ns else loss

        monkeypatch.setattr(LitNanoGPT, "forward", failing)

    return arrange


@pytest.fixture
def infinite(monkeypatch):
    """The same with a loss that is infinite and whose gradients are those of the finite one."""

    def arrange(ns):
        calls = iter(range(1, 10**6))

        def overflowing(*of):
            loss = cross_entropy(*of)
            return loss + math.inf if torch.is_grad_enabled() and next(calls) in ns else loss

        monkeypatch.setattr(network, "cross_entropy", overflowing)

    return arrange


@pytest.mark.parametrize("poison", ["poisoned", "infinite"])
def test_a_poisoned_step_is_left_out_and_counted_by_fit_and_accelerate_alike(poison, text, tmp_path, request):
    poisoned = request.getfixturevalue(poison)
    for loop, name in LOOPS.items():
        poisoned({3, 8})  # the first micro-batch of step 2, the second of step 4
        assert loop(*six_steps(text, tmp_path)) == 0
        events = EventAccumulator(str(tmp_path / name)).Reload()
        assert [e.value for e in events.Scalars("train/skipped_steps")] == [0, 1, 1, 2, 2, 2]
        state = load_run(tmp_path / name / LAST)
        assert (state.step, state.schedule["last_epoch"], state.schedule["skipped_steps"]) == (6, 4, 2)
        assert all(torch.isfinite(weight).all() for weight in state.weights.values())
    assert not different(tmp_path / "version_0" / LAST, tmp_path / "accelerate_0" / LAST)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_run_that_stays_poisoned_is_given_up_with_its_last_good_checkpoint(
    loop, text, tmp_path, poisoned, monkeypatch, capsys
):
    monkeypatch.setattr(guards, "IN_A_ROW", 3)
    poisoned(range(5, 99))  # from step 3 on
    assert loop(*six_steps(text, tmp_path)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: the gradients of 3 steps in a row, up to step 5, are not finite; a lower")
    assert error.endswith(f"The last good checkpoint is {tmp_path / LOOPS[loop] / LAST}.")
    assert all(torch.isfinite(weight).all() for weight in load_run(tmp_path / LOOPS[loop] / LAST).weights.values())


@pytest.mark.parametrize("kind", ["for-loop", "foreach", "fused", "host"])
def test_an_optimizer_without_gradients_changes_neither_weights_nor_state(kind):
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(4, 4)), torch.nn.Parameter(torch.randn(4))]
    options = {"foreach": kind == "foreach", "fused": kind in ("fused", "host")}
    optimizer = (HostAdamW if kind == "host" else torch.optim.AdamW)(parameters, lr=0.1, **options)
    guard = FiniteGuard()
    guard._parameters = parameters
    for poison in (1.0, math.inf, math.nan):
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter) * poison
        before = copy.deepcopy((parameters, optimizer.state_dict()))
        guard.on_before_step(torch.nn.utils.clip_grad_norm_(parameters, 1.0))
        optimizer.step()
        unchanged = all(same(a, b) for (_, a), (_, b) in zip(
            leaves("", before[1]), leaves("", optimizer.state_dict()), strict=False
        )) and all(torch.equal(a, b) for a, b in zip(before[0], parameters, strict=True))  # fmt: skip
        assert unchanged == (poison != 1.0)


def test_a_scale_that_sinks_to_nothing_is_named(tiny_gpt):
    class Blowing(LitNanoGPT):
        def forward(self, tokens, targets):
            return super().forward(tokens, targets) * math.inf

    tokens = torch.zeros(2, 8, dtype=torch.int64)
    with pytest.raises(NotFinite, match=r"20 steps in a row, up to step 20, .*scale has sunk to 0\.0625 and float16"):
        train(
            Blowing(tiny_gpt), [(tokens, tokens)], [], LoopSettings(99, precision="16-mixed"), [FiniteGuard()],
            scaler=torch.amp.GradScaler("cpu"),
        )  # fmt: skip


def test_only_steps_left_out_in_a_row_count(tiny_gpt):
    training, guard = training_of(LitNanoGPT(tiny_gpt)), FiniteGuard()
    guard.on_train_start(training)
    for step in range(1, 100):
        training.schedule.skipped_steps += step % guards.IN_A_ROW != 0
        guard.on_step_end(step, 0.1, None)
    guard.on_step_end(100, 0.1, None)  # nothing new is skipped


def test_weights_that_are_not_finite_are_not_saved_over_those_that_are(text, tmp_path):
    assert fit(*small_run(text, tmp_path, "--trainer.max_steps=2")) == 0
    path = tmp_path / "version_0" / LAST
    before, state = path.read_bytes(), load_run(path)
    state.weights["gpt.transformer.ln_f.weight"][3] = math.inf
    with pytest.raises(ValueError, match=r"gpt\.transformer\.ln_f\.weight holds numbers that are not finite"):
        save_run(path, state)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.glob("*.partial")] == []


Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize("found_out", ["before writing", "while writing"])
@pytest.mark.parametrize("loop", LOOPS)
def test_a_full_disk_does_not_end_the_run_which_saves_again_when_there_is_room(
    loop, found_out, text, tmp_path, monkeypatch, capsys
):
    """Full at the validation after step 4 alone, of those after 2, 4 and 6."""
    last = tmp_path / LOOPS[loop] / LAST

    usage, fsync = shutil.disk_usage, durable.os.fsync

    def failing_fsync(descriptor):
        if state_of_disk["full"]:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    state_of_disk = {"full": False}
    original = disk.BestEffortSaver.save

    def at_step_four(self, path, state):
        state_of_disk["full"] = state.step == 4
        return original(self, path, state)

    monkeypatch.setattr(disk.BestEffortSaver, "save", at_step_four)
    if found_out == "before writing":
        monkeypatch.setattr(
            durable.shutil, "disk_usage", lambda folder: Usage(9, 9, 10) if state_of_disk["full"] else usage(folder)
        )
    else:
        monkeypatch.setattr(durable.os, "fsync", failing_fsync)
    assert loop(*six_steps(text, tmp_path)) == 0
    err = capsys.readouterr().err
    assert err.count("warning: ") == 1  # though best and last were tried
    assert "could not be saved at step 4: " in err
    assert ("MiB left" if found_out == "before writing" else "No space left") in err
    assert "is saved again, at step 6" in err
    assert load_run(last).step == 6
    assert load_run(last.with_stem("previous")).step == 2
    assert not list(last.parent.glob("*.partial"))
