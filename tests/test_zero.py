"""DeepSpeed's ZeRO under both engines, on CPUs: the same bits from both, and DDP's but for the order of a norm's sum.

DeepSpeed is an extra, "deepspeed"; what needs it is left out where it is not installed.
"""

import math
import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from shutil import which

import pytest
import torch
import torch.distributed as dist
from small_runs import accelerate, different, fit, on_processes, on_two_processes, small_run
from test_parity import case

from nanogpt_lit.__main__ import main
from nanogpt_lit.checkpoint.run_file import load_run, step_of
from nanogpt_lit.data.datamodule import TokenDataModule
from nanogpt_lit.errors import UserError
from nanogpt_lit.loops.accelerate_environment import check_environment
from nanogpt_lit.loops.sharded import zero_config
from nanogpt_lit.module import LitNanoGPT
from nanogpt_lit.parity.brought_back import swapped
from nanogpt_lit.parity.processes import run_together
from nanogpt_lit.parity.record import FINAL, compare, distance, same
from nanogpt_lit.parity.runs import quiet, run_accelerate, run_lightning
from nanogpt_lit.runtime.processes import whole

needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason='pip install -e ".[deepspeed]"')
LAST = "checkpoints/last.safetensors"


@pytest.fixture(scope="module")
def data(text):
    data = TokenDataModule(
        str(text), "byte", val_fraction=0.1, shards_dir=str(text.parent / "of_zero"), block_size=8, batch_size=2
    )
    data.prepare_data()
    data.setup()
    return data


def stage(number):
    """DeepSpeed's configuration, of a stage 3 that keeps nothing whole between two uses."""
    nothing_whole = {"param_persistence_threshold": 0, "max_reuse_distance": 0, "max_live_parameters": 0}
    zero = {"stage": number} | ({f"stage3_{key}": value for key, value in nothing_whole.items()} if number == 3 else {})
    return {"zero_allow_untested_optimizer": True, "zero_optimization": zero}


class Overflows(LitNanoGPT):
    """Its third micro-batch has an infinite loss on one process."""

    micro_batches = 0

    def forward(self, tokens, targets):
        self.micro_batches += self.training
        return super().forward(tokens, targets) * (math.inf if (self.micro_batches, dist.get_rank()) == (3, 1) else 1)


def small(*arguments, **rest):
    it = case(*arguments, processes=2, **rest)
    return replace(it, gpt=replace(it.gpt, n_embd=16))  # of 8, AdamW's vectors of a line end elsewhere than a tensor's


ALIKE = [small(clip=None, zero=stage(n)) for n in (1, 2, 3)]
# Whatever it does on one process, all leave the step out; accumulation that DeepSpeed does by itself, and clipping.
ROUNDED = [
    replace(small(accumulate=2, zero=stage(2)), module=Overflows),
    small("bf16-mixed", 2, zero=stage(1)),
    small("bf16-mixed", 2, zero=stage(3)),
]


def both_engines(cases, data):
    """In each of two processes: where the engines differ, and by how much each number does from DDP's."""
    quiet()
    found = []
    for it in cases:
        runs = [run_accelerate(it, data).entries, run_lightning(it, data).entries]
        ddp = {(e.when, e.quantity): e.value for e in run_accelerate(replace(it, zero=None), data).entries}
        zero = {(e.when, e.quantity): whole(e.value) if torch.is_tensor(e.value) else e.value for e in runs[0]}
        assert zero.keys() == ddp.keys()
        # Of stage 3's weights nothing is here: they are compared in checkpoints.
        empty = {key for key, value in zero.items() if torch.is_tensor(value) and value.numel() == 0}
        in_pieces = it.zero["zero_optimization"]["stage"] == 3
        assert empty == ({key for key in zero if key[1].startswith("parameter ")} if in_pieces else set())
        zero = {key: value for key, value in zero.items() if key not in empty}
        found.append((compare(*runs), {key: distance(v, ddp[key]) for key, v in zero.items() if not same(v, ddp[key])}))
    return found


def from_ddp(quantity, differences):
    """By how much a quantity differs at most, infinite where the two have no distance, as tensors of other shapes."""
    found = (math.inf if v is None else v for (_, name), v in differences.items() if quantity in name)
    return max(found, default=0.0)


@needs_deepspeed
@pytest.mark.slow
def test_both_engines_train_by_zero_1_2_and_3_to_the_same_bits_and_unclipped_to_those_of_ddp(data):
    for of_rank in run_together(2, both_engines, ALIKE, data):
        for between, differences in of_rank:
            assert between is None
            assert {name for _, name in differences if not name.startswith("parameter")} <= {"gradient norm"}
            assert from_ddp("parameter", differences) == 0
            # ZeRO adds up the squares of each process's piece: some roundings of a norm of about one.
            assert from_ddp("gradient norm", differences) < 1e-6


@needs_deepspeed
@pytest.mark.long
def test_accumulated_clipped_and_with_a_step_left_out_zero_gives_both_engines_the_same_bits_and_nearly_ddps(data):
    for of_rank in run_together(2, both_engines, ROUNDED, data):
        for (between, differences), it in zip(of_rank, ROUNDED, strict=True):
            assert between is None
            # Gradients clipped by a norm that is rounded otherwise. In bfloat16 a weight that differs in its last bit
            # may be rounded the other way, by 2**-8, and stage 3 adds a bias after the product, not in it.
            bound = 2e-6 if it.settings.precision == "32-true" else 2e-3
            assert from_ddp("parameter", differences) < bound
            assert from_ddp("loss of", differences) < bound


@needs_deepspeed
@pytest.mark.long
def test_a_gradient_that_is_not_finite_leaves_a_step_out_as_in_every_loop(data):
    for of_rank in run_together(2, steps_left_out, [replace(it, module=Overflows) for it in ALIKE], data):
        assert of_rank == [(1, math.inf)] * 6


def steps_left_out(cases, data):
    quiet()
    found = []
    for it in cases:
        for loop in (run_accelerate, run_lightning):
            entries = {(e.when, e.quantity): e.value for e in loop(it, data).entries}
            found.append((entries[FINAL, "schedule skipped_steps"], float(entries["step 3", "gradient norm"])))
    return found


@needs_deepspeed
@pytest.mark.long
def test_lightning_by_itself_divides_the_loss_of_a_window_twice_under_deepspeed(data):
    for norm, by_itself in run_together(2, norms_with_and_without_ours, data):
        assert by_itself == pytest.approx(norm / 2, rel=1e-5)


def norms_with_and_without_ours(data):
    from lightning.pytorch.plugins.precision import DeepSpeedPrecision

    from nanogpt_lit.loops.lightning_sharded import ZeroPrecision

    quiet()
    it = small(accumulate=2, zero=stage(2))
    found = [run_lightning(it, data)]
    with swapped(ZeroPrecision, "backward", DeepSpeedPrecision.backward):
        found.append(run_lightning(it, data))
    return [next(float(e.value) for e in run.entries if e.quantity == "gradient norm") for run in found]


# What accelerate launch says beside DeepSpeed.
SAID = {
    "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2", "ACCELERATE_GRADIENT_CLIPPING": "0.5",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none", "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false", "ACCELERATE_CONFIG_DS_FIELDS": "zero_stage,mixed_precision",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4", "ACCELERATE_MIXED_PRECISION": "bf16",
}  # fmt: skip
YAMLS = {"stage": 2, "gradient_clip_val": 0.5}


def test_what_accelerate_launch_says_of_deepspeed_passes_in_silence_where_the_yaml_says_the_same():
    assert check_environment("bf16-mixed", 4, "cpu", SAID, zero=YAMLS) is None


@pytest.mark.parametrize(
    ("variable", "value", "works"),
    [
        ("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3", "trainer.strategy.stage=2"),
        ("ACCELERATE_GRADIENT_CLIPPING", "1.0", "trainer.gradient_clip_val=0.5"),
        ("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "cpu", "trainer.strategy.offload_optimizer=none"),
        ("ACCELERATE_DEEPSPEED_CONFIG_FILE", "a.json", "trainer.strategy.config=None"),
    ],
)
def test_a_deepspeed_that_is_not_the_yamls_is_refused(variable, value, works):
    with pytest.raises(UserError, match=f"{variable}={value}.*{works}"):
        check_environment("bf16-mixed", 4, "cpu", SAID | {variable: value}, zero=YAMLS)


@pytest.mark.parametrize(
    ("key", "works"),
    [("optimizer", "model.optim"), ("bf16", "trainer.precision"), ("gradient_clipping", "trainer.gradient_clip_val")],
)
def test_a_configuration_of_deepspeed_that_says_what_the_yaml_does_is_refused(key, works):
    with pytest.raises(UserError, match=f"trainer.strategy.config has {key}, which {works} says"):
        zero_config({**stage(2), key: {}})


# Checkpoints. Bits are one process's with two micro-batches, as in test_resume_strategies.py.
UNCLIPPED = (
    "--trainer.gradient_clip_val=100", "--trainer.limit_val_batches=3", "--model.gpt.dropout=0",
    "--model.gpt.n_embd=16",
)  # fmt: skip
OF_TWO = "--trainer.devices=2", "--trainer.accumulate_grad_batches=1", "--trainer.val_check_interval=2"
IN_PIECES = "--trainer.strategy=DeepSpeedStrategy", f"--trainer.strategy.config={stage(3)}"
CUT = "--trainer.max_time=00:00:00:00"


@needs_deepspeed
@pytest.mark.slow
def test_a_run_that_lightning_began_in_pieces_accelerate_goes_on_with_by_zero_1_to_the_bits_of_one_process(
    text, tmp_path
):
    whole, turns = (small_run(text, tmp_path / name, *UNCLIPPED) for name in ("whole", "turns"))
    assert fit(*whole) == 0
    assert on_two_processes(fit, *turns, *OF_TWO, *IN_PIECES, CUT) == [(0, [])] * 2
    last = tmp_path / "turns/version_0" / LAST
    assert step_of(last) == 1
    on_two = on_two_processes(accelerate, *turns, *OF_TWO, "--trainer.strategy=deepspeed_stage_1", "--resume=auto")
    assert on_two == [(0, [])] * 2
    assert_same_weights_and_moments(last, tmp_path / "whole/version_0" / LAST)


def assert_same_weights_and_moments(path, expected):
    run, its = load_run(path), load_run(expected)
    assert [name for name in its.weights if not torch.equal(run.weights[name], its.weights[name])] == []
    for number, kept in its.optimizer["state"].items():
        assert [key for key in kept if not torch.equal(run.optimizer["state"][number][key], kept[key])] == []


@needs_deepspeed
@pytest.mark.long
def test_accelerate_launch_starts_on_cpus_what_the_file_of_accelerate_config_says(text, tmp_path, capsys):
    options = small_run(
        text, tmp_path, *OF_TWO, "--trainer.strategy=deepspeed_stage_2", "--trainer.precision=bf16-mixed"
    )
    quickstart = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
    assert main(["accelerate-config", f"--from={quickstart}", *options]) == 0
    (file := tmp_path / "default_config.yaml").write_text(capsys.readouterr().out)
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(file), "-m", "nanogpt_lit", "fit-accelerate"]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    answer = subprocess.run(
        [sys.executable, *launch, *options], env=environ, capture_output=True, text=True, timeout=300
    )
    assert answer.returncode == 0, answer.stderr
    assert "also says" not in answer.stdout  # every word of accelerate's is known
    assert on_two_processes(fit, *options) == [(0, [])] * 2
    assert not different(*(tmp_path / name / LAST for name in ("accelerate_0", "version_0")))


@needs_deepspeed
@pytest.mark.skipif(which("g++") is None, reason="DeepSpeed compiles its optimizer for the CPU with g++ and ninja")
@pytest.mark.long
@pytest.mark.parametrize("number", [2, 3])
def test_what_deepspeed_offloads_goes_on_in_the_other_engine_to_the_same_bits(number, text, tmp_path):
    offloads = [
        f"--trainer.strategy=deepspeed_stage_{number}_offload", "--trust=deepspeed",
        "--model.optim.class_path=deepspeed.ops.adam.DeepSpeedCPUAdam",
    ]  # fmt: skip
    whole, turns = (small_run(text, tmp_path / name, *UNCLIPPED, *OF_TWO, *offloads) for name in ("whole", "turns"))
    assert on_two_processes(accelerate, *whole) == [(0, [])] * 2
    assert on_two_processes(fit, *turns, CUT) == [(0, [])] * 2
    assert on_two_processes(accelerate, *turns, "--resume=auto") == [(0, [])] * 2
    assert not different(tmp_path / "turns/version_0" / LAST, tmp_path / "whole/accelerate_0" / LAST)


@needs_deepspeed
@pytest.mark.long
@pytest.mark.parametrize("count", [2, 3])
def test_a_run_goes_from_any_strategy_to_any_other_and_back_by_either_engine(count, text, tmp_path):
    of_several = f"--trainer.devices={count}", "--trainer.accumulate_grad_batches=2", "--trainer.val_check_interval=4"
    of_one = (
        "--trainer.devices=1",
        f"--trainer.accumulate_grad_batches={2 * count}",
        f"--trainer.val_check_interval={4 * count}",
    )
    whole, turns = (small_run(text, tmp_path / name, *UNCLIPPED) for name in ("whole", "turns"))
    assert fit(*whole, *of_one) == 0
    steps = [
        (fit, "deepspeed_stage_3"), (accelerate, "ModelParallelStrategy"), (fit, "deepspeed_stage_2"),
        (fit, "ddp"), (accelerate, IN_PIECES), (fit, "auto"), (fit, IN_PIECES), (accelerate, "deepspeed_stage_2"),
    ]  # fmt: skip
    for number, (loop, strategy) in enumerate(steps):
        named = [f"--trainer.strategy={strategy}"] if isinstance(strategy, str) else strategy
        stops = ["--resume=auto", *([] if number == len(steps) - 1 else [CUT])]
        if strategy == "auto":
            assert fit(*turns, *of_one, *stops) == 0
        else:
            assert on_processes(count, loop, *turns, *of_several, *named, *stops) == [(0, [])] * count
        assert step_of(tmp_path / "turns/version_0" / LAST) == number + 1
    run, its = (load_run(tmp_path / name / "version_0" / LAST).weights for name in ("turns", "whole"))
    # Micro-batches are added up in other orders: some roundings of weights of about 0.02, through AdamW's first steps.
    assert max(distance(run[name], its[name]) for name in its) < 2e-6
