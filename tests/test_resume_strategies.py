"""Resuming by itself with other strategies than DDP on one machine: it works to the same bits, or is refused before."""

import os
from functools import partial
from pathlib import Path

import pytest
import torch
from small_runs import LOOPS, accelerate, curves, different, fit, on_two_processes, small_run

from nanogpt_lit.checkpoint.foreign_files import read_torch_file
from nanogpt_lit.module import LitNanoGPT
from nanogpt_lit.parity.record import leaves, same
from nanogpt_lit.run import guards
from nanogpt_lit.runtime import launch

LAST = "checkpoints/last.safetensors"
FSDP2 = "--trainer.strategy=ModelParallelStrategy", "--trainer.devices=1"
SHARDED = (
    "--trainer.strategy=ModelParallelStrategy", "--trainer.strategy.save_distributed_checkpoint=true",
    "--trainer.devices=1",
)  # fmt: skip


class PowerLoss(Exception):  # noqa: N818
    pass


@pytest.mark.slow
@pytest.mark.parametrize("told_by", ["--resume=auto", "SLURM"])
def test_a_sharded_run_that_crashed_goes_on_by_itself_to_the_same_bits(told_by, text, tmp_path, monkeypatch, capsys):
    assert fit(*small_run(text, tmp_path / "whole", *FSDP2)) == 0
    forward, calls = LitNanoGPT.forward, iter(range(1, 10**6))

    def failing(self, tokens, targets):
        if next(calls) == 17:
            raise PowerLoss
        return forward(self, tokens, targets)

    with monkeypatch.context() as patch:
        patch.setattr(LitNanoGPT, "forward", failing)
        with pytest.raises(PowerLoss):
            fit(*small_run(text, tmp_path / "cut", *FSDP2))
    last = tmp_path / "cut/version_0/checkpoints/last.ckpt"
    assert read_torch_file(last)["global_step"] == 6
    assert read_torch_file(last.with_stem("previous"))["global_step"] == 4
    last.write_bytes(last.read_bytes()[:-9])  # the power went while it was written
    if told_by == "SLURM":
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    capsys.readouterr()
    assert fit(*small_run(text, tmp_path / "cut", *FSDP2), *([told_by] if told_by != "SLURM" else [])) == 0
    out = capsys.readouterr().out
    assert f"going on from {last.with_stem('best')}, step 6" in out
    ends = (read_torch_file(tmp_path / root / "version_0/checkpoints/last.ckpt") for root in ("whole", "cut"))
    whole, cut = (
        dict(leaves("", {"weights": end["state_dict"], "optimizer": end["optimizer_states"]})) for end in ends
    )
    assert whole.keys() == cut.keys()
    assert [name for name, value in whole.items() if not same(value, cut[name])] == []


@pytest.mark.parametrize(
    ("variable", "value", "option", "who"),
    [
        ("SLURM_RESTART_COUNT", "1", [], "a job queued again"),
        ("NANOGPT_LIT_SUPERVISED", ".", ["--resume=auto"], "fit --keep-alive"),
        ("NOTHING", "1", ["--resume=auto"], "resume=auto"),
    ],
)
def test_a_strategy_whose_checkpoints_no_start_finds_is_refused_before_anything_is_made(
    variable, value, option, who, text, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(variable, value)
    monkeypatch.setattr(launch, "stop_with_supervisor", lambda: None)
    assert fit(*small_run(text, tmp_path / "root", *SHARDED), *option) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {who} goes on from the newest checkpoint")
    assert not (tmp_path / "root").exists()


def test_checkpoints_of_another_strategy_do_not_start_a_run_anew(text, tmp_path, capsys):
    checkpoint = tmp_path / "version_0/checkpoints/last.ckpt"
    checkpoint.parent.mkdir(parents=True)
    torch.save({"global_step": 3}, checkpoint)
    assert fit(*small_run(text, tmp_path), "--resume=auto") == 2
    assert f"the checkpoints in {tmp_path / 'version_0'} are of another trainer.strategy" in capsys.readouterr().err


def on_a_disk_of_its_own(loop, *arguments):
    """default_root_dir is another folder on each of the processes."""
    root, *more = arguments
    return loop(f"{root}_{os.environ['RANK']}", *more)


@pytest.mark.slow
@pytest.mark.parametrize("loop", [fit, accelerate])
def test_machines_without_a_common_disk_go_on_from_the_checkpoint_of_the_first(loop, text, tmp_path):
    on_its_own = partial(on_a_disk_of_its_own, loop)
    ddp = "--trainer.strategy=ddp", "--trainer.devices=2"
    whole, cut = (small_run(text, tmp_path / name, *ddp) for name in ("whole", "cut"))
    assert on_two_processes(on_its_own, *whole) == [(0, []), (0, [])]
    assert on_two_processes(on_its_own, *cut, "--trainer.max_time=00:00:00:00") == [(0, []), (0, [])]  # after a step
    assert not list(Path(f"{tmp_path}/cut_1").rglob("*.safetensors"))
    assert on_two_processes(on_its_own, *cut, "--resume=auto") == [(0, []), (0, [])]
    assert not different(*(Path(f"{tmp_path}/{name}_0") / LOOPS[loop] / LAST for name in ("whole", "cut")))


def with_a_jump(loop, *arguments):
    """The loss of step 5, of two micro-batches, is ten times as large; step 4 was saved."""
    guards.RECENT = 4
    forward, calls = LitNanoGPT.forward, iter(range(1, 10**6))

    def high(self, tokens, targets):
        loss = forward(self, tokens, targets)
        return loss * 10 if self.training and next(calls) in (9, 10) else loss

    LitNanoGPT.forward = high  # in a process of its own
    return loop(*arguments)


@pytest.mark.slow
@pytest.mark.parametrize("loop", [fit, accelerate])
def test_machines_without_a_common_disk_go_back_from_a_jump_together(loop, text, tmp_path):
    ddp = ["--trainer.strategy=ddp", "--trainer.devices=2", "--spike_factor=2", "--model.schedule.warmup_steps=0"]
    common, own = (small_run(text, tmp_path / name, *ddp) for name in ("common", "own"))
    assert on_two_processes(partial(with_a_jump, loop), *common) == [(0, []), (0, [])]
    assert on_two_processes(partial(with_a_jump, partial(on_a_disk_of_its_own, loop)), *own) == [(0, []), (0, [])]
    folders = [tmp_path / "common" / LOOPS[loop], Path(f"{tmp_path}/own_0") / LOOPS[loop]]
    assert [curves(folder)["train/rollbacks", 8] for folder in folders] == [1, 1]
    assert not different(*(folder / LAST for folder in folders))


@pytest.mark.slow
@pytest.mark.parametrize("loop", [fit, accelerate])
def test_processes_that_find_their_run_complete_end_together(loop, text, tmp_path):
    options = small_run(text, tmp_path, "--trainer.strategy=ddp", "--trainer.devices=2", "--trainer.max_steps=2")
    for more in ([], ["--resume=auto"]):
        assert on_two_processes(loop, *options, *more) == [(0, []), (0, [])]
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [LOOPS[loop]]
