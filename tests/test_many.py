"""The plan of several devices, against what is counted by hand; PyTorch's own allocator is asked in tests/fake_gpu."""

import json
import math
import re
from pathlib import Path

import pytest
import torch

from nanogpt_lit.__main__ import main
from nanogpt_lit.cli.settings import SettingsCLI
from nanogpt_lit.errors import UserError
from nanogpt_lit.gpt.gpt2 import GPTConfig
from nanogpt_lit.module import LitNanoGPT
from nanogpt_lit.plan.allocator import MIB, Event, replay, rounded
from nanogpt_lit.plan.budget import gpu_named
from nanogpt_lit.plan.command import own_rung, plan_rung, step_shape
from nanogpt_lit.plan.kernels import Kernels, Roofline
from nanogpt_lit.plan.many import REACHED, Machines, Step, machines, report_many, step_of
from nanogpt_lit.plan.step import StepShape, trace_steps

L, C, V, T = 3, 64, 300, 32
BLOCK = 12 * C * C + 13 * C
ROOT = V * C + T * C + 2 * C
"""Parameters of a block, and of what is in none: embeddings, of which one is the head, and the last norm."""
H100 = gpu_named("h100")
FIT = [
    "--model.gpt.n_layer=1", "--model.gpt.n_head=2", "--model.gpt.n_embd=64", "--data.tokenizer=byte",
    "--data.block_size=64", "--data.batch_size=2", "--trainer.precision=bf16-mixed", "--trainer.max_steps=100",
]  # fmt: skip


def traced(strategy, devices, accumulate=1, lightning=True, **options):
    """The trace, and the bytes that are exchanged by collective."""
    shape = StepShape(
        2, T, V, accumulate, "32-true", strategy=strategy, devices=devices, zeroes_after_forward=lightning,
        validates=False, strategy_options=tuple(options.items()),
    )  # fmt: skip
    roofline = Roofline(Kernels())
    trace = trace_steps(lambda: LitNanoGPT(GPTConfig(T, V, L, 2, C)), shape, roofline=roofline)
    return trace, dict(roofline.exchanged)


def fullest(trace, category):
    return max(moment.bytes_by_category.get(category, 0) for moment in trace.timeline)


def test_ddp_holds_its_gradients_once_more_in_buckets_and_adds_them_up_once_a_step():
    one, _ = traced("single", 1, accumulate=3)
    trace, exchanged = traced("ddp", 4, accumulate=3)
    gradients = 4 * (L * BLOCK + ROOT)
    assert exchanged == {"allreduce_": gradients}
    assert fullest(trace, "communication") == pytest.approx(gradients, rel=0.01)  # a block per bucket is rounded up
    for category in ("weights", "gradients", "optimizer"):
        assert fullest(trace, category) == fullest(one, category)


def test_ddp_whose_gradients_are_views_of_buckets_holds_them_once():
    plain, _ = traced("ddp", 2)
    views, _ = traced("ddp", 2, gradient_as_bucket_view=True)
    without_gradients = plain.peaks["optimizer"].bytes - fullest(plain, "gradients")
    assert views.peaks["optimizer"].bytes == without_gradients


def test_only_what_lightning_makes_of_ddp_lies_on_a_stream_of_its_own():
    trace, _ = traced("ddp", 2)
    assert {event.stream for event in trace.events} == {0, 1}
    trace, _ = traced("ddp", 2, lightning=False)
    assert {event.stream for event in trace.events} == {0}


@pytest.mark.parametrize("devices", [2, 4])
def test_fsdp2_keeps_a_share_of_everything_and_gathers_a_block_twice_and_what_is_in_none_once(devices):
    one, _ = traced("single", 1)
    trace, exchanged = traced("fsdp2", devices, accumulate=2)
    assert exchanged["_reduce_scatter_base_"] == 2 * 4 * (L * BLOCK + ROOT)
    assert exchanged["_allgather_base_"] == 2 * 4 * (2 * L * BLOCK + ROOT)
    shapes = [parameter.shape for parameter in LitNanoGPT(GPTConfig(T, V, L, 2, C)).parameters()]
    weights = sum(rounded(4 * math.ceil(shape[0] / devices) * math.prod(shape[1:])) for shape in shapes)
    assert fullest(trace, "weights") == weights
    assert fullest(trace, "optimizer") == 2 * weights + 512 * len(shapes)  # each has its count of steps
    assert fullest(trace, "gradients") == pytest.approx(4 * (L * BLOCK + ROOT) / devices, rel=0.01)
    # Whole: what is in no block, the block that computes, and the buffer in which the next one is gathered.
    least = 4 * (ROOT + 2 * BLOCK)
    assert least <= fullest(trace, "communication") <= 1.7 * least
    assert trace.parameters == one.parameters


def test_what_one_stream_released_another_does_not_take():
    events = [Event(1, 30 * MIB, 1), Event(1, -30 * MIB, 1), Event(2, 30 * MIB)]
    assert replay(events).reserved == 60 * MIB
    assert replay(events, expandable=True).reserved == 80 * MIB  # 20 at a time
    assert replay([event._replace(stream=0) for event in events]).reserved == 30 * MIB


def test_a_ring_takes_the_time_of_its_slowest_link():
    settings = SettingsCLI(
        args=[*FIT, "--trainer.devices=8", "--trainer.num_nodes=2", "--trainer.strategy=ddp"]
    ).settings
    footprint = plan_rung(settings, own_rung(settings), H100)
    gradients = 4 * footprint.parameters
    for names, slowest in ((None, 3.125e9), ("ndr", 50e9), ("nvlink4,8xndr", 400e9), ("pcie4-x16,8xndr", 31.5e9)):
        step = step_of(machines(2, 8, H100, names), step_shape(settings, GPTConfig(64, 257, 1, 2, 64), True), footprint)
        assert step.communication_s == pytest.approx(2 * 15 / 16 * gradients / (REACHED * slowest))
        assert step.tokens == 16 * 2 * 64
        assert step.shortest_s == max(footprint.step_s, step.communication_s)
        assert step.longest_s == footprint.longest_step_s + step.communication_s
    assert Machines(1, 8, "nvlink4", "1gbe").bandwidth == REACHED * 450e9
    assert Machines(8, 1, "nvlink4", "10gbe").bandwidth == REACHED * 1.25e9


def test_columns_stay_apart_however_wide_their_numbers_are():
    step = Step(Machines(64, 8, "nvlink4", "25gbe"), 1, 1_048_576, 138.0, 0.0, 0.0, 0.00269, 0.00484)
    *_, titles, row = report_many([step], step, "ddp", tokens=10**13).splitlines()
    cells = [
        "512",
        "1",
        "1,048,576",
        "138",
        "0.00269 to 0.00484",
        "216,647,934 to 389,805,204",
        "3,649 to 6,565",
    ]
    assert [cell.strip() for cell in re.split(r" {2,}", row.strip())] == cells
    assert len(titles) == len(row)


@pytest.mark.parametrize("name", ["token-ring", "8xnvlink4", "nvlink4;ndr", ""])
def test_an_interconnect_that_is_not_known_is_refused_in_a_sentence(name):
    with pytest.raises(UserError, match="between nodes hdr, ndr"):
        machines(2, 8, H100, name)


def run(capsys, *arguments):
    code = main(["plan", *arguments])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--devices=2", "--strategy=deepspeed"], "trainer.strategy=deepspeed on 2 devices cannot be planned"),
        (["--trainer.devices=2", "--trainer.strategy=fsdp"], "trainer.strategy=fsdp on 2 devices cannot be planned"),
        (["--interconnect=ndr"], "is for several devices"),
        (["--devices=2", "--strategy=fsdp2", "--model.memory.optimizer_state=host"], "the strategy shards them"),
    ],
)
def test_what_cannot_be_planned_is_one_sentence(capsys, arguments, sentence):
    code, out, err = run(capsys, *FIT, *arguments)
    assert (code, out) == (2, "")
    assert sentence in err
    assert len(err.splitlines()) == 1


def test_the_command_takes_devices_from_the_yaml_and_options_override_it(capsys, tmp_path):
    trainer = "trainer:\n  devices: 4\n  num_nodes: 2\n  strategy: ddp\n"
    (tmp_path / "many.yaml").write_text(trainer)
    code, out, _ = run(capsys, f"--config={tmp_path / 'many.yaml'}", *FIT, "--devices=2", "--json")
    assert code == 0
    answer = json.loads(out)
    assert (answer["step"]["devices"], answer["step"]["nodes"]) == (4, 2)
    assert [step["devices"] for step in answer["growth"]] == [1, 2, 4, 8, 32, 128, 512]
    # As many tokens a step as there are, until each device has a micro-batch alone.
    assert [step["tokens_per_step"] // 128 for step in answer["growth"]] == [4, 4, 4, 8, 32, 128, 512]
    assert [step["accumulate_grad_batches"] for step in answer["growth"]] == [4, 2, 1, 1, 1, 1, 1]
    assert answer["growth"][1]["planned_reserved_mib"] >= answer["growth"][0]["planned_reserved_mib"]
    code, out, _ = run(capsys, f"--config={tmp_path / 'many.yaml'}", *FIT)
    assert code == 0
    assert "on 2 x 4 devices, ddp; pcie4-x16 (31.5 GB/s) within a node, 25gbe (3.1 GB/s a node) between nodes" in out


def test_nothing_of_the_processes_that_are_not_there_is_left():
    traced("fsdp2", 2)
    assert not torch.distributed.is_initialized()
    assert torch.cpu.current_stream() is not None


def test_the_page_claims_of_several_devices_what_the_record_holds():
    root = Path(__file__).parents[1]
    record = json.loads((root / "docs" / "fake_gpu.json").read_text(encoding="utf-8"))["many"]
    assert record["passed"]
    rows = {(row["strategy"], row["devices"]) for row in record["rows"]}
    assert rows == {(strategy, devices) for strategy in ("ddp", "fsdp2") for devices in (2, 4)}
    worst = max(abs(fit["reserved_error_percent"]) for row in record["rows"] for fit in row["fits"])
    page = " ".join((root / "docs" / "scale_out.md").read_text(encoding="utf-8").split())
    assert f"within {math.ceil(10 * worst) / 10} %" in page
    assert worst <= 2


@pytest.mark.long
@pytest.mark.parametrize(
    ("strategy", "nodes"), [("ddp", 1), ("ModelParallelStrategy", 1), ("ModelParallelStrategy", 16)]
)
def test_the_page_says_what_llama_3_8b_takes_of_each_gpu(strategy, nodes):
    sizes = {
        "n_layer": 32, "n_head": 32, "n_kv_head": 8, "n_embd": 4096, "n_hidden": 14336, "vocab_size": 128256,
        "tied_head": "false",
    }  # fmt: skip
    settings = SettingsCLI(
        args=[
            "--model.network=llama", *(f"--model.llama.{name}={size}" for name, size in sizes.items()),
            "--model.memory.recompute=full", "--model.memory.loss_chunk_tokens=1024", "--data.block_size=8192",
            "--data.batch_size=1", "--trainer.precision=bf16-mixed", "--trainer.max_steps=1000", "--trainer.devices=8",
            f"--trainer.num_nodes={nodes}", f"--trainer.strategy={strategy}",
        ]
    ).settings  # fmt: skip
    page = (Path(__file__).parents[1] / "docs" / "scale_out.md").read_text(encoding="utf-8")
    assert f"{plan_rung(settings, own_rung(settings), H100).reserved_mib:,.0f}" in page
