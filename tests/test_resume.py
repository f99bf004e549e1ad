"""--resume auto, as a user starts it after a crash: the same run, its folder and its curves, to the same bits."""

import csv
import json
import os
import re
import shlex
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from small_runs import BOTTLES, LOOPS, accelerate, curves, different, fit, small_run

from nanogpt_lit.checkpoint.newest import newest_checkpoint
from nanogpt_lit.checkpoint.run_file import load_run, save_run
from nanogpt_lit.checkpoint.state import RunState
from nanogpt_lit.loops.lightning_plugins import BestEffortLogger
from nanogpt_lit.module import LitNanoGPT
from nanogpt_lit.optim.schedule import ScheduleConfig, WarmupDecay
from nanogpt_lit.run.resume import (
    changed_settings,
    choose_again,
    chosen_settings,
    claim_folder,
    config_file,
    latest_config,
)
from nanogpt_lit.runtime.launch import resume_command

LAST = "checkpoints/last.safetensors"


@pytest.fixture(scope="module")
def undisturbed(text, tmp_path_factory):
    root = tmp_path_factory.mktemp("undisturbed")
    assert fit(*small_run(text, root)) == 0
    return root / "version_0"


class PowerLoss(Exception):  # noqa: N818
    pass


def crash(loop, text, root, monkeypatch, forward_call, *more):
    """A run that dies inside the n-th forward, which no loop expects."""
    forward, calls = LitNanoGPT.forward, iter(range(1, 10**6))

    def failing(self, tokens, targets):
        if next(calls) == forward_call:
            raise PowerLoss
        return forward(self, tokens, targets)

    with monkeypatch.context() as patch:
        patch.setattr(LitNanoGPT, "forward", failing)
        with pytest.raises(PowerLoss):
            loop(*more, *small_run(text, root))


@pytest.mark.parametrize(("before", "after"), [(fit, fit), (accelerate, accelerate), (fit, accelerate)])
def test_a_crashed_run_goes_on_as_one_run_with_one_curve(
    before, after, undisturbed, text, tmp_path, monkeypatch, capsys
):
    crash(before, text, tmp_path, monkeypatch, forward_call=17)  # in step 8, of 14 micro-batches and 3 validations
    folder = tmp_path / LOOPS[before]
    assert load_run(folder / LAST).step == 6
    capsys.readouterr()
    assert after(*small_run(text, tmp_path), "--resume=auto") == 0
    out = capsys.readouterr().out
    assert f"resume: going on from {folder / LAST}, step 6\n" in out
    assert "before," not in out
    assert not different(folder / LAST, undisturbed / LAST)
    assert curves(folder) == curves(undisturbed)  # step 7 was drawn twice, and is there once
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {folder.name}
    assert sorted(path.name for path in folder.glob("*.yaml") if "config" in path.name) == [
        "config.yaml", "config_2.yaml"
    ]  # fmt: skip


def test_a_csv_of_the_yaml_goes_on_in_its_file_without_gap_or_duplicate(undisturbed, text, tmp_path, monkeypatch):
    logger = {"class_path": "CSVLogger", "init_args": {"save_dir": str(tmp_path), "name": ""}}
    yaml = tmp_path / "csv.yaml"
    yaml.write_text(json.dumps({"trainer": {"logger": [logger]}}))
    crash(fit, text, tmp_path, monkeypatch, 17, f"--config={yaml}")
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        assert fit(f"--config={yaml}", *small_run(text, tmp_path), "--resume=auto") == 0
    assert not [
        warning for warning in warned if "not empty" in str(warning.message)
    ]  # Lightning's, of a file to delete
    with (tmp_path / "version_0" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["train/loss"]]
    drawn = curves(undisturbed)
    assert [(int(row["step"]), float(row["train/loss"])) for row in rows] == [
        (step, drawn["train/loss", step]) for step in range(1, 9)
    ]
    assert not (tmp_path / "version_1").exists()


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_damaged_checkpoint_gives_way_to_the_one_before_and_two_damaged_ones_stop_the_start(
    undisturbed, text, tmp_path, monkeypatch, capsys
):
    crash(fit, text, tmp_path, monkeypatch, forward_call=17)
    folder = tmp_path / "version_0"
    (folder / "checkpoints/best.safetensors").unlink()
    flip_a_bit(folder / LAST)
    newest = newest_checkpoint(tmp_path)
    assert (newest.path, newest.step) == (folder / "checkpoints/previous.safetensors", 4)
    (remark,) = newest.remarks
    assert "last.safetensors is damaged" in remark
    assert remark.endswith(f"Going on from {newest.path}, step 4.")
    newest.path.write_bytes(newest.path.read_bytes()[:-1])
    assert fit(*small_run(text, tmp_path), "--resume=auto") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: resume=auto finds no whole checkpoint in")
    assert not (tmp_path / "version_1").exists()


def test_without_a_checkpoint_a_run_starts_and_says_so_and_two_answers_to_one_question_are_refused(
    text, tmp_path, capsys
):
    assert accelerate(*small_run(text, tmp_path), "--resume=auto", "--trainer.max_steps=1") == 0
    assert f"resume: no checkpoint in {tmp_path}, starting from the beginning" in capsys.readouterr().out
    last = tmp_path / "accelerate_0" / LAST
    assert fit(*small_run(text, tmp_path), "--resume=auto", f"--ckpt_path={last}") == 2
    assert "resume=auto looks for a checkpoint and ckpt_path=" in capsys.readouterr().err


@pytest.mark.parametrize("loop", LOOPS)
def test_the_command_line_wins_over_the_checkpoint_and_what_it_changes_is_said(
    loop, text, tmp_path, monkeypatch, capsys
):
    crash(loop, text, tmp_path, monkeypatch, forward_call=17)
    capsys.readouterr()
    more = ("--model.optim.lr=0.5", "--model.optim.weight_decay=0.3", "--model.schedule.min_lr_ratio=1")
    assert loop(*small_run(text, tmp_path), "--resume=auto", *more) == 0
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if "from here on" in line] == [
        "resume: model.optim.lr: 0.0006 before, 0.5 from here on",
        "resume: model.optim.weight_decay: 0.1 before, 0.3 from here on",
        "resume: model.schedule.min_lr_ratio: 0.1 before, 1.0 from here on",
    ]
    folder = tmp_path / LOOPS[loop]
    assert [(step, value) for (tag, step), value in curves(folder).items() if tag == "train/lr" and step > 6] == [
        (7, 0.5), (8, 0.5)
    ]  # fmt: skip
    assert [group["weight_decay"] for group in load_run(folder / LAST).optimizer["param_groups"]] == [0.3, 0.0]


def test_settings_chosen_again_leave_the_rate_of_an_unchanged_run_alone():
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.AdamW([weight], lr=6e-4)
    schedule = WarmupDecay(optimizer, ScheduleConfig(warmup_steps=3, total_steps=9))
    for _ in range(6):
        rate = optimizer.param_groups[0]["lr"]
        choose_again(optimizer, schedule, chosen_settings(optimizer))
        assert optimizer.param_groups[0]["lr"] == rate
        weight.grad = torch.ones(1)
        optimizer.step()
        schedule.step()
    assert schedule.last_epoch == 6


def test_each_piece_of_a_run_keeps_its_configuration(tmp_path):
    names = []
    for n in range(11):
        names.append(config_file(tmp_path))
        (tmp_path / names[-1]).write_text(f"model:\n  lr: {n}\n  deep: {{a: 1}}\n")
    assert names == ["config.yaml", *(f"config_{n}.yaml" for n in range(2, 12))]
    now = {"model": {"lr": 11, "deep": {"a": 1}, "new": 3}, "resume": "auto"}
    before, remarks = latest_config(tmp_path)
    assert not remarks
    assert changed_settings(before, now) == ["model.lr: 10 before, 11 from here on"]


def test_runs_that_start_at_the_same_moment_have_folders_of_their_own(tmp_path):
    with ThreadPoolExecutor(8) as starting:
        folders = list(starting.map(lambda _: claim_folder(tmp_path / "root", "run"), range(40)))
    assert sorted(folders) == sorted(tmp_path / "root" / f"run_{n}" for n in range(40))
    loggers = [BestEffortLogger(tmp_path / "runs", name="") for _ in range(3)]
    assert [logger.version for logger in loggers] == ["version_0", "version_1", "version_2"]
    assert [Path(logger.log_dir).is_dir() for logger in loggers] == [True] * 3


def test_an_old_name_of_the_same_value_is_no_change():
    assert changed_settings({"weights": "card"}, {"weights": "device"}) == []


def test_a_null_that_is_left_out_of_a_list_is_no_change_and_another_value_is_one():
    def logger(**init_args):
        return {"logger": [{"class_path": "A", "init_args": init_args}]}

    before = logger(version=None, name="a")
    assert changed_settings(before, logger(name="a")) == []
    for other in ({"version": 0, "name": "a"}, {"name": "b"}, {}):
        (line,) = changed_settings(before, logger(**other))
        assert line.startswith("logger: ")


@pytest.mark.parametrize("loop", LOOPS)
def test_the_step_decides_inside_a_run_whatever_the_clock_said_and_the_times_only_between_runs(
    loop, text, tmp_path, monkeypatch, capsys
):
    crash(loop, text, tmp_path, monkeypatch, forward_call=17)
    folder = tmp_path / LOOPS[loop]
    for name, modified_s in (("last", 100), ("previous", 200), ("best", 300)):  # a clock set back before each save
        os.utime((folder / LAST).with_stem(name), (modified_s, modified_s))
    older = tmp_path / "version_7" / LAST
    older.parent.mkdir(parents=True)
    save_run(older, RunState({}, {}, {}, {}, {}, None, [], 900, 900, 1, 1))
    os.utime(older, (150, 150))
    assert newest_checkpoint(tmp_path).path == folder / LAST
    assert newest_checkpoint(tmp_path).step == 6
    os.utime(older, (400, 400))
    assert newest_checkpoint(tmp_path).step == 900


@pytest.mark.parametrize("loop", LOOPS)
def test_stray_things_in_a_run_are_told_and_passed_over(loop, undisturbed, text, tmp_path, monkeypatch, capsys):
    crash(loop, text, tmp_path, monkeypatch, forward_call=17)
    folder = tmp_path / LOOPS[loop]
    (folder / "config_2.yaml").write_text("data: {seed: 1")
    (folder / "config_3.yaml").write_bytes(bytes(400))
    (folder / "config_4.yaml").mkdir()
    (folder / "config_5.yaml").write_text("half a word")
    (folder / "stop").mkdir()
    (folder / "checkpoints/last.safetensors.partial").mkdir()
    (folder / "checkpoints/a.safetensors").symlink_to(tmp_path / "disk that is away")
    (folder / "checkpoints/b.safetensors").mkdir()
    capsys.readouterr()
    assert loop(*small_run(text, tmp_path), "--resume=auto", "--model.optim.lr=0.001") == 0
    told = "".join(capsys.readouterr())
    for stray in ("config_2.yaml", "config_3.yaml", "config_4.yaml", "config_5.yaml", "checkpoints/a.safetensors",
                  "checkpoints/b.safetensors", "checkpoints/last.safetensors.partial", "stop"):  # fmt: skip
        assert any(f"{folder / stray} " in line for line in told.splitlines()), stray
    assert "resume: model.optim.lr: 0.0006 before, 0.001 from here on" in told
    assert (folder / "config_6.yaml").is_file()
    assert load_run(folder / LAST).step == 8


def test_links_to_a_disk_that_is_away_do_not_start_a_run_anew(text, tmp_path, capsys):
    checkpoints = tmp_path / "version_0/checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / "last.safetensors").symlink_to(tmp_path / "away")
    assert fit(*small_run(text, tmp_path), "--resume=auto") == 2
    assert f"last.safetensors is a link to {tmp_path / 'away'}, which is not there" in capsys.readouterr().err


@pytest.mark.parametrize("loop", LOOPS)
def test_a_runs_saved_settings_make_another_run_shards_of_its_own(loop, text, tmp_path):
    options = [option for option in small_run(text, tmp_path / "a") if "shards_dir" not in option]
    assert loop(*options, "--trainer.max_steps=1", "--trainer.gradient_clip_val=null") == 0
    manifest = (tmp_path / "a/shards/manifest.json").read_bytes()
    saved = tmp_path / "a" / LOOPS[loop] / "config.yaml"
    other = tmp_path / "other.txt"
    other.write_text(BOTTLES.replace("beer", "milk"))
    assert loop(f"--config={saved}", f"--trainer.default_root_dir={tmp_path / 'b'}", f"--data.source={other}") == 0
    assert (tmp_path / "a/shards/manifest.json").read_bytes() == manifest
    assert (tmp_path / "b/shards/manifest.json").is_file()
    assert "gradient_clip_val: null" in (tmp_path / "b" / LOOPS[loop] / "config.yaml").read_text()  # the default is 1


@pytest.mark.parametrize("loop", LOOPS)
def test_a_finished_run_says_that_it_is_complete_and_a_longer_one_what_the_rate_will_do(loop, text, tmp_path, capsys):
    assert loop(*small_run(text, tmp_path), "--trainer.max_steps=4") == 0
    folder = tmp_path / LOOPS[loop]
    before = (folder / LAST).stat()
    cut_short = folder / f"{LAST}.partial"
    cut_short.write_bytes(b"half")
    capsys.readouterr()
    assert loop(*small_run(text, tmp_path), "--trainer.max_steps=4", "--resume=auto") == 0
    said = capsys.readouterr().out
    assert f"{folder / LAST} holds step 4, and the run is complete with trainer.max_steps=4. " in said
    assert "--trainer.max_steps 8 would train as much again" in said
    assert (folder / LAST).stat().st_mtime_ns == before.st_mtime_ns
    assert not cut_short.exists()
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    assert loop(*small_run(text, tmp_path), "--trainer.max_steps=6", "--resume=auto") == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "learning rate now" in line]
    rates = {step: value for (tag, step), value in curves(folder).items() if tag == "train/lr"}
    rate, was, end = (float(number) for number in re.findall(r" (\d[\d.]*(?:e-\d+)?)(?= where|,|$)", line)[-3:])
    assert (rate, end) == (pytest.approx(rates[5], rel=1e-2), pytest.approx(rates[6], rel=1e-2))
    assert was == pytest.approx(6e-5)  # the floor
    assert line.startswith("resume: the learning rate now decays over 6 steps, not 4: from step 4 on it is ")


@pytest.mark.parametrize("loop", LOOPS)
def test_a_stopped_run_prints_the_command_that_goes_on_with_it(loop, text, tmp_path, capsys, monkeypatch):
    root = tmp_path / "with a space"
    root.mkdir()
    yaml = root / "it's.yaml"
    yaml.write_text("{}")
    options = [*small_run(text, root, f"--config={yaml}"), "--resume", "auto", "--data.seed=5"]
    forward = LitNanoGPT.forward

    def stops(self, tokens, targets):
        (root / LOOPS[loop] / "stop").touch()
        return forward(self, tokens, targets)

    with monkeypatch.context() as patch:
        patch.setattr(LitNanoGPT, "forward", stops)
        assert loop(*options) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("go on with: ")]
    words = shlex.split(line.removeprefix("go on with: "))
    given = words[words.index(options[0] if loop is accelerate else "fit") :]
    assert given[loop is fit :] == [*(o for o in options if o not in ("--resume", "auto")), "--resume", "auto"]
    assert loop(*given[loop is fit :], "--trainer.max_steps=2") == 0
    assert load_run(root / LOOPS[loop] / LAST).step == 2


def test_a_run_that_is_kept_alive_is_gone_on_with_by_what_keeps_it(monkeypatch):
    monkeypatch.setenv("NANOGPT_LIT_KEPT_ALIVE_BY", '["python", "-m", "nanogpt_lit", "fit", "--keep-alive"]')
    assert resume_command(["python"], ["fit", "--resume", "auto"]) == "python -m nanogpt_lit fit --keep-alive"
