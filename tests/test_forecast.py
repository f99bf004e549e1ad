"""The law against losses whose law is known, the family of runs by hand, and the command on a small text."""

import itertools
import math
import random
import re
import subprocess
import sys
import time

import numpy as np
import pytest

from nanogpt_lit.__main__ import main
from nanogpt_lit.cli.settings import SettingsCLI
from nanogpt_lit.data.datamodule import TokenDataModule
from nanogpt_lit.forecast.law import BENDS, SHARES, SHARES_DEVIATION, Law, Point
from nanogpt_lit.forecast.pairs import UNLIKE, loss_of_pairs, unlikeness
from nanogpt_lit.forecast.run import Speed, offered
from nanogpt_lit.forecast.sizes import RUNS, SizedRuns, choose, nearest, rate, scaled, sized, with_tokens
from nanogpt_lit.gpt.gpt2 import GPTConfig
from nanogpt_lit.gpt.llama import LlamaConfig

OWN = sized(GPTConfig(block_size=64, vocab_size=65, n_layer=4, n_head=4, n_embd=64), 2000, 4, 4)


def points(noise=0.0, seed=0, E=1.0, A=0.3, a=0.3, B=0.4, b=0.35, least_times=10):
    """Losses of the runs that a forecast makes, by a law of known numbers: that of the run itself is E + A + B."""
    generator = random.Random(seed)
    found = []
    for times, _, mix in RUNS:
        n, d = (least_times * times) ** -mix, (least_times * times) ** (mix - 1)
        loss = (E + A / n**a + B / d**b) * math.exp(noise * generator.gauss(0, 1))
        found.append(Point(n, d, loss))
    return found


def test_a_law_without_noise_is_found_again():
    said = Law(points()).forecast(1, 1)
    assert said.loss == pytest.approx(1.0 + 0.3 + 0.4, rel=0.02)
    assert said.low < 1.7 < said.high
    assert said.high - said.low < 0.1 * said.loss


def test_the_mean_of_each_normal_law_is_the_least_squares_of_a_naive_fit():
    """For the exponents and the noise that most laws have, against a plain solution of the same equations."""
    law = Law(points(0.01))
    cells, counts = np.unique(law.laws[:, 3:], axis=0, return_counts=True)
    a, b, noise = cell = cells[counts.argmax()]
    of_cell = law.laws[(law.laws[:, 3:] == cell).all(1), :3]
    N, D, loss = np.array([(p.parameters, p.tokens, p.loss) for p in law.points]).T
    N, D, loss = (each / np.exp(np.log(each).mean()) for each in (N, D, loss))
    tens = np.log10((N * D).max() / (N * D))
    rows = np.column_stack([loss**0, N**-a, D**-b]) / loss[:, None] / np.hypot(noise, BENDS * tens)[:, None]
    rows = np.vstack([rows, np.diag(1 / SHARES_DEVIATION)])
    wanted = np.concatenate([1 / np.hypot(noise, BENDS * tens), SHARES / SHARES_DEVIATION])
    least = np.linalg.lstsq(rows, wanted)[0]
    spread = np.sqrt(np.diag(np.linalg.inv(rows.T @ rows)))
    # Means of so many draws; those below zero are left out, of which there are few.
    assert np.abs(of_cell.mean(0) - least).max() < 5 * (spread / len(of_cell) ** 0.5).max()


def test_what_a_law_says_of_other_sizes_is_its_own():
    law = Law(points())
    for n, d in ((0.1, 1.0), (1.0, 0.1), (0.3, 3.0)):
        assert law.forecast(n, d).loss == pytest.approx(1.0 + 0.3 / n**0.3 + 0.4 / d**0.35, rel=0.02)


@pytest.mark.parametrize("times", [10, 100, 1000])
def test_the_interval_holds_nine_times_in_ten(times):
    """Of laws that are drawn as the literature has them, with noisy runs."""
    inside, generator = 0, random.Random(0)
    for seed in range(60):
        E, A, B = (median * math.exp(0.4 * generator.gauss(0, 1)) for median in (1.0, 0.3, 0.4))
        a, b = (0.3 * math.exp(0.3 * generator.gauss(0, 1)) for _ in range(2))
        said = Law(points(0.007, seed, E, A, a, B, b, times)).forecast(1, 1)
        inside += said.low <= (E + A + B) * math.exp(0.007 * generator.gauss(0, 1)) <= said.high
    assert 48 <= inside <= 60  # a binomial of 60 and 0.9 is below 48 once in a hundred


def test_noise_and_distance_make_the_interval_wider_and_more_tokens_never_hurt():
    quiet, noisy = (Law(points(noise, 3)) for noise in (0.001, 0.03))
    assert quiet.fits
    assert noisy.fits
    assert not Law(points(0.1, 3)).fits
    widths = [said.high - said.low for said in (quiet.forecast(1, 1), noisy.forecast(1, 1))]
    assert widths[1] > 1.2 * widths[0]
    far = quiet.forecast(10, 10)
    assert (far.high - far.low) / far.loss > 2 * widths[0] / quiet.forecast(1, 1).loss
    assert (quiet.losses(1, 2) < quiet.losses(1, 1)).all()


def test_a_smaller_network_keeps_its_depth_the_channels_of_a_head_and_the_groups_of_its_keys():
    half = scaled(GPTConfig(vocab_size=65, n_layer=12, n_head=12, n_embd=768), 0.5)
    assert (half.n_layer, half.n_head, half.n_embd) == (12, 6, 384)
    llama = LlamaConfig(vocab_size=65, n_layer=30, n_head=9, n_kv_head=3, n_embd=576, n_hidden=1536)
    third = scaled(llama, 1 / 3)
    assert (third.n_layer, third.n_head, third.n_kv_head, third.n_embd, third.n_hidden) == (30, 3, 1, 192, 512)
    assert scaled(llama, 1.0) == llama
    assert scaled(llama, 1e-3).n_embd == 12  # a group of three heads, each of the fewest channels


def test_rates_follow_the_size_the_batch_and_the_tokens():
    assert rate(OWN, OWN) == 1
    half = with_tokens(OWN, nearest(OWN, 1 / 4), OWN.tokens)
    assert (half.network.n_layer, half.network.n_embd) == (4, 32)
    assert rate(OWN, half) == pytest.approx(2**0.5)
    short = with_tokens(OWN, OWN, OWN.tokens / 16)  # a quarter of the steps, each of a quarter of the batch
    assert (short.steps, short.batch_size * short.accumulate_grad_batches) == (500, 4)
    assert rate(OWN, short) == pytest.approx(0.5 * 16**0.32)


def test_runs_keep_to_the_budget_and_are_smaller_by_a_factor_at_least():
    runs = choose(OWN, lambda run: run.flops, 0.1 * OWN.flops)
    assert len(runs) == len(RUNS)
    assert sum(run.flops for run in runs) < 0.1 * OWN.flops
    rich = choose(OWN, lambda run: run.flops, math.inf, 10)
    assert max(run.flops for run in rich) == pytest.approx(OWN.flops / 10, rel=0.01)
    assert choose(OWN, lambda run: run.flops, 1e-6 * OWN.flops) == []


def test_the_best_network_for_some_hours_is_that_of_the_law():
    law = Law([Point(p.parameters * OWN.parameters, p.tokens * OWN.tokens, p.loss) for p in points()])
    speed = Speed(0.0, 1e-12, 1, 1)
    hours = OWN.flops * 1e-12 / 3600
    offers = offered(law, OWN, speed, hours, math.inf)
    best = min(offers, key=lambda offer: offer.forecast.loss)

    def loss(run):  # by the numbers that the points were made with
        return 1.0 + 0.3 * (OWN.parameters / run.parameters) ** 0.3 + 0.4 * (OWN.tokens / run.tokens) ** 0.35

    known = min((offer.run for offer in offers), key=loss)
    assert loss(best.run) == pytest.approx(loss(known), rel=0.003)
    assert all(offer.run.flops <= 1.001 * OWN.flops for offer in offers)
    few = offered(law, OWN, speed, hours, OWN.tokens / 2)  # a text of which no more counts
    assert max(offer.run.tokens for offer in few) <= OWN.tokens / 2


def test_the_loss_of_pairs_is_that_of_a_naive_count(tmp_path):
    generator = random.Random(0)
    (tmp_path / "text.txt").write_text("".join(generator.choice("abc" if n % 2 else "de") for n in range(4000)))
    data = TokenDataModule(
        source=str(tmp_path / "text.txt"), tokenizer="byte", shards_dir=str(tmp_path / "shards"), val_fraction=0.2,
        block_size=16,
    )  # fmt: skip
    data.prepare_data()
    # a, b or c after d or e, and the other way: log 3 and log 2 by turns.
    assert loss_of_pairs(data.folder, data.vocab_size) == pytest.approx((math.log(3) + math.log(2)) / 2, abs=0.03)


def test_the_end_of_a_text_is_unlike_the_rest_where_it_is_of_another_kind_and_not_where_the_kinds_are_mixed(
    tmp_path, monkeypatch
):
    generator = random.Random(0)

    def unlike(kinds):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        # Each kind has an order of its own, which a quarter of the letters break.
        text = "".join(
            generator.choice("abcdef") if n % 4 == 0 else order[n % 6] for order in kinds for n in range(200)
        )
        (folder / "text.txt").write_text(text)
        data = TokenDataModule(
            source=str(folder / "text.txt"), tokenizer="byte", shards_dir=str(folder / "shards"), val_fraction=0.2,
            block_size=16,
        )  # fmt: skip
        data.prepare_data()
        return unlikeness(data.folder, data.vocab_size)

    kinds = ["abcdef"] * 80 + ["fedcba"] * 20
    assert unlike(kinds) > 2 * UNLIKE
    generator.shuffle(kinds)
    assert unlike(kinds) < 0
    assert unlike(["abcdef"] * 100) < 0

    # Of a text too long to be read whole the beginning alone says nothing: parts all over it are read.
    kinds = ["abcdef"] * 30 + ["abcdef", "fedcba"] * 35
    whole = unlike(kinds)
    monkeypatch.setattr("nanogpt_lit.forecast.pairs.MOST_TOKENS", 4000)
    assert whole < UNLIKE
    assert unlike(kinds) < UNLIKE


@pytest.fixture
def config(tmp_path):
    """The run of a text that takes more than pairs to know: numbers, in their order, in words."""
    text, path = tmp_path / "text.txt", tmp_path / "small.yaml"
    digits = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    text.write_text("\n\n".join(" ".join(digits[int(d)] for d in str(n)) for n in range(3000)))
    path.write_text(f"""\
trainer: {{default_root_dir: {(tmp_path / "runs").as_posix()}, max_steps: 500, val_check_interval: 250}}
model:
  gpt: {{n_layer: 2, n_head: 2, n_embd: 16}}
  optim: {{lr: 1.0e-2}}
  schedule: {{warmup_steps: 10}}
data: {{source: {text.as_posix()}, tokenizer: byte, val_fraction: 0.1, block_size: 16, batch_size: 4}}
""")
    return path


@pytest.fixture
def known_law(monkeypatch):
    """Runs that are not trained: their losses are those of a law, as shares of what a table of pairs has."""

    def run(self, tried, steps, seed, val_batches):
        n, d = tried.parameters / self.own.parameters, tried.tokens / self.own.tokens
        return 0.2 + 0.06 / n**0.3 + 0.08 / d**0.35, []

    monkeypatch.setattr("nanogpt_lit.forecast.sizes.SizedRuns.run", run)
    monkeypatch.setattr(
        "nanogpt_lit.forecast.sizes.SizedRuns.speeds",
        lambda self, several, budget_s: {
            each: 1e-3 + 1e-9 * each.step_tokens * each.flops_per_token for each in several
        },
    )


def test_the_command_says_what_the_run_will_reach_and_draws_it(config, known_law, capsys):
    assert main(["forecast", "--config", str(config), "--hours", "0.01", "--trainer.limit_val_batches=30"]) == 0
    shown = capsys.readouterr().out
    loss, low, high = map(float, re.search(r"validation loss +(\S+)  (\S+) to (\S+)", shown).groups())
    assert loss == pytest.approx(0.34, rel=0.01)
    assert low < 0.34 < high
    bits = float(re.search(r"bits per byte +(\S+)", shown)[1])
    assert bits == pytest.approx(loss / math.log(2), rel=0.02)  # a byte is a token, but for end-of-text
    hours = float(re.search(r"hours +(\S+)", shown)[1])
    own_flops = (
        64 * sized(GPTConfig(block_size=16, vocab_size=257, n_layer=2, n_head=2, n_embd=16), 1, 1, 1).flops_per_token
    )
    assert hours == pytest.approx(520 * (1e-3 + 1e-9 * own_flops) / 3600, rel=0.01)  # two validations of 30
    assert "In 0.01 hours:" in shown
    assert shown.count("  best") == 1
    assert shown.count("  yours") == 1
    assert (config.parent / "runs/forecast.svg").read_text().lstrip().startswith("<?xml")


def test_muons_rate_keeps_its_share_of_adamws_in_a_smaller_run(config):
    options = ["--model.network=llama", "--model.llama.n_layer=2", "--model.llama.n_head=2", "--model.llama.n_embd=64",
               "--model.optim.matrices=muon", "--model.optim.muon_lr=5e-3"]  # fmt: skip
    cli = SettingsCLI(args=[f"--config={config}", *options])
    cli.complete_settings()
    runs = SizedRuns(cli.settings, cli.device, time.perf_counter)
    small = with_tokens(runs.own, nearest(runs.own, 1 / 4), runs.own.tokens / 4)
    optim = runs.build(small, small.steps).optim_config
    assert optim.lr == pytest.approx(1e-2 * rate(runs.own, small))
    assert optim.muon_lr == pytest.approx(optim.lr / 2)


def test_what_a_law_cannot_know_is_said_in_one_sentence(config, known_law, capsys, monkeypatch):
    for options, sentence in (
        (["--init_from", "hf:openai-community/gpt2@607a30d783dfa663caf39e06633721c8d4cfcd7e"], "cannot be known from"),
        (["--trainer.max_steps", "100000"], "times can be forecast: --trainer.max_steps="),
        (["--budget", "0.5s"], "--budget=0.5s is too short to know anything"),
        (["--trainer.max_steps", "60"], "are still warming up"),
        (["--hours", "0"], "--hours=0.0 is no time"),
    ):
        assert main(["forecast", "--config", str(config), *options]) == 2
        error = capsys.readouterr().err
        assert sentence in error
        assert error.count("\n") == 1
    with monkeypatch.context() as changed:
        changed.setattr("nanogpt_lit.forecast.run.unlikeness", lambda folder, vocab_size: UNLIKE + 0.005)
        assert main(["forecast", "--config", str(config)]) == 2
        assert "each half of it foretells the other 8% better than the rest does" in capsys.readouterr().err
    monkeypatch.setattr("nanogpt_lit.forecast.run.loss_of_pairs", lambda folder, vocab_size: 0.1)
    assert main(["forecast", "--config", str(config)]) == 0
    assert "cannot know: a law takes 6 runs below 0.0900, the best below 0.0800: 90% and 80%" in capsys.readouterr().out
    monkeypatch.setattr("nanogpt_lit.forecast.run.loss_of_pairs", lambda folder, vocab_size: 1.0)
    monkeypatch.setattr("nanogpt_lit.forecast.sizes.SizedRuns.run", lambda *given: (0.82, []))
    assert main(["forecast", "--config", str(config)]) == 0
    assert "Of 9 runs 9 are, the best at 0.8200, and 0 diverged" in capsys.readouterr().out


def test_runs_that_follow_no_law_give_no_forecast(config, known_law, capsys, monkeypatch):
    losses = itertools.cycle((0.4, 0.3, 0.5))
    monkeypatch.setattr("nanogpt_lit.forecast.sizes.SizedRuns.run", lambda *given: (next(losses), []))
    assert main(["forecast", "--config", str(config)]) == 0
    shown = capsys.readouterr().out
    assert "cannot know: the runs follow no law that falls with weights and tokens to within 2% of the loss." in shown
    assert "9 times in 10" not in shown


def test_a_run_of_thousands_of_times_the_work_gets_an_answer_with_a_wide_interval(config, known_law, capsys):
    long = ["--model.gpt.n_layer=12", "--model.gpt.n_head=12", "--model.gpt.n_embd=768", "--trainer.max_steps=700"]
    assert main(["forecast", "--config", str(config), "--budget", "60s", *long]) == 0
    shown = capsys.readouterr().out
    times = float(re.search(r"The run is ([\d,]+) times the work", shown)[1].replace(",", ""))
    loss, low, high = map(float, re.search(r"validation loss +(\S+)  (\S+) to (\S+)", shown).groups())
    assert times > 1000
    assert low < 0.34 < high
    assert 0.1 < (high - low) / 2 / loss < 0.25


def test_help_comes_without_torch():
    code = "import sys; from nanogpt_lit.__main__ import main\ntry: main(['forecast', '--help'])\n"
    code += "finally: assert 'torch' not in sys.modules"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert answer.returncode == 0, answer.stderr
    assert "--hours" in answer.stdout


@pytest.mark.long
def test_a_real_forecast_trains_its_runs_and_says_less_than_any_of_them_reached(config, capsys):
    modern = [
        "--data.source=stdlib", "--data.val_fraction=0.02", "--data.block_size=64", "--data.batch_size=8",
        "--model.network=llama", "--model.llama.n_layer=2", "--model.llama.n_head=4", "--model.llama.n_embd=64",
        "--model.llama.qk_norm=true", "--model.llama.tied_head=false", "--model.optim.matrices=muon",
        "--model.optim.lr=5e-3", "--trainer.max_steps=1000", "--trainer.limit_val_batches=40",
    ]  # fmt: skip
    # Far more than its runs take.
    assert main(["forecast", "--config", str(config), "--budget", "10min", *modern]) == 0
    shown = capsys.readouterr().out
    runs = [
        float(loss) for loss in re.findall(r"^  \d+ x \d+, [\d,]+ tokens in [\d,]+ steps: (\S+)$", shown, flags=re.M)
    ]
    assert len(runs) >= 6
    assert float(re.search(r"validation loss +(\S+)", shown)[1]) < min(runs)
