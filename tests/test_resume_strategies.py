"""Resuming by itself with other strategies than DDP on one machine: it works to the same bits, or is refused before."""

import os
from functools import partial
from pathlib import Path

import pytest
import torch
from small_runs import LOOPS, accelerate, curves, different, fit, on_processes, on_two_processes, small_run

from nanogpt_lit.checkpoint.run_file import load_run, step_of
from nanogpt_lit.module import LitNanoGPT
from nanogpt_lit.run import guards
from nanogpt_lit.runtime import launch

LAST = "checkpoints/last.safetensors"
FSDP2 = "--trainer.strategy=ModelParallelStrategy"
SHARDS = LAST.replace("last.safetensors", "step_{}-*.shards")


class PowerLoss(Exception):  # noqa: N818
    pass


@pytest.mark.slow
@pytest.mark.parametrize("told_by", ["SLURM", "--ckpt_path"])
def test_a_sharded_run_that_crashed_goes_on_to_the_same_bits(told_by, text, tmp_path, monkeypatch, capsys):
    one = FSDP2, "--trainer.devices=1"
    assert fit(*small_run(text, tmp_path / "whole", *one)) == 0
    forward, calls = LitNanoGPT.forward, iter(range(1, 10**6))

    def failing(self, tokens, targets):
        if next(calls) == 17:
            raise PowerLoss
        return forward(self, tokens, targets)

    with monkeypatch.context() as patch:
        patch.setattr(LitNanoGPT, "forward", failing)
        with pytest.raises(PowerLoss):
            fit(*small_run(text, tmp_path / "cut", *one))
    last = tmp_path / "cut/version_0" / LAST
    previous = last.with_stem("previous")
    assert (step_of(last), step_of(previous)) == (6, 4)
    (shards,) = last.parents[1].glob(SHARDS.format(6))
    (shards / "0.safetensors").write_bytes((shards / "0.safetensors").read_bytes()[:-9])  # as a power loss might
    if told_by == "SLURM":
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    options = [] if told_by == "SLURM" else [f"--ckpt_path={previous}"]
    capsys.readouterr()
    assert fit(*small_run(text, tmp_path / "cut", *one), *options) == 0
    if told_by != "--ckpt_path":
        assert f"going on from {previous}, step 4" in capsys.readouterr().out
    version = "version_1" if told_by == "--ckpt_path" else "version_0"
    assert not different(tmp_path / "whole/version_0" / LAST, tmp_path / "cut" / version / LAST)


# Bits are one process's with two micro-batches as long as nothing is clipped, no mask of dropout is drawn, and matrices
# that FSDP2 lays out one behind the other begin where MKL has no other order for their sums.
ALIKE = (
    "--trainer.gradient_clip_val=100", "--trainer.limit_val_batches=3", "--model.gpt.dropout=0",
    "--model.gpt.n_embd=16",
)  # fmt: skip
OF_TWO = FSDP2, "--trainer.devices=2", "--trainer.accumulate_grad_batches=1", "--trainer.val_check_interval=2"


@pytest.mark.slow
def test_two_processes_that_shard_and_one_that_does_not_take_turns_in_a_run_to_the_bits_of_one(text, tmp_path):
    whole, turns = (small_run(text, tmp_path / name, *ALIKE) for name in ("whole", "turns"))
    assert fit(*whole) == 0
    assert on_two_processes(fit, *turns, *OF_TWO, "--trainer.max_time=00:00:00:00") == [(0, [])] * 2
    last = tmp_path / "turns/version_0" / LAST
    assert step_of(last) == 1
    assert fit(*turns, "--resume=auto", "--checkpoint_every_steps=3", "--trainer.max_time=00:00:00:00") == 0
    assert step_of(last) == 2
    assert on_two_processes(fit, *turns, *OF_TWO, "--resume=auto") == [(0, [])] * 2
    (shards,) = last.parents[1].glob(SHARDS.format(8))
    assert sorted(path.name for path in shards.iterdir()) == ["0.safetensors", "1.safetensors"]
    weights, expected = load_run(last).weights, load_run(tmp_path / "whole/version_0" / LAST).weights
    assert [name for name in expected if not torch.equal(weights[name], expected[name])] == []


@pytest.mark.slow
def test_a_sharded_run_that_lightning_began_accelerate_goes_on_with_to_the_same_bits(text, tmp_path):
    whole, begun = (small_run(text, tmp_path / name, *OF_TWO) for name in ("whole", "begun"))
    assert on_two_processes(fit, *whole) == [(0, [])] * 2
    assert on_two_processes(fit, *begun, "--trainer.max_time=00:00:00:00") == [(0, [])] * 2
    assert on_two_processes(accelerate, *begun, "--resume=auto") == [(0, [])] * 2
    assert not different(*(tmp_path / name / "version_0" / LAST for name in ("whole", "begun")))


@pytest.mark.long
def test_a_run_goes_from_every_strategy_to_every_other(text, tmp_path):
    steps = [FSDP2, "ddp", FSDP2, "auto", FSDP2, "ddp"]
    processes = [2, 3, 3, 1, 2, 2]
    whole, turns = (small_run(text, tmp_path / name, *ALIKE, "--trainer.max_steps=6") for name in ("whole", "turns"))
    assert fit(*whole, "--trainer.accumulate_grad_batches=6", "--trainer.val_check_interval=6") == 0
    for step, (strategy, count) in enumerate(zip(steps, processes, strict=True), 1):
        batches = 6 // count
        piece = [
            f"--trainer.strategy={strategy}" if strategy != FSDP2 else FSDP2, f"--trainer.devices={count}",
            f"--trainer.accumulate_grad_batches={batches}", f"--trainer.val_check_interval={batches}",
            "--resume=auto", "--trainer.max_time=00:00:00:00",
        ]  # fmt: skip
        codes = [(fit(*turns, *piece), [])] if count == 1 else on_processes(count, fit, *turns, *piece)
        assert codes == [(0, [])] * count
        assert step_of(tmp_path / "turns/version_0" / LAST) == step
    weights, expected = (load_run(tmp_path / name / "version_0" / LAST).weights for name in ("turns", "whole"))
    for name in expected:
        # Gradients are added up in another order by each strategy: some roundings of float32 a step.
        assert torch.allclose(weights[name], expected[name], rtol=1e-4, atol=1e-6), name


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
    assert fit(*small_run(text, tmp_path / "root", "--trainer.strategy=fsdp"), *option) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {who} goes on from the newest checkpoint")
    assert not (tmp_path / "root").exists()


def test_checkpoints_of_another_strategy_do_not_start_a_run_anew(text, tmp_path, capsys):
    checkpoint = tmp_path / "version_0/checkpoints/last.ckpt"
    checkpoint.parent.mkdir(parents=True)
    torch.save({"global_step": 3}, checkpoint)
    assert fit(*small_run(text, tmp_path), "--resume=auto") == 2
    assert f"{checkpoint} is a checkpoint of another trainer.strategy" in capsys.readouterr().err


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
