"""TensorBoard itself, started on a run and asked over HTTP for what its page would draw."""

import html
import json
import re
import subprocess
import sys
import time
import urllib.request

import pytest

from nanogpt_lit.__main__ import main
from nanogpt_lit.cli.settings import SettingsCLI
from nanogpt_lit.data.shards import first_words
from nanogpt_lit.data.tokenizer import ByteTokenizer
from nanogpt_lit.run.curves import HPARAMS, LAYOUT, MEASURES, chosen_hparams
from nanogpt_lit.run.metrics import CURVES

TEXT = "To be, or not to be, that is the question.\n"
RUNS = {"version_0", "accelerate_0"}


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """(address of a TensorBoard that shows a run of each framework, folder of their shards)"""
    tmp_path = tmp_path_factory.mktemp("tensorboard")
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 50)
    arguments = [
        "fit", f"--trainer.default_root_dir={tmp_path / 'root'}", "--trainer.accelerator=cpu", "--trainer.max_steps=4",
        "--trainer.val_check_interval=2", "--trainer.log_every_n_steps=1", "--model.gpt.n_layer=1",
        "--model.gpt.n_head=1", "--model.gpt.n_embd=8", f"--data.source={text}", "--data.tokenizer=byte",
        "--data.block_size=16", "--data.batch_size=2", "--data.val_fraction=0.1",
    ]  # fmt: skip
    assert main(arguments) == main(["fit-accelerate", *arguments[1:], "--model.optim.lr=0.002"]) == 0
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(tmp_path / "root"), "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        for line in process.stderr:
            if url := re.search(r"http://localhost:\d+", line):
                yield url[0], tmp_path / "root/shards"
                return
        pytest.fail("TensorBoard ended without an address")
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def server(started):
    return started[0]


def ask(url, **body):
    data = json.dumps(body).encode() if body else None
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def tags_of(server):
    deadline_s = time.monotonic() + 60  # it reads the files in the background
    while len(tags := ask(f"{server}/data/plugin/scalars/tags")) < len(RUNS) and time.monotonic() < deadline_s:
        time.sleep(0.3)
    assert set(tags) == RUNS
    return tags


def test_tensorboard_serves_the_curves_and_the_texts_of_every_loop(server):
    tags = tags_of(server)
    for run in RUNS:
        assert {"train/loss", "val/loss", "val/perplexity", "throughput/tokens_per_s"} <= set(tags[run])
        loss = ask(f"{server}/data/plugin/scalars/scalars?run={run}&tag=train%2Floss")
        assert [step for _, step, _ in loss] == [1, 2, 3, 4]
        texts = ask(f"{server}/data/plugin/text/tags")[run]
        assert sorted(texts) == ["config/text_summary", "sample/text_summary"]


def test_every_curve_of_every_loop_says_what_it_draws(server):
    for run, tags in tags_of(server).items():
        for tag, shown in tags.items():
            assert CURVES[tag] in html.unescape(re.sub("<[^>]*>", "", shown["description"])), (run, tag)


def test_the_samples_of_every_loop_begin_as_the_users_own_text(started):
    server, shards = started
    tags_of(server)
    words = first_words(shards, ByteTokenizer())
    assert words in TEXT
    for run in RUNS:
        samples = ask(f"{server}/data/plugin/text/text?run={run}&tag=sample%2Ftext_summary")
        shown = [re.sub("<[^>]*>", "", sample["text"]).lstrip() for sample in samples]
        assert [text[: len(words)] for text in shown] == [words, words]


def test_one_chart_has_the_loss_of_training_and_validation_and_throughput_comes_last(server):
    tags_of(server)
    layout = ask(f"{server}/data/plugin/custom_scalars/layout")["category"]
    first = layout[0]["chart"][0]
    assert (first["title"], first["multiline"]["tag"]) == ("train and validation loss", ["train/loss", "val/loss"])
    assert layout[-1]["title"] == "throughput"
    for run in RUNS:
        answer = ask(f"{server}/data/plugin/custom_scalars/scalars?run={run}&tag=%5E(train%7Cval)%2Floss%24")
        assert {tag: len(points) for tag, points in answer["tag_to_events"].items()} == {"train/loss": 4, "val/loss": 2}


def test_the_runs_are_compared_by_what_was_set_and_what_came_of_it(server):
    tags_of(server)
    which = {"colParams": [], "allowedStatuses": ["STATUS_UNKNOWN"], "startIndex": 0, "sliceSize": 9}
    groups = ask(f"{server}/data/plugin/hparams/session_groups", **which)["sessionGroups"]
    rows = {group["sessions"][0]["name"]: group for group in groups}
    assert set(rows) == RUNS
    assert [rows[run]["hparams"]["model.optim.lr"] for run in sorted(RUNS)] == [0.002, 0.0006]
    for run, row in rows.items():
        assert (row["hparams"]["data.tokenizer"], row["hparams"]["data.batch_size"]) == ("byte", 2)
        measured = {value["name"]["tag"]: value["value"] for value in row["metricValues"]}
        loss = ask(f"{server}/data/plugin/scalars/scalars?run={run}&tag=val%2Floss")
        assert measured["val/loss"] == loss[-1][2]
        assert "val/bits_per_byte" in measured


def test_the_sizes_to_compare_by_are_those_of_the_network_that_is_trained():
    cli = SettingsCLI(args=["--model.network=llama", "--model.llama.n_layer=3", "--trainer.max_steps=1"])
    other = SettingsCLI(args=["--model.gpt.n_layer=5", "--trainer.max_steps=1", "--init_from=somewhere"])
    of_llama, of_gpt2 = (chosen_hparams(made.kept_settings()) for made in (cli, other))
    assert (of_llama["model.network"], of_llama["model.n_layer"]) == ("llama", 3)
    assert (of_gpt2["model.network"], of_gpt2["model.n_layer"]) == ("gpt2", 5)
    assert of_llama.keys() == of_gpt2.keys()  # or only those of one run would be shown
    assert (of_llama["init_from"], of_gpt2["init_from"]) == ("null", "somewhere")


def test_every_setting_to_compare_by_is_one_of_the_parser():
    known = {action.dest for action in SettingsCLI(args=[]).parser._actions}
    assert set(HPARAMS) <= known
    assert {tag for charts in LAYOUT.values() for _, tags in charts.values() for tag in tags} | set(MEASURES) <= set(
        CURVES
    )
