"""Pictures and numbers of README and docs against what they were made from: the plan, and the records beside them."""

import json
import math
import re
import sys
from pathlib import Path
from statistics import mean, median
from xml.etree import ElementTree

import pytest
import yaml
from small_networks import new_tokenizer, saved, trained
from test_planned_configs import CONFIGS, header

from nanogpt_lit.__main__ import main
from nanogpt_lit.cli.settings import SettingsCLI
from nanogpt_lit.forecast.law import Law, Point
from nanogpt_lit.parity.grid import AXES, every_combination
from nanogpt_lit.plan.budget import choose_budget
from nanogpt_lit.plan.command import own_rung, plan_run, plan_rung
from nanogpt_lit.run.overfitting import useful_readings

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *sorted(DOCS.glob("*.md")))}


def record(name):
    return json.loads((DOCS / f"{name}.json").read_text(encoding="utf-8"))


def words_of(picture):
    return ["".join(text.itertext()) for text in ElementTree.parse(DOCS / picture).findall(".//{*}text")]


def coordinates(picture):
    """Of a picture by matplotlib, to be compared within 0.01: other versions round otherwise.

    The first number is the version, in the header.
    """
    return [float(n) for n in re.findall(r"(?<![\w#.])\d+\.\d+", picture.read_text(encoding="utf-8"))[1:]]


# Planned memory. That the headers of the configurations say what is planned today: tests/test_planned_configs.py.


@pytest.mark.parametrize("page", [name for name, text in PAGES.items() if re.search(r"\| [\d,]+ MiB \|", text)])
def test_a_table_of_planned_memory_says_what_the_configurations_say(page):
    rows = re.findall(r"^\| `configs/(\w+)\.yaml`.*? \| ([\d,]+) MiB \| ([\d,]+) MiB \|", PAGES[page], flags=re.M)
    assert len(rows) >= 4
    for name, *said in rows:
        text = (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8")
        assert "# Planned: {} MiB reserved on the GPU, {} MiB of host memory".format(*said) in " ".join(text.split())


SMOLLM2 = {"vocab_size": 49152, "n_hidden": 1536, "rope_base": 1e5}
LLAMAS = {
    "SmolLM2-135M": {**SMOLLM2, "n_layer": 30, "n_head": 9, "n_kv_head": 3, "n_embd": 576},
    "SmolLM2-360M": {**SMOLLM2, "n_layer": 32, "n_head": 15, "n_kv_head": 5, "n_embd": 960, "n_hidden": 2560},
    "SmolLM2-1.7B": {**SMOLLM2, "n_layer": 24, "n_head": 32, "n_embd": 2048, "n_hidden": 8192},
    "Qwen3-0.6B": {
        "vocab_size": 151936, "n_layer": 28, "n_head": 16, "n_kv_head": 8, "head_size": 128, "n_embd": 1024,
        "n_hidden": 3072, "qk_norm": "true",
    },
}  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("name", LLAMAS)
def test_what_current_small_networks_take_on_4_gb_is_what_is_planned(name):
    shape = [f"--model.llama.{key}={value}" for key, value in LLAMAS[name].items()]
    run = [
        "--trainer.precision=bf16-mixed",
        "--trainer.accumulate_grad_batches=4",
        "--trainer.max_steps=300",
        "--data.source=stdlib",
    ]
    settings = SettingsCLI(
        args=["--model.network=llama", *shape, *run, "--data.block_size=1024", "--data.batch_size=1"]
    ).settings
    plan = plan_run(settings, choose_budget("rtx2050"))
    fits = plan.cheapest
    memory = fits.rung.memory
    told = f"weights: {memory.weights}" if memory.weights != "device" else f"recompute: {memory.recompute}"
    numbers = plan.own.footprint.reserved_mib, fits.footprint.reserved_mib, fits.footprint.host_memory_mib
    own_mib, fits_mib, host_mib = (f"{number:,.0f}" for number in numbers)
    assert f"| {name} | {own_mib} | `{told}` | {fits_mib} | {host_mib} |" in PAGES["memory.md"].splitlines()


@pytest.mark.long
def test_what_the_page_of_memory_says_of_page_locked_memory_is_what_is_planned():
    settings = SettingsCLI(args=["--config", str(CONFIGS / "rtx2050_xl.yaml")]).settings
    planned = plan_rung(settings, own_rung(settings), choose_budget("rtx2050").gpu)
    locked_gib, host_gib = planned.page_locked_mib / 1024, planned.host_memory_mib / 1024
    assert f"copy of the weights, {locked_gib:.1f} GiB of GPT-2 XL's {host_gib:.0f}." in " ".join(
        PAGES["memory.md"].split()
    )


def test_the_picture_of_memory_draws_what_is_planned():
    reserved, usable = header("rtx2050")[0], choose_budget("rtx2050").usable_mib
    words = words_of("memory_rtx2050.svg")
    assert f"reserved, {reserved:,.0f} MiB" in words
    assert f"usable, {usable:,} MiB" in words
    assert "configs/rtx2050.yaml: planned device memory during one optimizer step" in words


LADDERS = {
    name: re.findall(r"^[ \w>+'()-]+ +[\d,]+ +x \d\.\d\d  .*$", text, flags=re.M)
    for name, text in PAGES.items()
    if "\n   nothing  " in text
}


def test_every_ladder_that_is_shown_is_the_same_and_has_the_configured_rung():
    shown = list(LADDERS.values())
    assert len(shown[0]) == 7
    assert all(ladder == shown[0] for ladder in shown)
    (own,) = (line for line in shown[0] if "(yours)" in line)
    assert [float(n.replace(",", "")) for n in re.findall(r"[\d,]{4,}", own)] == header("rtx2050")[:2]
    for name in LADDERS:
        needs = f"FITS: needs {header('rtx2050')[0]:,.0f} of {choose_budget('rtx2050').usable_mib:,} MiB."
        assert needs in PAGES[name], name


@pytest.mark.long
def test_the_ladder_that_is_shown_is_what_plan_prints_today(capsys):
    assert main(["plan", "--config", str(CONFIGS / "rtx2050.yaml"), "--gpu=rtx2050"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in next(iter(LADDERS.values())) if line not in printed] == []


# What was measured.


def test_the_first_picture_and_the_losses_of_the_readme_are_those_of_the_quickstart_as_it_is_now(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import plot_curves

    quickstart, page = record("quickstart"), PAGES["README.md"]
    told, yaml_now = (
        quickstart["configuration"],
        yaml.safe_load((CONFIGS / "quickstart.yaml").read_text(encoding="utf-8")),
    )
    yaml_now["trainer"].pop("default_root_dir")
    assert holds(told, yaml_now), "docs/quickstart.json is of an earlier configs/quickstart.yaml"
    plot_curves.draw({"version_0": quickstart["curves"]}, tmp_path / "again.svg")
    assert coordinates(DOCS / "quickstart.svg") == pytest.approx(coordinates(tmp_path / "again.svg"), abs=0.01)

    steps, losses = quickstart["curves"]["val/loss"]
    best, tokens = min(losses), steps[-1] * told["data"]["batch_size"] * told["data"]["block_size"]
    assert steps[-1] == told["trainer"]["max_steps"]
    for row in (
        f"steps            {steps[-1]:,}",
        f"tokens           {tokens:,}",
        f"validation loss  {losses[-1]:.4f}, perplexity {math.exp(losses[-1]):.2f}",
        f"best             {best:.4f} at step {steps[losses.index(best)]:,}",
    ):
        assert row in page.splitlines()


def holds(told, wanted):
    """Whether `told` has each value of `wanted`; it may have others, which are defaults."""
    if isinstance(wanted, dict):
        return isinstance(told, dict) and all(key in told and holds(told[key], wanted[key]) for key in wanted)
    if isinstance(wanted, list):
        return len(told) == len(wanted) and all(map(holds, told, wanted))
    return told == wanted


def test_the_picture_of_scaling_is_drawn_from_its_record(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import bench_scaling

    monkeypatch.delitem(sys.modules, "bench_scaling")
    bench_scaling.draw(record("scaling")["curves"], tmp_path / "again.svg")
    assert coordinates(DOCS / "scaling.svg") == pytest.approx(coordinates(tmp_path / "again.svg"), abs=0.01)


def test_a_model_that_learned_to_answer_is_better_at_it_and_knows_what_it_knew(tmp_path, monkeypatch):
    """Minutes of a CPU, by scripts/chat_curve.py."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import chat_curve

    chat, page = record("chat"), PAGES["chat.md"]
    assert chat["optim"] == chat_curve.optim(), "docs/chat.json is of an earlier recipe"
    assert "so that every loss is that of the rounded network" in chat["model"]
    (steps, answers), (_, known) = (zip(*chat[name], strict=True) for name in ("answers", "known"))
    assert steps[0] == 0
    assert steps[-1] == chat["steps"]
    assert answers[-1] <= 0.7 * answers[0]
    assert max(known) <= 1.05 * known[0]
    for name, losses in (("held-out answers", answers), ("a text that it knew before", known)):
        assert f"{name} from {losses[0]:.2f} to {losses[-1]:.2f}" in " ".join(page.split())
    assert f"{1 - answers[-1] / answers[0]:.1%}".replace("%", " %") + " lower" in page

    chat_curve.draw(chat, tmp_path / "again.svg")
    assert coordinates(DOCS / "chat.svg") == pytest.approx(coordinates(tmp_path / "again.svg"), abs=0.01)


@pytest.mark.long
def test_the_script_of_that_record_measures_both_losses_at_the_same_steps(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import chat_curve

    tokenizer = new_tokenizer("bpe")
    start = saved(tmp_path / "start.safetensors", trained(tokenizer, steps=1, block_size=256), tokenizer)
    small = ["--steps=3", "--precision=32-true", f"--work={tmp_path / 'runs'}", f"--json={tmp_path / 'small.json'}"]
    chat_curve.main([str(start), *small])
    measured = json.loads((tmp_path / "small.json").read_text(encoding="utf-8"))
    for name in chat_curve.TITLES:
        steps, losses = zip(*measured[name], strict=True)
        assert steps == (0, 1, 2, 3)
        assert list(losses) == sorted(losses, reverse=True)  # a network that knows nothing learns from anything


def test_the_picture_of_parity_has_the_cases_of_its_record_and_one_curve_for_three_loops():
    drawn = {}
    for group in ElementTree.parse(DOCS / "parity.svg").findall(".//{*}g"):
        if match := re.fullmatch(r"(case_\d+)_(reference|lightning|accelerate)", group.get("id", "")):
            drawn.setdefault(match[1], []).append(group.find("{*}path").get("d"))
    assert record("parity")["identical"]
    assert len(drawn) == len(record("parity")["cases"])
    assert all(len(lines) == 3 and len(set(lines)) == 1 for lines in drawn.values())


@pytest.mark.parametrize(("place", "name"), [(0, "bench"), (1, "bench_amx"), (2, "bench_avx2")])
def test_the_tables_of_speed_say_what_their_records_hold(place, name):
    page = PAGES["benchmarks.md"]
    runs = {(run["size"], run["precision"]): run["variants"] for run in record(name)["runs"]}
    columns = [("30M", "32-true"), ("124M", "32-true"), ("30M", "bf16-mixed"), ("124M", "bf16-mixed")]
    columns = [column for column in columns if column in runs]
    speeds = {"our module in a plain loop": "plain", "our module under Lightning's Trainer": "lightning"}
    if "transformers trainer" in runs[columns[0]]:
        speeds["transformers' GPT-2 under its Trainer"] = "transformers trainer"
    for title, variant in speeds.items():
        rows = re.findall(rf"^\| {re.escape(title)} \| (.+) \|$", page, flags=re.M)
        row = [cells for cells in rows if "%" not in cells][place]
        for cell, column in zip(row.split(" | "), columns, strict=True):
            measured = runs[column][variant]
            said = [float(n) for n in re.findall(r"[\d.]+", cell)]
            assert said == [round(n, 2) for n in (measured["speed"], *measured["quartiles"])][: len(said)], (
                title,
                cell,
            )
    for title, variant in (
        ("our module in a plain loop", "plain"),
        ("our module under Lightning's Trainer", "lightning"),
        ("nanoGPT", "nanogpt"),
    ):
        shares = [f"{runs[column][variant]['utilisation']:.0%}".replace("%", " %") for column in columns]
        assert f"| {title} | {' | '.join(shares)} |" in page


def test_nanogpt_under_autocast_is_as_its_record_says():
    runs = {run["size"]: run["variants"] for run in record("bench_amx")["runs"] if run["precision"] == "bf16-mixed"}
    small, large = (
        runs[size]["nanogpt under autocast"]["ms_per_step"] / runs[size]["plain"]["ms_per_step"] for size in runs
    )
    page = " ".join(PAGES["benchmarks.md"].split())
    assert f"is {small:.1f} times that of ours at 30M and {large:.1f} times at 124M" in page


@pytest.mark.parametrize("measured", ["bench_target", "bench_target_amx"])
def test_the_times_to_a_loss_are_those_of_their_record(measured):
    for name, runs in record(measured)["runs"].items():
        loss, tokens, processor_s, steps_s = (
            median(run[key] for run in runs) for key in ("loss", "tokens", "processor_s", "steps_s")
        )
        row = f"| {name} | {loss:.3f} | {tokens:,.0f} | {processor_s:.0f} | {steps_s:.1f} |"
        assert row in PAGES["benchmarks.md"], row


def test_the_network_that_comes_to_a_loss_soonest_was_chosen_where_nothing_is_claimed():
    chosen = record("bench_target")["last_tenth_of_the_training_part"]
    one, four = chosen["modern, 1 x 96"], chosen["modern, 4 layers"]
    told = "it ends at {:.3f}, {:.3f} and {:.3f} with three seeds, and the recipe's four layers at {:.3f} and {:.3f}"
    assert told.format(*one, *four) in " ".join(PAGES["benchmarks.md"].split())
    assert median(one) < min(four)


def test_one_thread_comes_to_a_loss_of_1_88_in_8_seconds_of_steps():
    runs = record("bench_target")["runs"]
    soonest = [runs[name][0] for name in runs if "1 x 96" in name]
    assert len(soonest) == 3
    assert median(run["loss"] for run in soonest) <= 1.88
    assert all(run["steps_s"] <= 8 for run in soonest)


def test_lightning_beside_a_plain_loop_is_as_its_record_says():
    page = PAGES["benchmarks.md"]
    runs = {run["size"]: run["variants"] for run in record("bench_frameworks")["runs"]}
    for title, name in (
        ("speed of our module under the Trainer", "lightning"),
        ("speed of transformers' GPT-2 in the same loop", "transformers"),
    ):
        measured = [runs[size][name] for size in ("10M", "30M")]
        cells = ["{:.2f} ({:.2f} to {:.2f})".format(of["speed"], *of["quartiles"]) for of in measured]
        assert f"| {title} | {' | '.join(cells)} |" in page
    trainer, plain, theirs = (
        f"{runs['30M'][name]['peak_mib']:,.0f} MiB" for name in ("lightning", "plain", "transformers")
    )
    assert f"at 30M: {trainer} under the Trainer, {plain} in the plain loop, {theirs} for transformers." in page


def test_what_is_measured_beside_the_step_is_what_the_records_hold():
    page = PAGES["benchmarks.md"]
    saving, preparing, generating = (record(f"bench_{name}") for name in ("checkpoint", "prepare", "generate"))
    pauses = saving["step_stands_still_s"]
    assert f"({saving['file_mib'] / 1024:.1f} GiB)" in page
    assert (
        f"pauses for {pauses['background']:.2f} s; without the background it would be {pauses['waited']:.1f} s" in page
    )
    assert f"{saving['peak_memory_added_mib']:.2f} MiB of memory" in page
    speedup = preparing["speedup"], *preparing["speedup_range"]
    assert "{:.2f} times as fast ({:.2f} to {:.2f})".format(*speedup) in page
    assert "{ours:.0f} MiB against {nanogpt:.0f} MiB".format(**preparing["peak_mib"]) in page
    first, *_, last = (bucket["cached_ms"] for bucket in generating["buckets"])
    assert generating["buckets"][0]["last"] == 99
    assert f"{generating['ratio']:.0f} times as fast as without it; {first:.1f} ms a token among the first" in page
    assert f"hundred, {last:.1f} ms among the last" in page


def test_the_table_of_generation_is_that_of_its_record(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import bench_generate_others

    for run in record("bench_generate_others")["runs"]:
        assert bench_generate_others.row(run) in PAGES["benchmarks.md"].splitlines()


def test_the_table_of_stories_is_that_of_its_record_and_the_published_figures_are_the_scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import tinystories

    measured, page = record("tinystories"), " ".join(PAGES["recipes.md"].split())
    assert tinystories.table(measured) in PAGES["recipes.md"]
    assert f"--minutes {measured['minutes']:g} {' '.join(measured['options'])}" in page
    for figure in tinystories.PUBLISHED.values():
        assert f" {figure:.2f}" in page


def test_what_the_page_of_models_says_was_measured_is_what_the_records_hold():
    page = " ".join(PAGES["models.md"].split())
    (run,) = record("bench_documents")["runs"]
    apart = run["variants"]["documents apart"]
    high, low = (1 / quartile for quartile in apart["quartiles"])
    assert f"takes {1 / apart['speed']:.2f} times as long ({low:.2f} to {high:.2f} between the quartiles" in page
    tuned = record("finetune")
    losses = dict(tuned["validation"])
    said = f"{tuned['before']:.3f} before, {losses[20]:.3f} after 20 steps and {losses[200]:.3f} after 200"
    assert said in page


def test_half_the_tokens_are_enough_as_the_record_of_the_recipe_says():
    page = " ".join(PAGES["recipes.md"].split())
    losses = record("ablation")["tokens"]["validation_loss"]
    half, whole = (
        "{:.3f}, {:.3f} and {:.3f}".format(*losses[name]) for name in ("modern on half the tokens", "nanogpt")
    )
    assert f"ends 75 steps at {half} for the three seeds, below the {whole} of `nanogpt` after 150" in page


def test_two_cores_are_said_to_reach_what_the_record_holds():
    page, readme = PAGES["recipes.md"], " ".join(PAGES["README.md"].split())
    now, before, longer = record("two_cores_avx2"), record("two_cores"), record("two_cores_longer")
    for of in (now, before):
        loss, seconds = (median(run[key] for run in of["runs"]) for key in ("loss", "seconds"))
        assert loss < 1.4697, "nanoGPT's README"
        assert f"{loss:.3f} in {seconds / 60:.1f} minutes" in readme
    assert max(run["seconds"] for run in longer["runs"]) < 3600
    for of in (now, before, longer):
        runs, together = of["runs"], of["together"]
        of_seeds = [f"| {run['seed']} | {run['loss']:.4f} | {run['seconds']:.0f} s |" for run in runs]
        of_all = f"| all {len(together['seeds'])}, their probabilities averaged | {together['loss']:.4f} | |"
        assert "\n".join([*of_seeds, of_all]) in page
    assert f"{median(run['loss'] for run in longer['runs']):.3f}" in page
    one_rate, *two = now["rates"].values()
    assert f"at 0.95 came to {one_rate:.3f} there" in page
    assert "with 0.85 to {:.3f} and with 0.9 to {:.3f}".format(*two) in page
    assert max(two) < one_rate


def test_the_price_of_a_head_of_its_own_is_the_size_of_the_matrix():
    settings = SettingsCLI(args=["--config", str(CONFIGS / "modern_rtx2050.yaml")]).settings.model.llama
    mib = settings.vocab_size * settings.n_embd * 4 / 2**20
    (reserved,) = re.findall(r"# Planned: ([\d,]+) MiB", (CONFIGS / "modern_rtx2050.yaml").read_text(encoding="utf-8"))
    assert f"({mib:.0f} MiB of {reserved} in `configs/modern_rtx2050.yaml`)" in PAGES["recipes.md"]


def test_the_grid_of_parity_has_as_many_cases_as_the_readme_says():
    cases = [point for point in every_combination(AXES) if point["processes"] == "1"]
    assert f"the whole grid, {len(cases)} cases in one process" in " ".join(PAGES["README.md"].split())


def test_what_the_pages_claim_of_torture_its_record_holds():
    processes = record("torture_processes")
    assert processes["passed"] == processes["trials"]
    torture = record("torture")
    assert torture["passed"] == torture["trials"] == 100
    for name, text in PAGES.items():
        for claim in re.findall(r"(\d+) of (\d+) ended with the same bits|Of (\d+), all (\d+) ended", text):
            assert {n for n in claim if n} == {"100"}, name


def test_the_tables_of_the_recipe_are_those_of_its_record_and_every_part_pays_for_every_seed(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import ablate

    for of_data in record("ablation").values():
        losses = of_data["validation_loss"]
        assert ablate.table(losses) in PAGES["recipes.md"]
        assert list(losses) == list(ablate.experiments(of_data["steps"])), "docs/ablation.json is of other recipes"
        for name, values in losses.items():
            assert name == "modern" or all(a > b for a, b in zip(values, losses["modern"], strict=True)), name


def test_the_table_of_what_was_tried_is_that_of_its_record_and_what_it_says_pays_does_for_every_seed(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import tried

    measured, page, gains = record("tried"), PAGES["recipes.md"], {}
    assert tried.table(measured) in page
    for kind, of_kind in measured.items():
        losses = of_kind["validation_losses"]
        assert set(losses) <= set(tried.ROWS), "docs/tried.json is of other rows"
        modern, pays = losses["modern"], losses[tried.PAYS]
        gains[kind] = sorted(modern[seed] - pays[seed] for seed in ("0", "1", "2"))
        assert gains[kind][0] > 0
    tokens, characters = gains["tokens"], gains["characters"]
    told = (
        f"worth {tokens[0]:.2f} to {tokens[2]:.2f} on the tokens",
        f"{characters[0]:.3f} to {characters[2]:.3f} on the",
    )
    assert all(words in " ".join(page.split()) for words in told)


def test_the_loss_of_the_recipe_in_a_fifth_less_time_is_as_its_record_says(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import tried

    page = " ".join(PAGES["recipes.md"].split())
    rows = {"characters": f"{tried.PAYS}, 2 layers, 1.59 of the tokens", "tokens": list(tried.ROWS)[-1]}
    for kind, row in rows.items():
        of_kind = record("tried")[kind]
        modern, sooner = (of_kind["validation_losses"][name] for name in ("modern", row))
        gains = sorted(modern[seed] - sooner[seed] for seed in ("0", "1", "2"))
        assert gains[0] > 0
        assert of_kind["relative_time"][row] <= 0.8
        assert f"({gains[0]:.3f} to {gains[2]:.3f} below it)" in page


def test_the_tables_of_small_texts_are_those_of_their_record_and_the_recipe_pays_where_a_text_is_read_often(
    monkeypatch,
):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import small_texts

    assert small_texts.table(record("limited")) in PAGES["recipes.md"]
    for of_kind in record("limited").values():
        losses = of_kind["validation_losses"]
        for readings in ("5", "10"):
            for seed, of_limited in losses[readings]["limited"].items():
                assert of_limited[-1] < min(losses[readings]["modern"][seed])  # at equal time
        for seed, of_limited in losses["10"]["limited"].items():
            of_modern = [rows["modern"].get(seed, []) for rows in losses.values() if "modern" in rows]
            assert of_limited[-1] < min(loss for values in of_modern for loss in values)  # however long it is
        longest = max((readings for readings, rows in losses.items() if "modern" in rows), key=int)
        of_modern = losses[longest]["modern"]["0"]
        turns = int(longest) * (1 + of_modern.index(min(of_modern))) / len(of_modern)
        useful = useful_readings(of_kind["parameters"], of_kind["tokens"], "muon")
        assert turns < useful < 2 * turns  # what fit goes by
        if "60" in losses:
            of_nanogpt, decayed = (losses["60"][row]["0"] for row in ("nanogpt", "nanogpt with weight decay 1"))
            assert decayed[-1] < of_nanogpt[-1]
            turns = 60 * (1 + of_nanogpt.index(min(of_nanogpt))) / len(of_nanogpt)
            assert turns < useful_readings(of_kind["parameters"], of_kind["tokens"], "adamw") < 2 * turns


def test_three_networks_together_and_one_that_learned_from_them_are_lower_than_any_alone(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import small_texts

    said = record("limited")
    assert small_texts.taught_table(said) in PAGES["recipes.md"]
    kept: tuple[list[float], list[float]] = ([], [])
    for of_kind in said.values():
        taught = of_kind["taught"]
        short, long = (taught[f"taught, {readings} readings"] for readings in small_texts.TAUGHT_READINGS)
        alone = [losses[-1] for rows in of_kind["validation_losses"].values() for seeds in rows.values()
                 for losses in seeds.values()]  # fmt: skip
        assert taught["mean"] < min(short + long)
        assert max(long) < min(short)
        assert max(short) < min(alone + taught["each"])
        each = mean(taught["each"])
        for share, losses in zip(kept, (short, long), strict=True):
            share.append((each - mean(losses)) / (each - taught["mean"]))
    (least, most), (least_of_long, most_of_long) = ((min(share), max(share)) for share in kept)
    page = " ".join(PAGES["recipes.md"].split())
    said = f"keeps {100 * least:.0f} to {100 * most:.0f} % of that gain in 10 readings"
    assert f"{said} and {100 * least_of_long:.0f} to {100 * most_of_long:.0f} % in 20" in page


def test_the_recipe_for_small_texts_pays_at_a_real_size_as_its_record_says():
    halves = [
        {row: run["validation_losses"] for row, run in half["runs"].items()}
        for half in record("limited_half")["halves"].values()
    ]
    for row in {row for half in halves for row in half}:
        assert f"| {row} | {' | '.join(real_size(half.get(row)) for half in halves)} |" in PAGES["recipes.md"]
    page = " ".join(PAGES["recipes.md"].split())
    for half in halves[:2]:
        in_10 = {row: losses for row, losses in half.items() if row.endswith("10 readings")}
        assert min(in_10, key=lambda row: in_10[row][-1]) == "weight decay 1, 10 readings"  # nearest to the rule's 0.9
        gain = min(half["modern, 10 readings"]) - half["weight decay 1, 10 readings"][-1]
        assert f"{gain:.3f}" in page[page.index("with a decay of 1 it ends") :]
    other = halves[1]
    gain = min(other["modern, 10 readings, seed 2"]) - other["weight decay 1, 10 readings, seed 2"][-1]
    assert f"With another seed the decay of 1 is worth as much ({gain:.3f})" in page


def test_the_recipe_for_small_texts_pays_on_megabytes_of_another_text_by_its_rule_alone():
    said = record("limited_bible")
    losses = {row: run["validation_losses"] for row, run in said["runs"].items()}
    for row, run in said["runs"].items():
        bits = real_size(run["bits_per_byte"])
        assert f"| {row} | {real_size(losses[row])} | {bits} |" in PAGES["recipes.md"]
    limited = "limited, 10 readings"
    page = " ".join(PAGES["recipes.md"].split())
    shown = page[page.index("A text of 4.1 MB") :]
    lowest = [losses["modern, 10 readings"][-1], min(losses["modern, 10 readings"]), min(losses["modern, 5 readings"])]
    for of_modern in lowest:  # at equal time, and in a run of any length
        assert f"{of_modern - losses[limited][-1]:.3f}" in shown
        assert losses[limited][-1] < of_modern
    in_5 = losses["modern, 5 readings"][-1] - losses["limited, 5 readings"][-1]
    assert f"in the time of 5, with the decay for 10, {in_5:.3f} below" in shown
    half = "limited, 10 readings of every other chapter"
    assert losses["modern, 10 readings"][-1] == pytest.approx(losses[half][-1], abs=0.01)  # where it ends
    assert said["runs"][half]["max_steps"] == said["runs"][limited]["max_steps"] / 2  # in half its time
    bits = {row: run["bits_per_byte"][-1] for row, run in said["runs"].items()}
    together, taught = bits["the mean of these three"], bits["taught by it, 10 readings of every other chapter"]
    lowest_of_modern = min(said["runs"]["modern, 10 readings"]["bits_per_byte"])
    assert together < taught < min(value for row, value in bits.items() if row.startswith(half))
    assert f"({together:.3f} and {lowest_of_modern:.3f}), and one network taught by it comes to {taught:.3f}" in shown
    assert f"its run of 5 readings, is at {bits['modern, 5 readings']:.3f}" in shown
    settings = yaml.safe_load((CONFIGS / "limited_cpu.yaml").read_text())
    steps = said["tokens_of_every_other_chapter"] / (settings["data"]["batch_size"] * settings["data"]["block_size"])
    assert f"the rule says {3 * (39 / steps) ** (2 / 3):.1f}" in shown
    measured = said["runs"][limited]
    assert settings["model"]["optim"]["weight_decay"] == measured["weight_decay"]  # tests/test_overfitting.py: the rule
    assert settings["trainer"]["max_steps"] == measured["max_steps"]


def real_size(losses):
    if losses is None:
        return ""
    return f"{losses[-1]:.3f}" + ("" if losses[-1] == min(losses) else f" (lowest {min(losses):.3f})")


def test_every_picture_and_record_is_named_on_the_page_that_says_how_it_is_made():
    for path in sorted([*DOCS.glob("*.json"), *DOCS.glob("*.svg"), *DOCS.glob("*.png")]):
        assert f"`docs/{path.name}`" in PAGES["records.md"], path.name


def test_the_forecasts_of_the_record_are_what_the_law_says_today_and_the_page_says_how_near_they_come(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import forecast_check

    cases, page = record("forecast")["cases"], PAGES["forecast.md"]
    assert forecast_check.table(cases) in page
    told = [(case["forecast"], case["own"]["loss"]) for case in cases.values() if case["forecast"] is not None]
    inside = sum(low <= reached <= high for (_, low, high), reached in told)
    near = sum(abs(loss / reached - 1) <= 0.02 for (loss, _, _), reached in told)
    assert f"{inside} of {len(told)} ended within the interval, and {near} within 2 %" in " ".join(page.split())
    three = cases["modern, three, 3 x 96, 1/10"]
    law = Law([Point(run["parameters"], run["tokens"], run["loss"]) for run in three["runs"]])
    off = law.forecast(three["own"]["parameters"], three["own"]["tokens"]).loss / three["own"]["loss"] - 1
    assert f"all nine runs of `three` is {off:.1%} too high".replace("%", " %") in " ".join(page.split())
    for case in cases.values():
        assert case["own"]["flops"] > 9.9 * max(run["flops"] for run in case["runs"])
        said = forecast_check.said(case)
        assert case["forecast"] == (said and pytest.approx([said.loss, said.low, said.high], rel=1e-3))
