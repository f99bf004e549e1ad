"""A checkpoint that is written beside the training: it is of one step, and what goes wrong with it is not lost."""

import json
import sys
import threading
import time

import pytest
import torch
from small_runs import LOOPS, different, small_run

from nanogpt_lit.checkpoint import disk, run_file
from nanogpt_lit.checkpoint.disk import BestEffortSaver
from nanogpt_lit.checkpoint.run_file import load_run, save_run
from nanogpt_lit.checkpoint.state import RunState
from nanogpt_lit.errors import UserError
from nanogpt_lit.module import LitNanoGPT

LAST = "checkpoints/last.safetensors"


def run_state(step, **tensors):
    return RunState(tensors, {}, {}, {}, {}, None, [], step, step, 1, 1)


@pytest.mark.parametrize("loop", LOOPS)
def test_the_batches_that_follow_do_not_wait_for_the_disk_and_the_next_step_does(loop, text, tmp_path, monkeypatch):
    """The writer here takes nothing until the last micro-batch of the next step has been through the network."""
    with monkeypatch.context() as patch:  # what is compared with must not be torn itself: its saves are waited for
        patch.setattr(BestEffortSaver, "in_background", property(lambda self: False, lambda *_: None), raising=False)
        assert loop(*small_run(text, tmp_path / "undisturbed", "--trainer.max_steps=4")) == 0

    went_through, stepped, waits = threading.Event(), threading.Event(), []
    forward, write_tensors = LitNanoGPT.forward, run_file.write_tensors

    def noted(self, tokens, targets):
        loss = forward(self, tokens, targets)
        noted.calls += self.training
        if noted.calls == 6:  # steps of 2, and that of step 2 is saved
            went_through.set()
        if noted.calls == 7:
            stepped.set()
        return loss

    noted.calls = 0

    def slow(file, tensors, metadata):
        waits.append(went_through.wait(20))
        stepped.wait(0.5)  # in vain: the step waits for us
        write_tensors(file, tensors, metadata)

    monkeypatch.setattr(LitNanoGPT, "forward", noted)
    monkeypatch.setattr(run_file, "write_tensors", slow)
    assert loop(*small_run(text, tmp_path / "slow", "--trainer.max_steps=4")) == 0
    assert waits
    assert all(waits)
    for name in ("last", "previous"):
        paths = [(tmp_path / root / LOOPS[loop] / LAST).with_stem(name) for root in ("undisturbed", "slow")]
        assert load_run(paths[0]).step == {"last": 4, "previous": 2}[name]
        assert not different(*paths)


def test_what_is_not_the_disks_fault_comes_to_light_and_the_next_save_goes_on(tmp_path, monkeypatch):
    saver = BestEffortSaver()
    saver.in_background = True
    monkeypatch.setattr(run_file, "write_tensors", lambda *_: 1 // 0)
    saver.save(tmp_path / "last.safetensors", run_state(1, w=torch.ones(3)))
    with pytest.raises(ZeroDivisionError):
        saver.wait()
    monkeypatch.undo()
    saver.save(tmp_path / "last.safetensors", run_state(2, w=torch.ones(3)))
    saver.wait()
    assert load_run(tmp_path / "last.safetensors").step == 2
    assert not saver.failing


def test_nobody_has_to_wait_for_a_saver_that_is_not_in_the_background(tmp_path):
    saver = BestEffortSaver()
    for step in (1, 2):
        saver.save(tmp_path / "last.safetensors", run_state(step, w=torch.full((9,), float(step))))
        assert load_run(tmp_path / "last.safetensors").step == step


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused_before_anything_is_written(tmp_path, bad):
    weights = {"counts": torch.arange(3), "empty": torch.empty(0), "w": torch.zeros(2, 3)}
    saver = BestEffortSaver()
    saver.save(tmp_path / "last.safetensors", run_state(1, **weights))
    weights["w"][1, 2] = bad
    with pytest.raises(ValueError, match="w holds numbers that are not finite"):
        saver.save(tmp_path / "last.safetensors", run_state(2, **weights))
    assert load_run(tmp_path / "last.safetensors").step == 1


class Full:
    def write(self, text):
        raise OSError(28, "No space left on device")

    flush = write


def test_a_full_disk_that_takes_no_warning_either_ends_nothing(tmp_path, monkeypatch):
    saver = BestEffortSaver()
    monkeypatch.setattr(sys, "stderr", Full())
    with monkeypatch.context() as patch:
        patch.setattr(run_file, "write_tensors", lambda file, *_: Full().write(file))
        saver.save(tmp_path / "last.safetensors", run_state(1, w=torch.ones(3)))
        assert saver.failing
    saver.save(tmp_path / "last.safetensors", run_state(2, w=torch.ones(3)))
    assert not saver.failing
    assert load_run(tmp_path / "last.safetensors").step == 2


@pytest.fixture
def quick(monkeypatch):
    for name, seconds in (("PAUSE_S", 0.05), ("END_S", 0.3), ("STOP_S", 0.3)):
        monkeypatch.setattr(disk, name, seconds)


def full_disk(monkeypatch, *, from_step, tries=10**6):
    """The disk takes no checkpoint of that step or a later one, so many times."""
    write, left = run_file.RunContent.write, iter(range(tries))

    def fails(self, path, shards):
        if json.loads(self.description)["step"] >= from_step and next(left, None) is not None:
            raise OSError(28, "No space left on device")
        return write(self, path, shards)

    monkeypatch.setattr(run_file.RunContent, "write", fails)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_disk_that_is_full_at_the_end_is_no_success_and_the_table_names_what_there_is(
    loop, quick, text, tmp_path, monkeypatch, capsys
):
    full_disk(monkeypatch, from_step=6)
    assert loop(*small_run(text, tmp_path)) == 2
    out, err = capsys.readouterr()
    last = tmp_path / LOOPS[loop] / LAST
    assert f"last checkpoint  {last} (step 4)\n" in out
    assert f"best checkpoint  {last.with_stem('best')} (step 4)\n" in out
    error = err.splitlines()[-1]
    assert error.startswith("error: the run ended at step 8 and ")
    assert "--resume auto repeats the steps since the last checkpoint" in error


@pytest.mark.parametrize("loop", LOOPS)
def test_at_the_end_a_full_disk_is_tried_again_until_there_is_room(loop, quick, text, tmp_path, monkeypatch):
    assert loop(*small_run(text, tmp_path / "undisturbed")) == 0
    full_disk(monkeypatch, from_step=8, tries=5)
    assert loop(*small_run(text, tmp_path / "full")) == 0
    for name in ("last", "best"):
        paths = [(tmp_path / root / LOOPS[loop] / LAST).with_stem(name) for root in ("undisturbed", "full")]
        assert not different(*paths)


def test_a_signal_cuts_the_patience_at_the_end_short_after_one_more_try(tmp_path, monkeypatch):
    full_disk(monkeypatch, from_step=1)
    saver, started_s = BestEffortSaver(), time.monotonic()
    saver.save(tmp_path / "last.safetensors", run_state(1, w=torch.ones(3)))
    with pytest.raises(UserError, match="the disk took nothing for 0 s"):
        saver.insist(300.0, asked_to_stop=lambda: True)
    assert time.monotonic() - started_s < 30
    monkeypatch.undo()
    saver.insist(300.0, asked_to_stop=lambda: True)
    assert load_run(tmp_path / "last.safetensors").step == 1


@pytest.mark.parametrize("n_tensors", [1, 200])
def test_a_checkpoint_takes_about_as_much_of_the_disk_as_is_asked_for(n_tensors, tmp_path):
    state = run_state(1, **{f"w{n}": torch.ones(1000) for n in range(n_tensors)})
    save_run(tmp_path / "x.safetensors", state)
    size, told = (tmp_path / "x.safetensors").stat().st_size, run_file.RunContent.of(state).nbytes
    assert size <= told <= size + 512 * (n_tensors + 2)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_stop_in_peace_that_the_disk_does_not_take_is_no_success_either(
    loop, quick, text, tmp_path, monkeypatch, capsys
):
    full_disk(monkeypatch, from_step=3)
    forward = LitNanoGPT.forward

    def stops(self, tokens, targets):
        (tmp_path / LOOPS[loop] / "stop").touch()
        return forward(self, tokens, targets)

    monkeypatch.setattr(LitNanoGPT, "forward", stops)
    assert loop(*small_run(text, tmp_path, "--trainer.val_check_interval=100")) == 0
    assert "after step 1; saved" in capsys.readouterr().out
    assert loop(*small_run(text, tmp_path, "--trainer.val_check_interval=100"), "--resume=auto") == 0
    assert loop(*small_run(text, tmp_path, "--trainer.val_check_interval=100"), "--resume=auto") == 2
    assert "after step 3; nothing was saved: the disk took no checkpoint" in capsys.readouterr().out
    assert load_run(tmp_path / LOOPS[loop] / LAST).step == 2
