"""What a user types and reads, and what a program gets."""

import json
import pickle
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml

from nanogpt_lit.__main__ import main
from nanogpt_lit.cli.settings import SettingsCLI
from nanogpt_lit.gpt.gpt2 import GPTConfig
from nanogpt_lit.memory.ladder import ladder
from nanogpt_lit.module import LitNanoGPT
from nanogpt_lit.plan import command as planning
from nanogpt_lit.plan import largest as search
from nanogpt_lit.plan import plan as plan_module
from nanogpt_lit.plan.allocator import MIB, Usage, replay
from nanogpt_lit.plan.budget import choose_budget
from nanogpt_lit.plan.command import own_rung, plan_run, plan_rung, vocab_size
from nanogpt_lit.plan.largest import largest_that_fits
from nanogpt_lit.plan.plan import measure, reserved_mib
from nanogpt_lit.plan.report import report, report_largest, worth_showing
from nanogpt_lit.plan.step import StepShape, long_run, trace_steps

CONFIGS = Path(__file__).parents[1] / "configs"
SMALL = [
    "--model.gpt.n_layer=1", "--model.gpt.n_head=2", "--model.gpt.n_embd=64", "--data.tokenizer=byte",
    "--data.block_size=512", "--data.batch_size=8", "--trainer.precision=16-mixed", "--trainer.max_steps=100",
    "--trainer.accumulate_grad_batches=2",
]  # fmt: skip
KEYS = {
    "fits", "planned_allocated_mib", "planned_reserved_mib", "usable_mib", "host_memory_mib", "categories_mib",
    "ladder",
}  # fmt: skip


def settings(*options):
    return SettingsCLI(args=[*SMALL, *options]).settings


@pytest.fixture(scope="module", autouse=True)
def each_rung_is_traced_once():
    """The tests plan one small network for several cards; its traces are the same on all."""
    traced = {}

    def measure_once(build, rung, shape, card, and_other=False):
        key = (replace(rung, name=""), shape, card, and_other)
        if key not in traced:
            traced[key] = measure(build, rung, shape, card, and_other)
        return traced[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_module, "measure", measure_once)
        yield


@pytest.fixture(scope="module")
def plan():
    return plan_run(settings(), choose_budget("rtx2050"))


@pytest.fixture(scope="module")
def tight(plan):
    """The same on a card where the plain step does not fit and some rung does."""
    least = min(planned.footprint.reserved_mib for planned in plan.ladder)
    between = (least + plan.own.footprint.reserved_mib) / 2
    return plan_run(settings(), choose_budget("rtx2050", usable=f"{between:.0f}MiB"))


@pytest.fixture(scope="module")
def nothing_fits():
    return plan_run(settings(), choose_budget("rtx2050", usable="20MiB"))


def test_json_has_what_a_program_needs(plan):
    answer = json.loads(json.dumps(plan.as_json()))
    assert answer.keys() >= KEYS
    assert answer["fits"] is True
    assert answer["planned_allocated_mib"] <= answer["planned_reserved_mib"] <= answer["usable_mib"]
    assert sum(answer["categories_mib"].values()) == pytest.approx(answer["planned_allocated_mib"], abs=0.5)
    assert answer["phases_mib"].keys() >= {"forward", "backward", "optimizer", "validation"}
    assert [rung["cheapest"] for rung in answer["ladder"]].count(True) == 1
    assert [rung["own"] for rung in answer["ladder"]].count(True) == 1


def test_the_cheapest_rung_is_the_quickest_that_fits(tight):
    assert not tight.own.fits
    cheapest = tight.cheapest
    assert cheapest.fits
    assert cheapest.slowdown == min(planned.slowdown for planned in tight.ladder if planned.fits)
    for planned in tight.ladder:
        assert planned.fits == (planned.footprint.reserved_mib <= tight.budget.usable_mib)


def test_the_lines_it_prints_make_the_run_fit(tight, tmp_path):
    changes = tmp_path / "changes.yaml"
    changes.write_text("\n".join(tight.cheapest.yaml))
    again = plan_run(settings("--config", str(changes), *SMALL), tight.budget)
    assert again.own.fits
    assert again.own.footprint.reserved_mib == tight.cheapest.footprint.reserved_mib


def test_the_first_screen_says_what_to_do(tight):
    text = report(tight, "mine.yaml")
    verdict = text.split("\n\n")[1]
    assert verdict.startswith("DOES NOT FIT: needs")
    assert "Put this into the YAML" in verdict
    for line in tight.cheapest.yaml:
        assert f"    {line}\n" in text
    assert "an estimate" in text
    assert max(map(len, text.splitlines())) <= 180


def test_it_says_whether_expandable_segments_need_less_or_more(plan, monkeypatch):
    own = plan.own.footprint
    for needs_mib, words in [(-100, "closes gaps: 100 MiB less for yours"), (100, "needs 100 MiB more for yours")]:
        monkeypatch.setitem(vars(own), "expandable", Usage(0, round((own.reserved_mib + needs_mib) * MIB)))
        assert words in report(plan, "mine.yaml")


def test_where_nothing_fits_it_goes_down_to_single_sequences_and_says_so(nothing_fits):
    assert nothing_fits.cheapest is None
    assert nothing_fits.ladder[-1].rung.batch_size == 1
    assert "no rung below fits" in report(nothing_fits, "mine.yaml")


def test_a_plan_that_fits_needs_no_change(plan):
    verdict = report(plan, "mine.yaml").split("\n\n")[1]
    assert verdict.startswith("FITS: needs")


def test_gpt2_small_at_4_x_4_x_1024_needs_what_the_traces_of_nanogpt_found():
    """nanoGPT's loop keeps the logits of the micro-batch before: 5,827 allocated, 6,878 to 7,092 reserved MiB."""

    class NanoGPTLoop(LitNanoGPT):
        logits = None

        def forward(self, tokens, targets):
            logits = self.gpt(tokens)
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
            self.logits = logits  # only now are the former freed
            return loss

    shape = StepShape(4, 1024, 50304, 4, "16-mixed", validates=False)
    trace = trace_steps(lambda: NanoGPTLoop(GPTConfig(vocab_size=50304, gelu="erf")), shape)
    assert trace.peak.bytes / MIB == pytest.approx(5827, rel=0.01)
    assert 0.99 * 6878 <= replay(long_run(trace, 4)).reserved / MIB <= 1.01 * 7092


def test_the_largest_is_told_for_the_yaml_and_for_the_leanest_way_with_its_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(search, "FAMILY", {"mine": (1, 2, 64)})
    budget = choose_budget("rtx2050", usable="40MiB")
    short = ["--data.block_size=128", "--trainer.accumulate_grad_batches=1", "--trainer.limit_val_batches=0"]
    configured = settings(*short)
    plan = plan_run(configured, budget)
    own, leanest = largest_that_fits(configured, plan.budget)
    assert own["yaml"] == []
    assert {"    recompute: full", "    weights: streamed"} <= set(
        leanest["yaml"]
    )  # of last resort, and so in no ladder here
    assert not any(planned.rung.memory.weights == "streamed" for planned in plan.ladder)
    assert leanest["batch_size"] > own["batch_size"]
    assert leanest["block_size"] > own["block_size"]
    changes = tmp_path / "changes.yaml"
    changes.write_text("\n".join(leanest["yaml"]))
    for batch_size, fits in ((leanest["batch_size"], True), (int(leanest["batch_size"] * 1.1) + 2, False)):
        sized = settings("--config", str(changes), *SMALL, *short, f"--data.batch_size={batch_size}")
        footprint = plan_rung(sized, own_rung(sized), budget.gpu)
        assert (footprint.reserved_mib <= budget.usable_mib) == fits
    text = report_largest([own, leanest], plan)
    assert own["network"] == leanest["network"] == "mine"
    assert "as configured:" in text
    assert all(f"    {line}\n" in text for line in leanest["yaml"])


def test_what_the_search_is_given_gets_to_another_process_whole():
    given = settings(), choose_budget("rtx2050", usable="40MiB")
    assert pickle.loads(pickle.dumps(given)) == given


@pytest.mark.long
def test_the_command_searches_in_another_process_and_finds_what_the_search_finds_here(capsys):
    options = ["--data.block_size=64", "--trainer.accumulate_grad_batches=1", "--trainer.limit_val_batches=0"]
    assert main(["plan", "--vram=6GiB", "--usable=60MiB", "--largest", "--json", *SMALL, *options]) == 0
    found = json.loads(capsys.readouterr().out)["largest"]
    assert found == largest_that_fits(settings(*options), choose_budget(None, "6GiB", "60MiB"))
    assert found[0]["batch_size"] > 1


@pytest.mark.parametrize(("of_a_layer", "deep_traces"), [(0, 2), (1e-5, 4), (1e-2, 20)])
def test_two_layers_find_the_size_that_asking_every_size_of_the_network_finds(
    plan, monkeypatch, of_a_layer, deep_traces
):
    monkeypatch.setattr(search, "FAMILY", {})
    configured, usable_mib, asked = settings("--model.gpt.n_layer=12"), plan.budget.usable_mib, []

    def needed_mib(tokens, n_layer):
        return 30 + n_layer + (0.02 + of_a_layer * n_layer) * tokens

    def traced_mib(build, rung, shape, gpu):
        asked.append((rung.memory.weights, build.args[1].n_layer))
        return needed_mib(rung.batch_size * shape.block_size, build.args[1].n_layer)

    monkeypatch.setattr(search, "reserved_mib", traced_mib)
    _, leanest = largest_that_fits(configured, plan.budget)
    for found, unit, tokens in ((leanest["batch_size"], 1, 512), (leanest["block_size"], 64, 1)):
        every = range(unit, 1_000_000 // tokens, unit)
        exactly = max(size for size in every if needed_mib(size * tokens, 12) <= usable_mib)
        assert found <= exactly <= found + max(unit, 0.03 * found)
    assert asked.count(("streamed", 12)) <= deep_traces


def test_a_network_whose_weights_alone_do_not_fit_is_not_traced(monkeypatch):
    monkeypatch.setattr(search, "FAMILY", {"small": (1, 2, 64), "wide": (2, 2, 1024)})
    asked = set()

    def traced_mib(build, rung, shape, gpu):
        asked.add((rung.memory.weights, build.args[1].n_embd))
        return rung.batch_size * shape.block_size / 100

    configured = settings(
        "--data.block_size=128", "--trainer.accumulate_grad_batches=1", "--trainer.limit_val_batches=0"
    )
    plan = plan_run(configured, choose_budget("rtx2050", usable="200MiB"))  # of which weights and gradients take 196
    monkeypatch.setattr(search, "reserved_mib", traced_mib)
    assert [found["network"] for found in largest_that_fits(configured, plan.budget)] == ["wide", "wide"]
    assert {("device", 1024), ("streamed", 1024)} <= asked
    asked.clear()
    plan = replace(plan, budget=replace(plan.budget, measured_mib=190))
    assert [found["network"] for found in largest_that_fits(configured, plan.budget)] == ["small", "wide"]
    assert ("device", 1024) not in asked


@pytest.mark.parametrize(
    ("strategy", "moved"), [("ddp", {"block_inputs", "optimizer_state"}), ("ModelParallelStrategy", {"block_inputs"})]
)
def test_what_a_strategy_exchanges_stays_on_the_device_and_all_else_is_offered(strategy, moved, plan, monkeypatch):
    monkeypatch.setattr("nanogpt_lit.plan.plan.measure", lambda *arguments, **options: plan.own.footprint)
    configured = settings("--trainer.devices=2", f"--trainer.strategy={strategy}", "--trainer.precision=bf16-mixed")
    rungs = [planned.rung for planned in plan_run(configured, plan.budget).ladder]
    places = {name for rung in rungs for name, value in vars(rung.memory).items() if value in ("host", "streamed")}
    assert places == moved
    assert ("full", 1) in {(rung.memory.recompute, rung.memory.recompute_every) for rung in rungs}


@pytest.mark.parametrize(("strategy", "found"), [("ddp", "small"), ("ModelParallelStrategy", "wide")])
def test_of_weights_that_are_shared_out_a_share_has_to_fit(strategy, found, plan, monkeypatch):
    monkeypatch.setattr(search, "FAMILY", {"small": (1, 2, 64)})
    monkeypatch.setattr(search, "LARGER", {"wide": (2, 2, 1024)})
    monkeypatch.setattr(search, "reserved_mib", lambda build, rung, shape, gpu: rung.batch_size * shape.block_size / 99)
    configured = settings("--trainer.devices=2", f"--trainer.strategy={strategy}", "--trainer.precision=bf16-mixed")
    shape = planning.step_shape(configured, planning.network(configured), lightning=True)
    budget = choose_budget("a100", usable="190MiB")  # weights and gradients take 196
    plan = replace(plan, shape=shape, budget=budget, ladder=())
    assert {answer["network"] for answer in largest_that_fits(configured, plan.budget)} == {found}


@pytest.mark.long
def test_more_devices_leave_room_for_more_under_fsdp2_and_for_as_much_under_ddp(monkeypatch):
    monkeypatch.setattr(search, "FAMILY", {"mine": (1, 2, 64)})
    monkeypatch.setattr(search, "LARGER", {"wide": (2, 4, 512), "wider": (2, 8, 1024)})

    def found(strategy, devices):
        configured = settings(
            "--data.block_size=128", "--trainer.accumulate_grad_batches=1", "--trainer.limit_val_batches=0",
            "--model.gpt.n_embd=256", f"--trainer.devices={devices}", f"--trainer.strategy={strategy}",
            "--trainer.precision=bf16-mixed",
        )  # fmt: skip
        own, _ = largest_that_fits(configured, choose_budget("a100", usable="150MiB"))
        return own["batch_size"], own["block_size"], ["mine", "wide", "wider"].index(own["network"])

    assert found("ddp", 8) == found("ddp", 2)
    two, eight = found("ModelParallelStrategy", 2), found("ModelParallelStrategy", 64)
    assert all(more >= less for less, more in zip(two, eight, strict=True))
    assert eight[2] > two[2]


@pytest.mark.parametrize("rung", [0, 3, -1])
def test_what_the_search_of_the_largest_traces_in_part_is_what_a_whole_trace_reserves(rung):
    # 15 chunks, of which the last is shorter; the head and its logits are most of the memory.
    configured = settings("--data.batch_size=9", "--data.block_size=200", "--model.gpt.vocab_size=20000")
    gpt, shape = planning.network(configured), planning.step_shape(configured, planning.network(configured), True)
    of_ladder = list(ladder(own_rung(configured), 200, casts_weights=True))[1:][rung]
    of_ladder = replace(of_ladder, memory=replace(of_ladder.memory, loss_chunk_tokens=128))
    build, gpu = partial(planning.module, configured, gpt), choose_budget("rtx2050").gpu
    whole = measure(build, of_ladder, shape, gpu)
    assert reserved_mib(build, of_ladder, shape, gpu) == whole.reserved_mib
    assert whole.categories_mib["logits"] > 0


def test_a_rung_that_saves_nothing_is_not_among_the_ways_to_need_less(plan):
    def needing(mib, of):
        return replace(of, footprint=replace(of.footprint, reserved_mib=mib))

    first, second, third, *_ = (planned for planned in plan.ladder if planned is not plan.own)
    rungs = (plan.own, needing(90, first), needing(95, second), needing(80, third))
    shown = worth_showing(replace(plan, own=needing(99, plan.own), ladder=(needing(99, plan.own), *rungs[1:])))
    assert [planned.footprint.reserved_mib for planned in shown] == [99, 90, 80]
    last = needing(85, plan.own)  # the YAML's own is shown wherever it stands
    shown = worth_showing(replace(plan, own=last, ladder=(*rungs[1:], last)))
    assert [planned.footprint.reserved_mib for planned in shown] == [90, 80, 85]


# The command.


def run(capsys, *arguments):
    code = main(["plan", *arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_what_repeating_to_the_bit_costs_is_said_and_counted_where_it_is_asked_for(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    budget = choose_budget("rtx2050")
    free, asked = (settings() for _ in range(2))
    asked.trainer.deterministic = True
    plans = plan_run(free, budget), plan_run(asked, budget)
    # Two threads' workspaces of cuBLAS, of 32 in place of 8.1 MiB.
    extra_mib = plans[1].own.footprint.allocated_mib - plans[0].own.footprint.allocated_mib
    assert extra_mib == pytest.approx(2 * (32 - 8.125), abs=1)
    apart = [(plan.own.footprint.reserved_mib, plan.own.footprint.step_s) for plan in plans]
    for plan in plans:  # of one trace, as two have it
        assert plan.price_of_determinism == (apart[1][0] - apart[0][0], apart[1][1] / apart[0][1])
    assert plans[0].price_of_determinism[1] >= 1
    for plan, counted in zip(plans, ("of the time.", "of the time (counted above)."), strict=True):
        line = next(line for line in report(plan, "mine").splitlines() if line.startswith("trainer.deterministic=true"))
        assert line.endswith(counted)


def test_the_command_answers_in_json_and_draws(capsys, tmp_path):
    picture = tmp_path / "step.svg"
    code, out, _ = run(capsys, *SMALL, "--json", "--vram=4GB", f"--picture={picture}")
    assert code == 0
    assert json.loads(out).keys() >= KEYS
    labels = [str(text.text).strip() for text in ElementTree.parse(picture).iter("{http://www.w3.org/2000/svg}text")]
    assert {"forward", "backward", "optimizer", "workspace"} <= set(labels)


def test_the_command_reads_a_yaml_and_its_overrides(capsys, tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text(yaml.safe_dump({"model": {"gpt": {"n_layer": 3, "n_head": 2, "n_embd": 32}}}))
    tokens = ["--data.block_size=64", "--data.tokenizer=byte", "--trainer.max_steps=10"]
    code, out, _ = run(capsys, "--config", str(mine), *tokens, "--model.gpt.n_layer=1")
    assert code == 0
    assert out.startswith(f"{mine}: ")
    assert "1 x 4 x 64 = 256 tokens" in out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--gpu=voodoo2"], "known are rtx2050"),
        (["--vram=4TB"], "4GiB or 3200MiB"),
        (["--picture=step.gif"], "must end in .svg or .png"),
        (["--trainer.precision=64-true"], "trainer.precision=64-true cannot be planned"),
        (["--data.tokenizer=char"], "--model.gpt.vocab_size"),
        (["--trainer.precision=bf16-true", "--loop=accelerate"], "bf16-true is for Lightning's Trainer only"),
        (["--data.batch_size=0", "--json"], "data.batch_size=0 must be at least 1"),
        (["--trainer.accumulate_grad_batches=0"], "trainer.accumulate_grad_batches=0 must be at least 1"),
    ],
)
def test_a_mistake_is_one_sentence_and_2(capsys, arguments, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *SMALL, *arguments)
    assert (code, out) == (2, "")
    assert sentence in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(("tokenizer", "size"), [("gpt2", 50257), ("byte", 257), ("bpe:32000", 32000)])
def test_the_vocabulary_needs_no_shards(tokenizer, size):
    assert vocab_size(settings(f"--data.tokenizer={tokenizer}")) == size


def test_nothing_is_written_and_no_random_number_drawn(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    configured = settings("--model.gpt.dropout=0.1", "--data.block_size=32")
    before = torch.get_rng_state()
    plan_run(configured, choose_budget("rtx2050"))
    assert torch.equal(torch.get_rng_state(), before)
    assert list(tmp_path.iterdir()) == []
