"""Three loops, the same bits; and the comparison sees every bit."""

import importlib.util
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nanogpt_lit.cli import quiet_lightning
from nanogpt_lit.data.datamodule import TokenDataModule
from nanogpt_lit.gpt.model import GPTConfig
from nanogpt_lit.loops import accelerate_loop
from nanogpt_lit.loops.contract import LoopSettings
from nanogpt_lit.optim.adamw import AdamWConfig
from nanogpt_lit.optim.schedule import ScheduleConfig
from nanogpt_lit.parity.grid import AXES, every_combination, every_pair, pairs
from nanogpt_lit.parity.record import FINAL, Difference, compare, same
from nanogpt_lit.parity.runs import LOOPS, Case
from nanogpt_lit.parity.settled import OVERFLOWS, SETTLED

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _one_thread():
    quiet_lightning()
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parity")
    text = folder / "text.txt"
    text.write_text("".join(f"{n} bottles of beer on the wall, {n} bottles of beer.\n" for n in range(60)))
    data = TokenDataModule(
        str(text), "byte", val_fraction=0.1, shards_dir=str(folder / "shards"), block_size=8, batch_size=2
    )
    data.prepare_data()
    data.setup()
    return data


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


GRID = {
    "float32": case(),
    "float32, nothing clipped, no dropout": case(clip=None, dropout=0.0),
    "a ragged last window": case(accumulate=4, ragged=10),
    "bfloat16, accumulation, for-loop": case("bf16-mixed", 4, implementation="for-loop"),
    "bfloat16, ragged, foreach": case("bf16-mixed", 4, implementation="foreach", ragged=6),
    "float16, steps skipped and scale grown": case("16-mixed", 1, scaler=OVERFLOWS),
    "float16, the same with foreach, ragged": case("16-mixed", 4, implementation="foreach", ragged=6, scaler=OVERFLOWS),
    "float16, the same, nothing clipped": case("16-mixed", 4, clip=None, scaler=OVERFLOWS),
}


@pytest.mark.parametrize("name", GRID)
def test_the_three_loops_give_the_same_bits(name, data):
    runs = {loop: run(GRID[name], data).entries for loop, run in LOOPS.items()}
    assert compare(runs["reference"], runs["lightning"]) is None
    assert compare(runs["reference"], runs["accelerate"]) is None


@pytest.mark.parametrize("settled", SETTLED, ids=lambda settled: settled.name)
def test_a_settled_difference_drifts_when_it_is_taken_out_and_only_then(settled, data):
    base = case()
    it = settled.case(base)
    assert compare(LOOPS["reference"](it, data).entries, LOOPS[settled.loop](it, data).entries) is None
    assert settled.drift(base, data) is not None


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
    assert len(long) == math.prod(len(values) for values in AXES.values())
    assert len(short) < len(long) / 5
    of_all = {pair for point in long for pair in pairs(point)}
    assert {pair for point in short for pair in pairs(point)} == of_all


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("parity_script", ROOT / "scripts" / "parity.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def options(tmp_path, data):
    return [
        f"--config={ROOT / 'configs' / 'parity.yaml'}", f"--trainer.default_root_dir={tmp_path}", "--steps=4",
        f"--data.source={data.folder.parent / 'text.txt'}", "--data.val_fraction=0.1", "--data.block_size=8",
        "--model.gpt.n_embd=8", "--accumulate=4", "--dropout=0.1", "--optimizer=fused", "--ragged=yes",
    ]  # fmt: skip


def test_the_script_compares_reports_and_leaves_with_0(script, options, tmp_path, capsys):
    assert script.main([*options, "--clip=on", "--precision", "32-true", "16-mixed overflow"]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["identical"]
    assert [row["precision"] for row in report["cases"]] == ["32-true", "16-mixed overflow"]
    assert [row["skipped_steps"] > 0 for row in report["cases"]] == [False, True]
    assert set(report["time_per_step_against_reference"]) == {"lightning", "accelerate"}
    out = capsys.readouterr().out
    assert out.count("identical  ") == 2
    assert "all identical" in out


def test_the_script_names_the_first_difference_and_leaves_with_1(script, options, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(accelerate_loop, "clipping_order", lambda optimizer: [])  # clips nothing
    assert script.main([*options, "--clip=on", "--precision=32-true"]) == 1
    (row,) = json.loads((tmp_path / "report.json").read_text())["cases"]
    assert row["lightning"] is None
    assert (row["accelerate"]["when"], row["accelerate"]["quantity"]) == ("step 1", "gradient norm")
    assert "step 1: gradient norm by" in capsys.readouterr().out
