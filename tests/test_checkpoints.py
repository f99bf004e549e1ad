"""`last` is saved by time and by steps, whether or not a run validates."""

import pytest
from small_runs import LOOPS, accelerate, different, fit, on_two_processes, small_run

from nanogpt_lit.checkpoint.run_file import load_run
from nanogpt_lit.errors import UserError
from nanogpt_lit.module import LitNanoGPT
from nanogpt_lit.run.checkpoints import SaveTimes

LAST = "checkpoints/last.safetensors"


class PowerLoss(Exception):  # noqa: N818
    pass


def crash(loop, monkeypatch, forward_call, *options):
    forward, calls = LitNanoGPT.forward, iter(range(1, 10**6))

    def failing(self, tokens, targets):
        if next(calls) == forward_call:
            raise PowerLoss
        return forward(self, tokens, targets)

    with monkeypatch.context() as patch:
        patch.setattr(LitNanoGPT, "forward", failing)
        with pytest.raises(PowerLoss):
            loop(*options)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_run_without_validation_says_so_saves_and_goes_on_to_the_same_bits(loop, text, tmp_path, monkeypatch, capsys):
    options = "--trainer.limit_val_batches=0", "--checkpoint_every_steps=3"
    assert loop(*small_run(text, tmp_path / "whole", *options)) == 0
    out = capsys.readouterr().out
    whole = tmp_path / "whole" / LOOPS[loop] / LAST
    assert "checkpoints: trainer.limit_val_batches=0 validates nothing, so there is no best; last is saved " in out
    assert "every 15 minutes, every 3 steps and at the end\n" in out
    assert f"last checkpoint  {whole} (step 8)\n" in out
    assert "best checkpoint" not in out
    assert load_run(whole).step == 8
    assert load_run(whole.with_stem("previous")).step == 6
    crash(loop, monkeypatch, 15, *small_run(text, tmp_path / "cut", *options))  # in step 8
    last = tmp_path / "cut" / LOOPS[loop] / LAST
    assert load_run(last).step == 6
    assert loop(*small_run(text, tmp_path / "cut", *options), "--resume=auto") == 0
    assert not different(whole, last)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_run_is_saved_after_so_many_minutes_without_a_checkpoint(loop, text, tmp_path, monkeypatch):
    options = "--trainer.val_check_interval=100", "--checkpoint_every_minutes=1e-9"
    crash(loop, monkeypatch, 15, *small_run(text, tmp_path, *options))
    assert load_run(tmp_path / LOOPS[loop] / LAST).step == 7
    assert load_run((tmp_path / LOOPS[loop] / LAST).with_stem("previous")).step == 6


@pytest.mark.parametrize("loop", LOOPS)
def test_a_step_that_is_validated_is_saved_once_and_the_one_before_stays(loop, text, tmp_path):
    assert loop(*small_run(text, tmp_path), "--checkpoint_every_steps=4") == 0  # validated after every second
    assert load_run(tmp_path / LOOPS[loop] / LAST).step == 8
    assert load_run((tmp_path / LOOPS[loop] / LAST).with_stem("previous")).step == 6


@pytest.mark.slow
@pytest.mark.parametrize("loop", [fit, accelerate])
def test_two_processes_save_at_the_same_steps(loop, text, tmp_path):
    options = "--trainer.strategy=ddp", "--trainer.devices=2", "--trainer.limit_val_batches=0"
    ended = on_two_processes(loop, *small_run(text, tmp_path, *options), "--checkpoint_every_minutes=1e-9")
    assert ended == [(0, []), (0, [])]
    assert load_run(tmp_path / LOOPS[loop] / LAST).step == 8
    assert load_run((tmp_path / LOOPS[loop] / LAST).with_stem("previous")).step == 7


def test_minutes_are_counted_from_the_latest_checkpoint():
    now_s = 0.0
    times = SaveTimes(15, clock=lambda: now_s)
    now_s = 899
    assert not times.due(7)
    now_s = 900
    assert times.due(8)
    times.saved()
    assert not times.due(9)
    assert not SaveTimes(None, clock=lambda: 10.0**9).due(9)
    assert [step for step in range(1, 8) if SaveTimes(None, 3).due(step)] == [3, 6]


@pytest.mark.parametrize("key", ["checkpoint_every_minutes", "checkpoint_every_steps"])
def test_times_that_cannot_be_are_refused(key, text, tmp_path, capsys):
    assert fit(*small_run(text, tmp_path), f"--{key}=0") == 2
    assert f"error: {key}=0" in capsys.readouterr().err
    with pytest.raises(UserError):
        SaveTimes(-1)
