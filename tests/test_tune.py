"""The search against a landscape whose best is known, and the command on a text of a few kilobytes."""

import math
import random
import re
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml
from small_runs import BOTTLES

from nanogpt_lit.__main__ import main
from nanogpt_lit.gpt.gpt2 import GPTConfig
from nanogpt_lit.gpt.llama import LlamaConfig
from nanogpt_lit.gpt.networks import config_of, described
from nanogpt_lit.optim.adamw import AdamWConfig
from nanogpt_lit.optim.schedule import ScheduleConfig
from nanogpt_lit.tune.command import seconds_of_budget
from nanogpt_lit.tune.search import RATES, Found, Run, decide, search, surely_better
from nanogpt_lit.tune.trials import (
    MODERN,
    MUON_SHARE,
    NANOGPT,
    RECIPES,
    Candidate,
    micro_batches,
    model_section,
    other_steps,
    recipe_of,
)

CONFIGS = Path(__file__).parents[1] / "configs"
OWN = Candidate("nanogpt", 1e-3, 8, 2)
SEQUENCE_S = 0.001


class Landscape:
    """Trains nothing: a loss by recipe, rate and steps, on a clock of its own.

    best: recipe to its best rate and its loss there   noise: between seeds   machine: how much slower than measured
    """

    val_batches = 10

    def __init__(self, best, noise=0.0, diverges_above=math.inf, machine=1.0, stop_after=None):
        self.best, self.noise, self.diverges_above = best, noise, diverges_above
        self.machine, self.stop_after = machine, stop_after
        self.now_s, self.budget_s, self.runs = 0.0, math.inf, 0

    def step_s(self, candidate):
        return candidate.sequences * SEQUENCE_S * (1.5 if candidate.recipe == "modern" else 1.0)

    def loss(self, candidate, steps, seed=None):
        rate, loss = self.best[candidate.recipe]
        loss += 0.1 * math.log2(candidate.lr / rate) ** 2 - 0.02 * math.log(steps * candidate.sequences)
        if seed is not None:
            loss += self.noise * random.Random(f"{candidate} {seed}").gauss(0, 1)
        return math.inf if candidate.lr > self.diverges_above else loss

    def speeds(self, candidates, budget_s):
        self.now_s += budget_s
        return {candidate: self.step_s(candidate) for candidate in candidates}

    def run(self, candidate, steps, seed, val_batches):
        self.runs += 1
        took_s = steps * self.step_s(candidate) * self.machine
        if self.now_s + took_s > self.budget_s or self.runs == self.stop_after:
            self.now_s = min(self.now_s + took_s, self.budget_s)
            return None
        self.now_s += took_s
        return self.loss(candidate, steps, seed), []


def found_in(landscape, budget_s=600.0, max_steps=100_000, recipes=("nanogpt", "modern")):
    landscape.budget_s = budget_s
    return search(
        landscape, OWN, recipes, max_steps, budget_s, lambda: landscape.now_s,
        fits=lambda candidate: candidate.batch_size <= OWN.batch_size, report=lambda line: None,
    )  # fmt: skip


@pytest.mark.parametrize(
    "best",
    [
        {"nanogpt": (4e-3, 2.0), "modern": (2e-3, 2.5)},
        {"nanogpt": (1e-3, 2.5), "modern": (2e-3, 2.0)},
        {"nanogpt": (5e-4, 2.0), "modern": (2.5e-4, 2.4)},
    ],
)
def test_the_best_of_a_known_landscape_is_found(best):
    landscape = Landscape(best)
    decision = decide(found_in(landscape))
    # At equal time: by steps that a recipe does not have, another would win.
    grid = [replace(OWN, recipe=recipe, lr=OWN.lr * by) for recipe in best for by in RATES]
    known = min(grid, key=lambda c: landscape.loss(c, int(decision.given_s / landscape.step_s(c))))
    chosen = decision.challenger
    assert (chosen.recipe, chosen.sequences) == (known.recipe, known.sequences)
    assert chosen.lr == pytest.approx(known.lr)
    assert decision.sure is True


def test_a_recipe_is_compared_at_equal_time_and_not_at_equal_steps():
    class BySteps(Landscape):
        def loss(
            self, candidate, steps, seed=None
        ):  # modern is a little better at a step, and a step half as long again
            return 10 - math.log(steps) - (0.1 if candidate.recipe == "modern" else 0)

    assert decide(found_in(BySteps({}))).challenger.recipe == "nanogpt"


def test_a_rate_that_diverges_is_never_chosen():
    landscape = Landscape({"nanogpt": (4e-3, 2.0), "modern": (4e-3, 1.5)}, diverges_above=2.5e-3)
    found = found_in(landscape)
    assert any(math.isinf(run.loss) for run in found.runs)
    decision = decide(found)
    assert decision.challenger.lr <= 2.5e-3
    assert decision.proposed.lr <= 2.5e-3


def test_what_diverges_on_the_seeds_that_decide_is_not_proposed():
    class Unlucky(Landscape):
        def loss(self, candidate, steps, seed=None):
            return math.inf if seed == 2 and candidate.lr > OWN.lr else super().loss(candidate, steps, seed)

    decision = decide(found_in(Unlucky({"nanogpt": (4e-3, 2.0), "modern": (4e-3, 1.5)})))
    assert decision.sure is False
    assert decision.proposed == OWN


def test_a_difference_within_the_noise_keeps_the_yamls_values():
    kept = 0
    for n in range(20):
        landscape = Landscape({"nanogpt": (1e-3, 2.0), "modern": (1e-3, 2.0)}, noise=0.0)
        noise = random.Random(n)
        landscape.loss = lambda candidate, steps, seed=None, noise=noise: 2 + noise.gauss(0, 0.1)
        kept += decide(found_in(landscape)).proposed == OWN
    assert kept >= 17  # one in twenty may pass a test at 95 %; three would be rare


def test_a_gain_must_exceed_what_the_seeds_make():
    assert surely_better([0.1, 0.11, 0.09]) is True
    assert surely_better([0.1, -0.02, 0.01]) is False
    # Student's t of these three is 2.9: just below, and just above, the 2.92 of its tables.
    assert surely_better([1.0, 1.0 + 0.597, 1.0 - 0.597]) is False
    assert surely_better([1.0, 1.0 + 0.588, 1.0 - 0.588]) is True
    assert surely_better([0.5]) is None


@pytest.mark.parametrize("machine", [0.8, 1.0, 1.3, 2.0])
def test_the_budget_is_kept_within_a_tenth(machine):
    landscape = Landscape({"nanogpt": (4e-3, 2.0), "modern": (2e-3, 2.5)}, machine=machine)
    found = found_in(landscape)
    assert 0.9 * 600 <= landscape.now_s <= 1.1 * 600
    assert decide(found).gains, "it had no time to compare over seeds"


def test_no_run_is_longer_than_the_yamls():
    landscape = Landscape({"nanogpt": (4e-3, 2.0), "modern": (2e-3, 2.5)})
    found = found_in(landscape, max_steps=200)
    assert max(run.given_s for run in found.runs) == pytest.approx(200 * landscape.step_s(OWN))


def test_the_same_measurements_give_the_same_proposal():
    first, second = (found_in(Landscape({"nanogpt": (4e-3, 2), "modern": (2e-3, 2)}, noise=0.01)) for _ in range(2))
    assert first.runs == second.runs
    assert decide(first) == decide(second)


@pytest.mark.parametrize("stop_after", [2, 8, 14, 18])
def test_a_search_that_is_stopped_proposes_the_best_so_far(stop_after):
    decision = decide(found := found_in(Landscape({"nanogpt": (2e-3, 2), "modern": (2e-3, 3)}, stop_after=stop_after)))
    assert len(found.runs) == stop_after - 1
    assert decision.sure is None
    longest = max(run.round for run in found.runs)
    best = min((run for run in found.runs if run.round == min(longest, 2)), key=lambda run: run.loss)
    assert decision.challenger == best.candidate


def test_a_search_that_measured_nothing_proposes_nothing():
    landscape = Landscape({"nanogpt": (2e-3, 2), "modern": (2e-3, 3)}, stop_after=1)
    assert decide(found_in(landscape)) is None


def test_where_every_run_diverges_nothing_is_proposed():
    landscape = Landscape({"nanogpt": (4e-3, 2.0), "modern": (4e-3, 1.5)}, diverges_above=0.0)
    assert decide(found_in(landscape)) is None


def test_a_short_runs_rate_is_lowered_for_a_long_one_and_the_yamls_kept_in_between():
    found = found_in(Landscape({"nanogpt": (4e-3, 2.0), "modern": (2e-3, 2.5)}), max_steps=100_000)
    decision = decide(found)
    share = decision.given_s / found.run_s
    assert 0.013 < share < 0.1
    expected = 4e-3 * max(0.25, share**0.32)
    assert decision.proposed.lr == pytest.approx(max(expected, OWN.lr), rel=0.05)
    whole = decide(found_in(Landscape({"nanogpt": (4e-3, 2.0), "modern": (2e-3, 2.5)}), max_steps=500))
    assert whole.proposed.lr == 4e-3
    between = decide(found_in(Landscape({"nanogpt": (2e-3, 2.0), "modern": (2e-3, 2.5)}), max_steps=10**6))
    assert between.proposed.lr == OWN.lr


def test_a_budget_that_is_too_short_is_refused_with_one_that_does():
    landscape = Landscape({"nanogpt": (2e-3, 2), "modern": (2e-3, 3)})
    with pytest.raises(ValueError, match=r"--budget=5s is too short: .* needs --budget 1min"):
        found_in(landscape, budget_s=5.0)
    assert found_in(landscape, budget_s=60.0).runs


def test_the_budget_that_is_advised_works_where_the_machine_is_slower_the_second_time():
    class Uneven(Landscape):
        slower = 0.7  # measured for a moment only, a step may look short

        def step_s(self, candidate):
            return 30 * super().step_s(candidate)

        def speeds(self, candidates, budget_s):
            measured = super().speeds(candidates, budget_s)
            return {candidate: step_s * self.slower for candidate, step_s in measured.items()}

    landscape = Uneven({"nanogpt": (2e-3, 2), "modern": (2e-3, 3)})
    with pytest.raises(ValueError, match=r"needs --budget \d+min") as refused:
        found_in(landscape, budget_s=60.0)
    minutes = int(re.search(r"(\d+)min", str(refused.value))[1])
    again = Uneven({"nanogpt": (2e-3, 2), "modern": (2e-3, 3)})
    again.slower = 1.0
    assert decide(found_in(again, budget_s=60.0 * minutes)) is not None


def test_micro_batches_make_the_same_step_and_other_steps_twice_and_half():
    assert {(c.batch_size, c.accumulate_grad_batches) for c in micro_batches(OWN)} == {(8, 2), (16, 1), (4, 4), (2, 8)}
    assert [c.sequences for c in other_steps(OWN)] == [32, 8]
    assert [c.lr for c in other_steps(OWN)] == pytest.approx([2**0.5 * 1e-3, 0.5**0.5 * 1e-3])


def test_the_faster_micro_batch_is_taken():
    class Small(Landscape):
        def step_s(self, candidate):
            return super().step_s(candidate) * (0.8 if candidate.batch_size == 4 else 1)

    decision = decide(found_in(Small({"nanogpt": (2e-3, 2), "modern": (2e-3, 3)})))
    assert (decision.proposed.batch_size, decision.proposed.accumulate_grad_batches) == (4, 4)


def test_a_machine_that_becomes_slower_does_not_change_what_is_compared():
    class Slowing(Landscape):
        measured = 0

        def speeds(self, candidates, budget_s):
            self.measured += 1
            return {c: s * (3.0 if self.measured > 2 else 1.0) for c, s in super().speeds(candidates, budget_s).items()}

    found = found_in(landscape := Slowing({"nanogpt": (4e-3, 2.0), "modern": (2e-3, 2.5)}))
    assert landscape.measured == 4
    for candidate, step_s in found.speeds.items():
        assert step_s == pytest.approx(landscape.step_s(candidate))


@pytest.mark.parametrize(("text", "seconds"), [("600s", 600), ("10min", 600), ("1h", 3600), ("1.5 h", 5400)])
def test_a_budget_is_a_number_with_its_unit(text, seconds):
    assert seconds_of_budget(text) == seconds


@pytest.mark.parametrize(
    ("name", "muon_lr", "recipe", "expected"),
    [
        ("shakespeare_char_cpu", None, "modern", 2e-3),  # the recipe's share of the rate that is tried
        ("modern_char_cpu", 5e-3, "modern", 2e-3),  # the YAML's share of it, which is the recipe's
        ("modern_char_cpu", 2e-2, "modern", 8e-3),  # the YAML's share
        ("modern_char_cpu", None, "modern", None),  # one rate for both, as in the YAML
        ("modern_char_cpu", 5e-3, "nanogpt", None),
    ],
)
def test_a_candidate_has_the_recipes_two_rates_or_the_yamls(name, muon_lr, recipe, expected):
    model = whole_model(name)
    model["optim"] |= {"lr": 1e-2, "muon_lr": muon_lr}
    own = Candidate(recipe_of(model), 1e-2, 12, 1)
    section = model_section(model, own, replace(own, recipe=recipe, lr=4e-3))
    assert section["optim"]["lr"] == 4e-3
    assert section["optim"]["muon_lr"] == pytest.approx(expected)
    AdamWConfig(**section["optim"])  # is not refused


@pytest.mark.parametrize("text", ["10", "ten", "-1min", "0s", "1d"])
def test_another_budget_is_refused(text):
    with pytest.raises(ValueError, match="is not a time; 600s, 10min and 1h are"):
        seconds_of_budget(text)


def whole_model(name):
    """The model section of a configuration, with all fields, as fit has it."""
    section = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))["model"]
    kinds = {"optim": AdamWConfig, "schedule": ScheduleConfig}
    shapes = {"gpt": asdict(GPTConfig()), "llama": asdict(LlamaConfig())}
    return shapes | described(config_of(section)) | {key: asdict(kind(**section[key])) for key, kind in kinds.items()}


def test_the_recipes_are_those_of_the_configurations():
    assert recipe_of(whole_model("shakespeare_char_cpu")) == recipe_of(whole_model("rtx2050")) == "nanogpt"
    assert recipe_of(whole_model("modern_char_cpu")) == recipe_of(whole_model("modern_rtx2050")) == "modern"
    assert set(NANOGPT["optim"]) == {*MODERN["optim"], "muon_lr"}
    assert set(NANOGPT["schedule"]) == set(MODERN["schedule"])
    rates = whole_model("modern_char_cpu")["optim"]
    assert rates["muon_lr"] == MUON_SHARE * rates["lr"]
    mixture = whole_model("rtx2050")
    mixture["optim"]["matrices"] = "muon"
    assert recipe_of(mixture) is None
    assert list(RECIPES) == ["nanogpt", "modern"]


@pytest.fixture
def config(text, tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(f"""\
trainer: {{default_root_dir: {(tmp_path / "runs").as_posix()}, max_steps: 50, val_check_interval: 25}}
model:
  gpt: {{n_layer: 1, n_head: 2, n_embd: 8}}
  optim: {{lr: 1.0e-4}}
  schedule: {{warmup_steps: 10}}
data: {{source: {text.as_posix()}, tokenizer: byte, val_fraction: 0.1, block_size: 16, batch_size: 4}}
""")
    return path


def test_a_real_search_writes_a_yaml_that_fit_trains(config, capsys):
    assert main(["tune", "--config", str(config), "--budget", "5min"]) == 0  # far more than its runs take
    shown = capsys.readouterr().out
    tuned = config.with_name("small_tuned.yaml")
    assert "sure: the gain is more than the seeds make" in shown  # the rate of the YAML is far too low for 50 steps
    before, after = (yaml.safe_load(path.read_text()) for path in (config, tuned))
    assert after["model"]["optim"]["lr"] > before["model"]["optim"]["lr"]
    assert after["data"]["source"] == before["data"]["source"]
    assert "weight_decay" not in after["model"]["optim"]  # 50 steps read the text once
    assert "was 0.0001" in tuned.read_text()
    assert tuned.with_suffix(".svg").read_text().lstrip().startswith("<?xml")
    two_steps = ["--trainer.max_steps=2", "--trainer.val_check_interval=2", "--trainer.limit_val_batches=1"]
    assert main(["fit", "--config", str(tuned), *two_steps]) == 0
    assert main(["tune", "--config", str(config), "--budget", "12s"]) == 2
    assert "small_tuned.yaml, which is there already" in capsys.readouterr().err


def test_what_a_search_could_not_write_or_follow_is_told_before_it_begins(config, tmp_path, capsys):
    (tmp_path / "mine.svg").write_text("a picture of mine")
    before = sorted(tmp_path.iterdir())
    for options, words in {
        ("--out", str(tmp_path / "new.svg")): "name it new.yaml",
        ("--out", str(tmp_path / "mine.yaml")): "mine.svg, which is there already",
        ("--out", str(tmp_path / "mine.svg" / "new.yaml")): "--out=",
        ("--resume", "auto"): "resume=auto goes on with a run",
    }.items():
        assert main(["tune", "--config", str(config), "--budget", "10s", *options]) == 2
        assert words in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def shorten(config, folder, length):
    """A text of so many characters in the place of the module's."""
    (folder / "short.txt").write_text(BOTTLES[:length])
    with_it = yaml.safe_load(config.read_text())
    with_it["data"]["source"] = str(folder / "short.txt")
    config.write_text(yaml.safe_dump(with_it))


def test_a_text_that_will_be_read_too_often_gets_the_recipe_for_it_by_rule(config, tmp_path, monkeypatch, capsys):
    def measured(trials, own, recipes, max_steps, *others):
        losses = {replace(own, lr=2 * own.lr): loss, own: 2.0}
        runs = [Run(candidate, 3, seed, 1.0, 50, losses[candidate]) for seed in (1, 2, 3) for candidate in losses]
        return Found(own, max_steps, {own: 1.0}, runs)

    monkeypatch.setattr("nanogpt_lit.tune.run.search", measured)
    shorten(config, tmp_path, 300)
    for loss in (1.0, 2.0):  # where another rate is better for sure, and where the YAML's values stay
        tuned = config.with_name(f"{loss}.yaml")
        assert main(["tune", "--config", str(config), "--out", str(tuned), "--trainer.max_steps=400"]) == 0
        assert "model.optim.weight_decay and model.gpt.dropout by the rule" in capsys.readouterr().out
        model = yaml.safe_load(tuned.read_text())["model"]
        assert model["optim"]["weight_decay"] == 1  # AdamW's
        assert model["gpt"]["dropout"] == 0.1
    assert main(["fit", "--config", str(tuned), "--trainer.limit_val_batches=0"]) == 0
    assert "will be read" not in capsys.readouterr().out


def test_the_recipe_for_a_small_text_goes_by_the_rate_that_tune_gives_to_muon(config, tmp_path, monkeypatch, capsys):
    def measured(trials, own, recipes, max_steps, *others):
        losses = {replace(own, recipe="modern", lr=0.12): 1.0, own: 2.0}
        runs = [Run(candidate, 3, seed, 1.0, 50, losses[candidate]) for seed in (1, 2, 3) for candidate in losses]
        return Found(own, max_steps, {own: 1.0, replace(own, recipe="modern"): 1.0}, runs)

    monkeypatch.setattr("nanogpt_lit.tune.run.search", measured)
    shorten(config, tmp_path, 2800)
    tuned = config.with_name("tuned.yaml")
    assert main(["tune", "--config", str(config), "--out", str(tuned), "--trainer.max_steps=2400"]) == 0
    assert "model.optim.weight_decay and model.llama.dropout by the rule" in capsys.readouterr().out
    model = yaml.safe_load(tuned.read_text())["model"]
    assert (model["optim"]["lr"], model["optim"]["muon_lr"]) == pytest.approx((3e-2, 1.5e-2))
    # 3 at a rate of 5e-3 and 39 steps a reading, as here: by Muon's rate a third of that, by the other a sixth.
    assert model["optim"]["weight_decay"] == 1
    assert model["llama"]["dropout"] == 0.1


def test_ctrl_c_writes_the_best_so_far(config, monkeypatch, capsys):
    said = []

    def say(line):
        said.append(line)
        if len(said) == 5:  # the heading of the round and four runs, each at twice the rate of the one before
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("nanogpt_lit.tune.run.search", lambda *arguments: search(*arguments[:-1], say))
    assert main(["tune", "--config", str(config), "--budget", "5min"]) == 130
    assert len(said) == 5
    assert "not sure: stopped before it was compared over seeds" in capsys.readouterr().out
    assert yaml.safe_load(config.with_name("small_tuned.yaml").read_text())["model"]["optim"]["lr"] == 2e-4


def test_what_the_user_can_mend_is_one_sentence(config, tmp_path, capsys):
    for options, sentence in (
        (["--budget", "soon"], "--budget=soon is not a time"),
        (["--budget", "0.1s"], "is too short"),
        (["--data.source", str(tmp_path / "none.txt")], "none.txt"),
        (["--trainer.devices", "2"], "tune measures one"),
    ):
        assert main(["tune", "--config", str(config), *options]) == 2
        error = capsys.readouterr().err
        assert sentence in error
        assert error.count("\n") == 1
    assert main(["tune", "--config", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml is no file" in capsys.readouterr().err


def test_help_comes_without_torch():
    code = "import sys; from nanogpt_lit.__main__ import main\ntry: main(['tune', '--help'])\n"
    code += "finally: assert 'torch' not in sys.modules"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert "--budget" in answer.stdout
