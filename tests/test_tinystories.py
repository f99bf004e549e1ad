"""scripts/tinystories.py: its text, its recipes, its time."""

import json
import re
from pathlib import Path

import pytest

from nanogpt_lit.cli.settings import SettingsCLI
from nanogpt_lit.tune.trials import recipe_of

ROOT = Path(__file__).parents[1]


@pytest.fixture
def tinystories(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import tinystories

    return tinystories


def texts(path):
    return [json.loads(row)["text"] for row in path.read_text(encoding="utf-8").splitlines()]


def test_lines_are_documents_but_for_short_ones_and_a_text_of_its_own_is_measured(tinystories, tmp_path):
    long_lines = [f"Once upon a time there was a cat, {n}." for n in range(3)]
    source, valid = tmp_path / "train.txt", tmp_path / "valid.txt"
    source.write_text(f"{long_lines[0]}\n<|endoftext|>\n  {long_lines[1]}  \nThe end.\n\n{long_lines[2]}")
    valid.write_text("The dog was happy to see the größte ball.\n")
    training, validation = tinystories.write_texts(source, valid, tmp_path / "work")
    assert texts(training) == long_lines
    assert texts(validation) == ["The dog was happy to see the größte ball."]


def test_a_twentieth_of_one_text_is_held_out_and_a_newer_source_is_read_again(tinystories, tmp_path):
    source = tmp_path / "one.jsonl"
    lines = [f"And it came to pass on day {n:06}" for n in range(8000)]  # longer than one piece of the source
    source.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    training, validation = tinystories.write_texts(source, None, tmp_path / "work")
    assert texts(validation) == lines[3800:4000] + lines[7800:8000]
    assert texts(training) == lines[:3800] + lines[4000:7800]
    made = training.stat().st_mtime_ns
    tinystories.write_texts(source, None, tmp_path / "work")
    assert training.stat().st_mtime_ns == made
    source.write_text(json.dumps({"text": "A story of another kind."}) + "\n")
    tinystories.write_texts(source, None, tmp_path / "work")
    assert texts(training) == ["A story of another kind."]


def test_the_plain_recipe_is_nanogpts_at_the_sizes_of_the_yaml(tinystories):
    def model(recipe):
        arguments = ["--config", str(tinystories.CONFIG), *tinystories.recipe_options(recipe)]
        return SettingsCLI(args=arguments).settings.model.as_dict()

    modern, plain = (model(recipe) for recipe in tinystories.RECIPES)
    assert [recipe_of(model) for model in (modern, plain)] == list(tinystories.RECIPES)
    sizes = ("n_layer", "n_head", "n_embd", "block_size")
    assert [plain["gpt"][size] for size in sizes] == [modern["llama"][size] for size in sizes] == [4, 4, 256, 256]


def test_the_steps_are_those_that_the_minutes_have_room_for(tinystories):
    measured = {"tokens_per_s": 1000.0, "step_tokens": 500.0, "other_s": 17.0}
    # 0.97 * 3600 - 17 s at two steps a second, in four equal parts; and (12,000 * 4,096 / 3,474,000) ** 0.32 is 2.34.
    assert tinystories.length_options(measured, 3600, rate=1e-3) == [
        "--trainer.max_steps=6948",
        "--trainer.val_check_interval=1737",
        "--trainer.max_time=00:01:00:00",
        "--model.optim.lr=0.0023",
        "--model.schedule.warmup_steps=100",
    ]
    of_the_yaml = {"tokens_per_s": 4096.0, "step_tokens": 4096.0, "other_s": 0.0}
    _, _, latest, rate, warmup = tinystories.length_options(of_the_yaml, 12001 / 0.97, rate=2e-3)
    assert (latest, rate, warmup) == (
        "--trainer.max_time=00:03:26:12",
        "--model.optim.lr=0.002",
        "--model.schedule.warmup_steps=100",
    )
    assert tinystories.length_options(measured, 90061, 1e-3)[2] == "--trainer.max_time=01:01:01:01"
    assert tinystories.length_options(measured, 60, 1e-3)[4] == "--model.schedule.warmup_steps=4"
    with pytest.raises(SystemExit, match=r"--minutes=0\.3 is too short: 17 s pass outside of the steps"):
        tinystories.length_options(measured, 18, 1e-3)


SMALL = [
    *(f"--model.{network}.{size}=1" for network in ("gpt", "llama") for size in ("n_layer", "n_head")),
    *(f"--model.{network}.n_embd=16" for network in ("gpt", "llama")),
    "--model.compile=false", "--data.tokenizer=byte", "--data.block_size=16", "--data.batch_size=2",
]  # fmt: skip


@pytest.mark.long
def test_both_recipes_are_trained_for_the_minutes_and_what_is_recorded_is_not_done_again(
    tinystories, tmp_path, capfd, monkeypatch
):
    source = tmp_path / "story.txt"
    source.write_text("".join(f"The cat sat on the mat for the {n}th time.\n" for n in range(4100)))
    arguments = [f"--source={source}", f"--work={tmp_path / 'work'}", "--minutes=0.5", *SMALL]
    tinystories.main(arguments)
    said = capfd.readouterr().out
    record = json.loads((tmp_path / "work" / "record.json").read_text())
    assert list(record["recipes"]) == ["modern", "nanogpt"]
    for found in record["recipes"].values():
        assert found["tokens"] == found["steps"] * found["step_tokens"] == found["steps"] * 32
        assert found["seconds"] < 60  # the half minute, and the start of a busy machine
        assert 1 < found["perplexity"] < 30  # 257 before it has learned anything
    assert tinystories.table(record) in said
    assert not re.search("FlashLM", said.split("| recipe")[1])  # of another text

    monkeypatch.setattr(tinystories, "fit", None)
    tinystories.main(arguments)
    assert tinystories.table(record) in capfd.readouterr().out
    with pytest.raises(SystemExit):
        tinystories.main([*arguments, "--minutes=1"])
    assert "is of another minutes" in capfd.readouterr().err
