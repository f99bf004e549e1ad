"""The warning of a run that reads its text too often: where it stands, and where it does not."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_runs import BOTTLES, LOOPS, small_run

from nanogpt_lit.cli.settings import SettingsCLI
from nanogpt_lit.gpt.gpt2 import GPTConfig
from nanogpt_lit.gpt.networks import build, config_of
from nanogpt_lit.optim.adamw import AdamWConfig
from nanogpt_lit.run.overfitting import DROPOUT, OFTEN, STEPS_OF_A_READING, limited, overfitting, useful_readings

CONFIGS = Path(__file__).parents[1] / "configs"
NETWORK = GPTConfig(block_size=16, vocab_size=64, n_layer=1, n_head=1, n_embd=16)
SHAKESPEARE = 1_003_854  # characters of nanoGPT's training part
BIBLE = 1_050_120  # tokens of bpe:2048 in nine tenths of the King James Bible, docs/limited_bible.json


def told(readings, tokens, matrices, weight_decay=0.1, dropout=0.0, steps_of_a_reading=STEPS_OF_A_READING, **others):
    rate = {"muon": 5e-3, "adamw": 2e-3}[matrices]
    optim = AdamWConfig(lr=rate, matrices=matrices, weight_decay=weight_decay, **others)
    steps = round(readings * steps_of_a_reading)
    return overfitting(build(replace(NETWORK, dropout=dropout)), readings, steps, tokens, optim)


def test_the_more_parameters_a_token_has_the_fewer_readings_pay_and_four_always_do():
    sizes = (10_000, 100_000, 1_000_000, 10_000_000, 10**9)
    found = [useful_readings(parameters, 1_000_000, "muon") for parameters in sizes]
    assert found == sorted(found, reverse=True)
    assert found[-1] == 4


@pytest.mark.parametrize(("matrices", "decay"), [("muon", 3), ("adamw", 1)])
def test_a_run_is_told_once_it_reads_more_often_and_does_not_learn_by_the_recipe(matrices, decay):
    parameters = build(NETWORK).parameter_count(non_embedding=False)
    useful = useful_readings(parameters, parameters, matrices)
    assert told(0.9 * useful, parameters, matrices) is None
    said = told(1.1 * useful, parameters, matrices)
    assert f"{parameters:,} tokens will be read {1.1 * useful:,.0f} times" in said
    assert f"(model.optim.weight_decay={decay})" in said
    often = told(1.1 * OFTEN * useful, parameters, matrices)
    assert f"weight_decay={decay} and model.gpt.dropout={DROPOUT})" in often
    assert told(1.1 * useful, parameters, matrices, dropout=DROPOUT / 2) is None
    assert told(1.1 * useful, parameters, matrices, weight_decay=decay / 2) is None


def test_the_decay_goes_with_the_steps_that_a_reading_takes_and_with_the_rate_of_the_matrices():
    def decay(**others):
        said = told(20, 100, "muon", weight_decay=0.0, **others)
        return float(re.search(r"weight_decay=([\d.]+)", said)[1])

    assert decay() == 3
    assert decay(steps_of_a_reading=39 * 8) == 0.8  # 3 / 8 ** (2 / 3), in one digit
    assert decay(muon_lr=5e-2) == 0.3
    assert decay(muon_lr=5e-4) == 3  # none above what was measured


def test_a_run_whose_decay_is_the_recipes_is_told_of_dropout_alone_and_only_where_it_reads_very_often():
    parameters = build(NETWORK).parameter_count(non_embedding=False)
    useful = useful_readings(parameters, parameters, "muon")
    assert told(1.1 * useful, parameters, "muon", steps_of_a_reading=10_000) is None  # 0.1 is the rule's there
    assert f"(model.gpt.dropout={DROPOUT})" in told(4 * useful, parameters, "muon", steps_of_a_reading=10_000)


def test_another_optimizer_is_not_given_adamws_weight_decay():
    said = told(1000, 100, "adamw", class_path="torch.optim.SGD")
    assert "(model.gpt.dropout=0.1)" in said


@pytest.mark.parametrize("loop", LOOPS)
def test_every_loop_says_it_before_the_first_step_and_not_when_it_goes_on_or_fine_tunes(loop, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text(BOTTLES[:600])
    run = small_run(text, tmp_path / "root", "--model.gpt.dropout=0", "--data.batch_size=12")
    run = [option for option in run if "max_steps" not in option]
    assert loop(*run, "--trainer.max_steps=4") == 0
    assert "will be read" not in capsys.readouterr().out
    assert loop(*run, "--trainer.max_steps=60", "--trainer.val_check_interval=120") == 0
    said = capsys.readouterr().out
    assert said.count("tokens will be read") == 1
    assert said.index("will be read") < said.index("validation loss")
    assert loop(*run, "--trainer.max_steps=61", "--resume=auto", "--trainer.val_check_interval=122") == 0
    assert "will be read" not in capsys.readouterr().out


def run_of(config, vocab_size, tokens):
    """What `limited` is told of the run of a YAML on so many tokens, but for its optimizer, which stands last."""
    settings = SettingsCLI(args=["--config", str(config)]).settings
    gpt = build(replace(config_of(settings.model), vocab_size=vocab_size))
    data, trainer = settings.data, settings.trainer
    read = trainer.max_steps * trainer.accumulate_grad_batches * data.batch_size * data.block_size
    return gpt, read / tokens, trainer.max_steps, tokens, AdamWConfig(**settings.model.optim)


@pytest.mark.parametrize("path", [*sorted(CONFIGS.glob("*shakespeare*.yaml")), CONFIGS / "limited_char_cpu.yaml"])
def test_no_configuration_for_shakespeare_is_told(path):
    assert overfitting(*run_of(path, 66, SHAKESPEARE)) is None


@pytest.mark.parametrize(("name", "vocab_size", "tokens"), [("char_cpu", 66, SHAKESPEARE), ("cpu", 2048, BIBLE)])
def test_the_configurations_of_the_recipe_have_the_weight_decay_of_its_rule(name, vocab_size, tokens):
    *run, optim = run_of(CONFIGS / f"limited_{name}.yaml", vocab_size, tokens)
    assert limited(*run, replace(optim, weight_decay=0.1)) == {"model.optim.weight_decay": optim.weight_decay}


def test_the_page_on_ones_own_text_sends_a_few_megabytes_to_a_configuration_that_is_not_told():
    page = (CONFIGS.parent / "docs" / "own_text.md").read_text(encoding="utf-8")
    name, vocab_size = re.search(r"With a few megabytes, `configs/(\w+)\.yaml` [^`]+`bpe:(\d+)`", page).groups()
    with torch.device("meta"):
        assert overfitting(*run_of(CONFIGS / f"{name}.yaml", int(vocab_size), BIBLE)) is None
        assert "by heart" in overfitting(*run_of(CONFIGS / "course.yaml", 32_000, BIBLE))
