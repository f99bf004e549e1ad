"""Three loops, the same bits; and the comparison sees every bit."""

import itertools
import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import small_networks
import torch
import torch.distributed as dist
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from three_loops import assert_loops_agree, prepared_data
from torch.distributed.fsdp import fully_shard

from nanogpt_lit.__main__ import main
from nanogpt_lit.cli.settings import quiet_lightning
from nanogpt_lit.gpt.gpt2 import GPTConfig
from nanogpt_lit.loops import accelerate
from nanogpt_lit.loops.contract import LoopSettings
from nanogpt_lit.module import LitNanoGPT
from nanogpt_lit.optim.adamw import AdamWConfig
from nanogpt_lit.optim.schedule import ScheduleConfig
from nanogpt_lit.parity import command, grid
from nanogpt_lit.parity.grid import (
    AXES,
    compare_cases,
    compare_loops,
    every_combination,
    every_pair,
    of_all_ranks,
    pairs,
)
from nanogpt_lit.parity.known_differences import KNOWN_DIFFERENCES, Effect, effects
from nanogpt_lit.parity.processes import run_together
from nanogpt_lit.parity.record import FINAL, Difference, compare, same
from nanogpt_lit.parity.runs import LOOPS, OVERFLOWS, Case, loaders_of, quiet
from nanogpt_lit.tune.trials import MODERN

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _one_thread():
    quiet_lightning()
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    # 39 windows to validate on, and two processes read 4 in a turn: the last turn is short.
    content = "".join(f"{n} bottles of beer on the wall, {n} bottles of beer.\n" for n in range(61))
    return prepared_data(tmp_path_factory.mktemp("parity"), content)


STEPS = 6


def case(precision="32-true", accumulate=1, clip=0.05, dropout=0.1, implementation="fused", ragged=None, **rest):
    return Case(
        LoopSettings(STEPS, accumulate, clip, precision, val_check_interval=5, limit_val_batches=2, seed=7),
        GPTConfig(block_size=8, vocab_size=257, n_layer=2, n_head=2, n_embd=8, dropout=dropout),
        AdamWConfig(lr=0.01, implementation=implementation),
        ScheduleConfig(warmup_steps=2, total_steps=STEPS),
        batches_per_epoch=ragged,
        **rest,
    )


def modern(**rest):
    base = case(dropout=0.0, **rest)
    return replace(
        base,
        gpt=small_networks.modern(base.gpt),
        optim=replace(base.optim, **MODERN["optim"]),
        schedule=replace(base.schedule, **MODERN["schedule"]),
    )


GRID = {
    "float32": case(),
    "a ragged last window": case(accumulate=4, ragged=10),
    "deterministic": replace(case(), settings=replace(case().settings, deterministic=True)),
    "bfloat16, accumulation, for-loop": case("bf16-mixed", 4, implementation="for-loop"),
    "float16, steps skipped, ragged": case("16-mixed", 4, implementation="foreach", ragged=6, scaler=OVERFLOWS),
    "float16, the same, nothing clipped": case("16-mixed", 1, clip=None, dropout=0.0, scaler=OVERFLOWS),
}


@pytest.mark.parametrize("name", GRID)
def test_the_three_loops_give_the_same_bits(name, data):
    assert_loops_agree(GRID[name], data)


OF_ONE = [known for known in KNOWN_DIFFERENCES if known.case(case()).processes == 1]
OF_TWO = [known for known in KNOWN_DIFFERENCES if known not in OF_ONE]
(ORDER_OF_CLIPPING,) = (known for known in KNOWN_DIFFERENCES if known.only_rounds)


@pytest.mark.parametrize("known", OF_ONE, ids=lambda known: known.name)
def test_a_known_difference_shows_when_it_is_brought_back_and_only_then(known, data):
    base = case()
    it = known.case(base)
    assert compare(LOOPS["reference"](it, data).entries, LOOPS[known.loop](it, data).entries) is None
    effect = known.effect(base, data)
    if not known.only_rounds:
        assert effect
    elif effect:
        # A sum of 28 squares, rounded at each addition by at most 2**-24 of it, and the norm is its root.
        assert effect.first.quantity == "gradient norm"
        assert effect.first.size < 28 * 2**-24 * norm_at(effect.first, LOOPS["reference"](it, data))


def norm_at(difference, run):
    (norm,) = (e.value for e in run.entries if (e.when, e.quantity) == (difference.when, difference.quantity))
    return float(norm)


def test_every_loop_clips_in_the_order_of_the_optimizers_groups_and_without_what_was_known_in_another(
    data, monkeypatch
):
    """Whether the two orders round differently is a matter of the CPU's kernels; that there are two is not."""
    orders = []
    clip = torch.nn.utils.clip_grad_norm_

    def clip_and_note(parameters, *args, **kwargs):
        parameters = list(parameters)
        orders.append([tuple(p.shape) for p in parameters])
        return clip(parameters, *args, **kwargs)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip_and_note)
    it = ORDER_OF_CLIPPING.case(case())
    of_module = [tuple(p.shape) for p in it.make_module().parameters()]
    of_groups = [shape for shape in of_module if len(shape) > 1] + [shape for shape in of_module if len(shape) == 1]
    assert of_groups != of_module
    for loop in LOOPS.values():
        orders.clear()
        loop(it, data)
        assert orders == [of_groups] * STEPS
    orders.clear()
    with ORDER_OF_CLIPPING.brought_back():
        LOOPS[ORDER_OF_CLIPPING.loop](it, data)
    assert orders == [of_module] * STEPS


ON_TWO = {
    "float32, a ragged last window": case(accumulate=4, ragged=6, processes=2),
    "bfloat16, nothing clipped": case("bf16-mixed", clip=None, processes=2),
    "float16, accumulation, steps skipped and scale grown": case("16-mixed", 4, scaler=OVERFLOWS, processes=2),
    "the modern recipe": modern(accumulate=2, processes=2),
    "FSDP2, a Llama, a ragged last window": replace(
        case(accumulate=4, clip=None, dropout=0.0, ragged=6, processes=2, sharded=True),
        gpt=small_networks.modern(case().gpt),
    ),
}


def compare_then_take_out(cases, known, base, data):
    """In each of two processes."""
    quiet()
    compared = [compare_loops(case, data) for case in cases]
    return compared, effects(known, base, data), compare_loops(cases[0], data), sharded_by_hand(data)


def sharded_by_hand(data):
    """What differs where FSDP2 trains as its tutorial has it, in no loop of ours and sharded by no function of ours."""
    it = case("bf16-mixed", 2, processes=2, sharded=True)
    module, settings = it.make_module(), it.settings
    for block in module.gpt.blocks:
        fully_shard(block)
    fully_shard(module)
    configured = module.configure_optimizers()
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    torch.manual_seed(settings.seed + dist.get_rank())
    found = {}
    batches = iter(loaders_of(it, data, dist.get_rank())[0])
    for step in range(1, settings.max_steps + 1):
        for k in range(1, settings.accumulate_grad_batches + 1):
            with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
                loss = module(*next(batches))
            (loss / settings.accumulate_grad_batches).backward()
            found[f"step {step}", f"loss of micro-batch {k}"] = loss.detach()
        torch.nn.utils.clip_grad_norm_(parameters, settings.gradient_clip_val)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    found |= {(FINAL, f"parameter {name}"): value.full_tensor() for name, value in module.named_parameters()}
    entries = {(entry.when, entry.quantity): entry.value for entry in LOOPS["accelerate"](it, data).entries}
    return [key for key, value in found.items() if not same(value.detach(), entries[key])]


@pytest.fixture(scope="module")
def on_two(data):
    """Of each rank: the outcomes, the effects, and the outcome of the first case once more."""
    cases = [*ON_TWO.values(), *(known.case(case()) for known in OF_TWO)]
    data.position = None
    return run_together(2, compare_then_take_out, cases, [known.name for known in OF_TWO], case(), data)


@pytest.mark.parametrize("name", ON_TWO)
def test_two_processes_give_the_same_bits_in_each_of_the_three_loops(name, on_two):
    outcomes = [compared[list(ON_TWO).index(name)] for compared, *_ in on_two]
    assert [outcome.differences for outcome in outcomes] == [{"lightning": None, "accelerate": None}] * 2
    losses = [[curves["train/loss"] for _, curves in o.curves["reference"] if "train/loss" in curves] for o in outcomes]
    assert losses[0] == losses[1]  # each has samples of its own, and the curve is of all
    assert outcomes[0].skipped_steps == (2 if ON_TWO[name].scaler else 0)


def test_two_shards_are_trained_as_a_loop_trains_them_that_knows_nothing_of_ours(on_two):
    assert [by_hand for *_, by_hand in on_two] == [[], []]


@pytest.mark.long
def test_three_processes_give_the_same_bits_in_each_of_the_three_loops(data):
    data.position = None
    cases = [replace(it, processes=3, settings=replace(it.settings, limit_val_batches=3)) for it in ON_TWO.values()]
    of_ranks = run_together(3, compare_cases, cases, data)
    assert all(outcome.identical for outcomes in of_ranks for outcome in outcomes)


def test_the_modern_recipe_takes_on_two_processes_the_steps_that_it_takes_on_one(on_two, data):
    """Muon orthogonalises the mean of both processes' gradients: two windows of 2 are one of 4."""
    data.position = None
    alone = LOOPS["reference"](modern(accumulate=4), data).curves
    together = on_two[0][0][list(ON_TWO).index("the modern recipe")].curves["reference"]
    for tag in ("train/loss", "train/grad_norm"):
        one, two = ([values[tag] for _, values in curves if tag in values] for curves in (alone, together))
        assert len(one) == STEPS
        # Gradients are summed in another order, and a small singular value is made as large as the others.
        assert two == pytest.approx(one, rel=1e-4), tag


@pytest.mark.parametrize("known", OF_TWO, ids=lambda known: known.name)
def test_a_known_difference_of_two_processes_shows_when_it_is_brought_back_and_only_then(known, on_two):
    k = OF_TWO.index(known)
    for compared, effect, afterwards, _ in on_two:
        assert compared[len(ON_TWO) + k].identical
        assert effect[k]
        assert afterwards.identical


def test_the_processes_speak_with_one_voice_the_earliest_difference_first(on_two):
    outcomes = [replace(compared[0], differences=dict(compared[0].differences)) for compared, *_ in on_two]
    late, early = Difference("step 2", "gradient norm", 0.1, 9), Difference("step 1", "loss", 0.2, 3)
    outcomes[0].differences["accelerate"], outcomes[1].differences["accelerate"] = late, early
    together = of_all_ranks(outcomes)
    assert together.differences == {"lightning": None, "accelerate": early}
    assert not together.identical
    assert together.quantities == 2 * outcomes[0].quantities


def test_a_scaler_that_overflows_is_really_tried():
    assert OVERFLOWS["growth_interval"] < STEPS


def changed(value):
    """The smallest change that the type can hold."""
    if isinstance(value, torch.Tensor):
        value = value.clone()
        flat = value.view(-1)
        flat[-1] = torch.nextafter(flat[-1], torch.tensor(9.0)) if value.is_floating_point() else flat[-1] ^ 1
        return value
    if isinstance(value, bool) or value is None:
        return not value
    return math.nextafter(value, 9.0) if isinstance(value, float) else value + 1


def test_the_smallest_change_of_any_one_recorded_quantity_is_found_where_it_is(data):
    entries = LOOPS["reference"](case("16-mixed", 4), data).entries
    kinds = {entry.quantity.split()[0] for entry in entries}
    assert kinds == {
        "loss", "gradient", "learning", "validation", "parameter", "optimizer", "schedule", "scaler", "random",
    }  # fmt: skip
    assert compare(entries, list(entries)) is None
    for k, entry in enumerate(entries):
        corrupt = [*entries[:k], replace(entry, value=changed(entry.value)), *entries[k + 1 :]]
        found = compare(entries, corrupt)
        assert found is not None, entry
        assert (found.when, found.quantity) == (entry.when, entry.quantity)


def test_an_entry_too_many_or_too_few_is_a_difference(data):
    entries = LOOPS["reference"](case(), data).entries
    assert compare(entries, entries[:-1]) == Difference(FINAL, "random state against nothing", None)
    assert compare(entries[:3], entries[:2] + entries[3:4]).quantity.startswith(entries[2].quantity + " against ")


def test_numbers_are_compared_by_their_bits():
    assert same(torch.tensor(float("nan")), torch.tensor(float("nan")))
    assert not same(torch.tensor(0.0), torch.tensor(-0.0))
    assert not same(torch.tensor(1.0), torch.tensor(1.0, dtype=torch.float64))
    assert not same(torch.ones(1), torch.ones(1, 1))
    assert not same(1, 1.0)


def test_the_short_grid_has_every_pair_of_values_and_the_long_one_every_combination():
    short, long = every_pair(AXES), every_combination(AXES)
    everything = math.prod(len(values) for values in AXES.values())
    assert len(long) == everything - everything // len(AXES["processes"]) // 2  # FSDP2 has no scaler
    assert len(short) < len(long) / 5
    of_all = {pair for point in long for pair in pairs(point)}
    assert {pair for point in short for pair in pairs(point)} == of_all


@pytest.fixture
def options(tmp_path, data):
    return [
        f"--config={ROOT / 'configs' / 'parity.yaml'}", f"--trainer.default_root_dir={tmp_path}", "--steps=4",
        f"--data.source={data.folder.parent / 'text.txt'}", "--data.val_fraction=0.1", "--data.block_size=8",
        "--model.gpt.n_embd=8",
    ]  # fmt: skip


ONE_POINT = ["--accumulate=4", "--dropout=0.1", "--optimizer=fused", "--ragged=yes", "--clip=on"]


def run(*arguments):
    """The exit code, as the command line would have it."""
    try:
        return main(["parity", *arguments])
    except SystemExit as exit:
        return exit.code


def test_the_command_compares_reports_and_leaves_with_0(options, tmp_path, capsys):
    assert run(*options, *ONE_POINT, "--precision=16-mixed overflow", "--skip-memory") == 0
    report = json.loads((tmp_path / "parity_0" / "report.json").read_text())
    assert report["identical"]
    rows = [(row["precision"], row["processes"], row["skipped_steps"] > 0) for row in report["cases"]]
    assert rows == [("16-mixed overflow", "1", True), ("16-mixed overflow", "2", True)]
    assert all(quartiles == sorted(quartiles) for quartiles in report["time_per_step_against_reference"].values())
    out = capsys.readouterr().out
    assert out.count("identical  ") == 2
    assert "2 cases" in out
    assert "all identical" in out
    picture = ElementTree.parse(tmp_path / "parity_0" / "curves.svg").getroot()
    assert_three_loops_are_one_curve(picture, len(rows))
    for case_, loop in itertools.product((1, 2), LOOPS):
        events = EventAccumulator(str(tmp_path / "parity_0" / f"case_{case_:02}" / loop)).Reload()
        assert set(TAGS) <= set(events.Tags()["scalars"])
        assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4]


TAGS = (
    "train/loss", "train/lr", "train/grad_norm", "train/skipped_steps", "train/tokens", "throughput/tokens_per_s",
    "val/loss", "val/perplexity",
)  # fmt: skip


def assert_three_loops_are_one_curve(picture, cases):
    lines = {}
    for group in picture.findall(".//{*}g"):
        if match := re.fullmatch(r"(case_\d+)_(reference|lightning|accelerate)", group.get("id", "")):
            lines.setdefault(match[1], []).append(group.find("{*}path").get("d"))
    assert len(lines) == cases
    for drawn in lines.values():
        assert len(drawn) == 3
        assert len(set(drawn)) == 1  # over each other


def test_on_a_gpu_the_command_compares_loops_that_are_strict_and_not_only_warned(options, monkeypatch):
    """With a warning alone, attention's backward pass adds up in no fixed order, and a loop differs from itself."""
    compared = []

    def compare_all(points, cases, data):
        compared.extend(cases)
        sys.exit(0)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(command, "hardware", lambda *_: "")  # asks CUDA for a name
    monkeypatch.setattr(command, "compare_all", compare_all)
    assert run(*options, "--on=cuda", "--trainer.accelerator=cpu") == 0
    assert {(case.device, case.settings.deterministic) for case in compared} == {("cuda", True)}
    compared.clear()
    assert run(*options) == 0
    assert {(case.device, case.settings.deterministic) for case in compared} == {("cpu", None)}


def test_the_comparison_names_the_first_difference_and_leaves_with_1(options, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(accelerate, "clipping_order", lambda optimizer: [])  # clips nothing
    out = tmp_path / "elsewhere"
    alone = ["--processes=1", "--precision=32-true", "--skip-memory", f"--out={out}"]
    assert run(*options, *ONE_POINT, *alone) == 1
    report = json.loads((out / "report.json").read_text())
    (row,) = report["cases"]
    assert row["lightning"] is None
    assert (row["accelerate"]["when"], row["accelerate"]["quantity"]) == ("step 1", "gradient norm")
    assert report["peak_memory_growth_mib"] is None
    assert "step 1: gradient norm by" in capsys.readouterr().out
    assert 'id="case_1_parted"' in (out / "curves.svg").read_text()  # the mark at the step


def test_explain_prints_a_table_of_every_known_difference(options, on_two, tmp_path, capsys, monkeypatch):
    few = [known for known in KNOWN_DIFFERENCES if known.name in ("schedule on a skipped step", OF_TWO[0].name)]
    monkeypatch.setattr(command, "KNOWN_DIFFERENCES", few)
    on_rank_0 = on_two[0][1]  # other processes need not be started again to be printed
    monkeypatch.setattr(command, "effects_together", lambda *_: {OF_TWO[0].name: on_rank_0[0]})
    assert run(*options, "--explain") == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows[2:]] == [f"| {known.name}" for known in few]
    assert all(re.search(r"step \d: [a-z ]+ by \d\.\de-\d\d; weights at the end by", row) for row in rows[2:])
    report = json.loads((tmp_path / "parity_0" / "report.json").read_text())
    assert [row["difference"] for row in report["explained"]] == [known.name for known in few]


def test_two_orders_that_this_cpu_rounds_alike_are_explained_so_and_are_no_failure(
    options, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(command, "effects_together", lambda *_: {ORDER_OF_CLIPPING.name: Effect(None, 0.0)})
    monkeypatch.setattr(command, "KNOWN_DIFFERENCES", [ORDER_OF_CLIPPING])
    assert run(*options, "--explain") == 0
    assert "| rounded alike on this CPU |" in capsys.readouterr().out
    monkeypatch.setattr(command, "effects_together", lambda *_: {OF_TWO[0].name: Effect(None, 0.0)})
    monkeypatch.setattr(command, "KNOWN_DIFFERENCES", [OF_TWO[0]])
    assert run(*options, "--explain") == 1


class Hoarder(LitNanoGPT):
    """Holds 64 MiB that nobody needs."""

    def configure_optimizers(self):
        self.hoard = torch.ones(2**24)
        return super().configure_optimizers()


def test_the_peak_memory_of_a_loop_is_what_its_own_process_grew_by(data, monkeypatch):
    if grid.peak_bytes() is None:
        pytest.skip("the system does not say")
    monkeypatch.setattr(grid, "LOOPS", {"lightning": None})  # one is enough to see
    (growth,) = grid.peak_growth_mib(case(module=Hoarder), data).values()
    assert 64 < growth < 64 + 128


def test_a_large_network_is_made_small_unless_it_is_asked_for(options, tmp_path, capsys):
    large = options[:2] + options[3:5]
    yaml = tmp_path / "mine.yaml"
    yaml.write_text("model: {gpt: {n_layer: 3, n_head: 3, n_embd: 96}}\ndata: {tokenizer: char, batch_size: 3}\n")
    few = [*large, f"--config={yaml}", "--precision=32-true", "--accumulate=1", "--processes=1", "--skip-memory"]
    few += ["--clip=on", "--dropout=0.1", "--optimizer=fused", "--ragged=yes", "--steps=1"]
    assert run(*few, "--data.batch_size=3") == 0
    out = capsys.readouterr().out
    assert "small for the comparison: n_layer 3 -> 2, n_embd 96 -> 64, n_head 3 -> 2 (--full-size" in out
    assert "1 steps of 3 x 32 tokens per micro-batch, 2 layers of 64 channels, vocabulary " in out
    assert "(char)" in out
    assert run(*few, "--full-size") == 0
    out = capsys.readouterr().out
    assert "small for" not in out
    assert "1 steps of 3 x 32 tokens per micro-batch, 3 layers of 96 channels" in out


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("--steps=0", "argument --steps: 0 should be a whole number, at least 1"),
        ("--precision=8-bit", "argument --precision: invalid choice: '8-bit'"),
        ("--model.gpt.n_head=3", "model.gpt.n_embd=8 does not divide into n_head=3 equal heads"),
        ("--model.gpt.n_heads=4", "no option model.gpt.n_heads; did you mean model.gpt.n_head?"),
        ("--data.block_size=5000", "data.block_size=5000 is a block longer than the shards"),
        ("--data.block_size=160", "'val' has 1 windows, fewer than the 2 processes"),
    ],
)
def test_a_mistake_is_one_sentence_and_starts_nothing(options, option, sentence, capsys, tmp_path):
    assert run(*options, *ONE_POINT, option) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert sentence in line
    assert not list(tmp_path.glob("parity_*"))


def test_explain_and_a_launcher_refuse_what_they_would_ignore(options, capsys, monkeypatch):
    assert run(*options, "--explain", "--clip=on") == 2
    assert "--explain brings cases of its own; leave out --clip." in capsys.readouterr().err
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert run(*options) == 2
    assert "ACCELERATE_MIXED_PRECISION=no is set" in capsys.readouterr().err
