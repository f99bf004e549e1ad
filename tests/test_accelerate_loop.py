"""The accelerate loop as a user starts it: beside fit, from the same options, to the same files."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import accelerate, different, fit, on_two_processes, small_run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nanogpt_lit.__main__ import main
from nanogpt_lit.loops.accelerate_environment import check_environment, check_processes, check_running

SCRIPT = Path(__file__).parents[1] / "scripts" / "train_accelerate.py"


@pytest.fixture(autouse=True)
def _nothing_asked_for(monkeypatch):
    for variable in ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)


def five_steps(text, root):
    return small_run(
        text, root, "--trainer.max_steps=5", "--trainer.val_check_interval=6", "--trainer.limit_val_batches=0.5",
        "--trainer.callbacks.prompt=9 b", f"--data.shards_dir={root / 'shards'}",
    )  # fmt: skip


@pytest.fixture
def options(text, tmp_path):
    return five_steps(text, tmp_path / "root")


@pytest.fixture(scope="module")
def both(text, tmp_path_factory):
    """The folder of one run by fit and one by accelerate, with bf16 for good measure."""
    root = tmp_path_factory.mktemp("both")
    assert main(["fit", *five_steps(text, root), "--trainer.precision=bf16-mixed"]) == 0
    assert accelerate(*five_steps(text, root), "--trainer.precision=bf16-mixed") == 0
    return root


def events_of(folder):
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()


def assert_same_curves(root):
    fit, accelerate = events_of(root / "version_0"), events_of(root / "accelerate_0")
    assert set(fit.Tags()["scalars"]) == set(accelerate.Tags()["scalars"])
    assert set(fit.Tags()["tensors"]) == set(accelerate.Tags()["tensors"])
    samples = [
        [e.tensor_proto.string_val for e in events.Tensors("sample/text_summary")] for events in (fit, accelerate)
    ]
    assert samples[0] == samples[1]
    assert samples[0][0][0].startswith(b"    9 b")
    for tag in set(fit.Tags()["scalars"]) - {"throughput/tokens_per_s", "throughput/trained_hours"}:
        points = [[(e.step, e.value) for e in events.Scalars(tag)] for events in (fit, accelerate)]
        assert points[0] == points[1], tag
    assert [e.step for e in accelerate.Scalars("val/loss")] == [3, 5]


def test_fit_and_accelerate_draw_the_same_curves(both):
    assert_same_curves(both)


@pytest.mark.parametrize("name", ["best.safetensors", "last.safetensors"])
def test_fit_and_accelerate_save_the_same_weights_and_states(both, name):
    assert_same_weights(both, name)


def assert_same_weights(root, name):
    fit, accelerate = (root / run / "checkpoints" / name for run in ("version_0", "accelerate_0"))
    assert not different(fit, accelerate)


def test_generate_and_validate_read_what_accelerate_saved(both, text, capsys):
    last = both / "accelerate_0" / "checkpoints" / "last.safetensors"
    assert main(["generate", f"--ckpt={last}", "--prompt=9", "--max-new-tokens=5"]) == 0
    assert capsys.readouterr().out.startswith("9")
    expected = events_of(both / "accelerate_0").Scalars("val/loss")[-1].value
    bf16 = "--trainer.precision=bf16-mixed"
    assert main(["validate", *five_steps(text, both), bf16, f"--ckpt_path={last}"]) == 0
    assert f"validation loss {expected:.4f}" in capsys.readouterr().out


def test_it_closes_with_the_same_table_and_leaves_the_same_files(options, tmp_path, capsys):
    assert accelerate(*options) == 0
    out, root = capsys.readouterr().out, tmp_path / "root"
    for expected in (
        r"steps +5\b",
        r"tokens +320\b",
        r"validation loss +\d\.\d{4}, perplexity",
        r"best +\d\.\d+ at step",
    ):
        assert re.search(expected, out), expected
    assert Path(re.search(r"best checkpoint +(\S+)", out)[1]).is_file()
    assert {p.name for p in root.iterdir() if p.suffix != ".lock"} == {"shards", "accelerate_0"}
    assert {p.stem for p in (root / "accelerate_0" / "checkpoints").iterdir()} == {"best", "last", "previous"}
    assert "block_size: 16" in (root / "accelerate_0" / "config.yaml").read_text()


def test_without_a_gpu_16_mixed_says_what_it_falls_back_to(options, capsys):
    assert accelerate(*options, "--trainer.precision=16-mixed", "--trainer.max_steps=1") == 0
    out = capsys.readouterr().out
    assert "16-mixed needs a GPU and there is none, training in 32-true" in out
    assert "32-true on 1 x" in out


def test_accelerates_unset_precision_yields_to_the_yaml_and_says_so(options, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # what accelerate launch sets when nobody was asked
    assert accelerate(*options, "--trainer.precision=bf16-mixed", "--trainer.max_steps=1") == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "no mixed precision" in line]
    assert "bf16-mixed" in line


@pytest.mark.parametrize(
    ("environ", "sentence"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "ACCELERATE_MIXED_PRECISION=fp16.*trainer.precision=bf16-mixed"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "ACCELERATE_MIXED_PRECISION=fp8.*trainer.precision=bf16-mixed"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "7"}, "STEPS=7.*trainer.accumulate_grad_batches=4"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "ACCELERATE_USE_DEEPSPEED=true.*trainer.strategy=deepspeed_stage_2"),
        ({"ACCELERATE_USE_FSDP": "true"}, "ACCELERATE_USE_FSDP=true.*trainer.strategy=ModelParallelStrategy"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "ACCELERATE_DYNAMO_BACKEND=INDUCTOR.*model.compile"),
        ({"ACCELERATE_USE_CPU": "True"}, "ACCELERATE_USE_CPU=True.*trainer.accelerator comes to cuda"),
    ],
)
def test_an_environment_that_contradicts_the_yaml_is_refused_with_both_sides(environ, sentence):
    with pytest.raises(ValueError, match=sentence):
        check_environment("bf16-mixed", 4, "cuda", environ)


# What accelerate launch says beside FSDP.
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_OFFLOAD_PARAMS": "false", "FSDP_ACTIVATION_CHECKPOINTING": "false",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_TRANSFORMER_CLS_TO_WRAP": "GPTBlock",
}  # fmt: skip


@pytest.mark.parametrize(
    ("variable", "value", "works"),
    [
        ("FSDP_VERSION", "1", "ModelParallelStrategy"),
        ("FSDP_RESHARD_AFTER_FORWARD", "false", "ModelParallelStrategy"),
        ("FSDP_OFFLOAD_PARAMS", "true", "ModelParallelStrategy"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", "model.memory.recompute=full"),
    ],
)
def test_a_sharding_that_is_not_the_yamls_is_refused(variable, value, works):
    with pytest.raises(ValueError, match=f"{variable}={value}.*{works}"):
        check_environment("bf16-mixed", 4, "cuda", FSDP2 | {variable: value}, shards=True)


def test_an_environment_that_agrees_passes_in_silence():
    assert check_environment("bf16-mixed", 4, "cuda", FSDP2, shards=True) is None
    agreeing = {
        "ACCELERATE_MIXED_PRECISION": "fp16",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
        "ACCELERATE_DYNAMO_BACKEND": "NO",
        "ACCELERATE_USE_CPU": "False",
    }
    assert check_environment("16-mixed", 4, "cuda", agreeing) is None
    assert check_environment("32-true", 4, "cpu", {"ACCELERATE_MIXED_PRECISION": "no"}) is None


def test_another_number_of_processes_than_was_asked_for_is_refused():
    check_processes(None, 1)
    check_processes(2, 2)
    check_running(2, 2)
    with pytest.raises(ValueError, match="WORLD_SIZE=2 processes, and accelerate runs 1"):
        check_running(2, 1)
    with pytest.raises(ValueError, match=r"ask for 2 processes, and accelerate runs 1; .*torchrun --nproc_per_node 2"):
        check_processes(2, 1)


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("--trainer.devices=2", "ask for 2 processes, and accelerate runs 1"),
        ("--trainer.min_steps=3", "trainer.min_steps is set, and only Lightning's Trainer follows it"),
        ("--trainer.callbacks+=DeviceStatsMonitor", "trainer.callbacks holds lightning.pytorch.callbacks.DeviceStats"),
        ("--trainer.strategy=fsdp", "trainer.strategy=fsdp does not run here"),
        ("--trainer.strategy=ModelParallelStrategy", "over several processes, and accelerate runs 1"),
        ("--trainer.precision=64-true", "trainer.precision=64-true does not run here"),
        ("--trainer.val_check_interval=2.5", "trainer.val_check_interval=2.5 should be an integer"),
        ("--trainer.max_stepz=3", "no option trainer.max_stepz; did you mean trainer.max_steps?"),
        ("--model.gpt.n_head=3", "model.gpt.n_embd=8 does not divide into n_head=3 equal heads"),
    ],
)
def test_a_mistake_is_refused_in_one_sentence_and_starts_no_run(options, option, sentence, capsys, tmp_path):
    assert accelerate(*options, option) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert sentence in line
    assert not list((tmp_path / "root").glob("accelerate_*"))


@pytest.mark.long  # tests/test_parity.py has it of all three loops
def test_two_processes_give_the_bits_of_lightnings_two(options, tmp_path):
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    answer = subprocess.run([*torchrun, str(SCRIPT), *options], env=environ, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert on_two_processes(fit, *options, "--trainer.devices=2", "--trainer.strategy=ddp") == [(0, [])] * 2
    assert_same_curves(tmp_path / "root")
    assert_same_weights(tmp_path / "root", "last.safetensors")
    tokens = events_of(tmp_path / "root" / "accelerate_0").Scalars("train/tokens")
    assert [e.value for e in tokens] == [128.0 * step for step in range(1, 6)]  # of both processes


@pytest.mark.parametrize("rank", [0, 1])
def test_torchrun_with_another_number_of_processes_than_the_yaml_is_refused_before_they_meet(
    rank, options, tmp_path, capsys, monkeypatch
):
    """The other process is not there: whoever waited for it would wait until the time limit of the group."""
    started = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    for variable, value in (started | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}).items():
        monkeypatch.setenv(variable, value)
    assert accelerate(*options, "--trainer.devices=1") == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert "ask for 1 processes, and accelerate runs 2" in error
    assert not list((tmp_path / "root").glob("accelerate_*"))
