"""TensorBoard itself, started on a run and asked over HTTP for what its page would draw."""

import json
import re
import subprocess
import sys
import time
import urllib.request

import pytest

from nanogpt_lit.__main__ import main


@pytest.fixture
def server(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("To be, or not to be, that is the question.\n" * 50)
    arguments = [
        "fit", f"--trainer.default_root_dir={tmp_path / 'root'}", "--trainer.accelerator=cpu", "--trainer.max_steps=4",
        "--trainer.val_check_interval=2", "--trainer.log_every_n_steps=1", "--model.gpt.n_layer=1",
        "--model.gpt.n_head=1", "--model.gpt.n_embd=8", f"--data.source={text}", "--data.tokenizer=byte",
        "--data.block_size=16", "--data.batch_size=2", "--data.val_fraction=0.1",
    ]  # fmt: skip
    assert main(arguments) == 0
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(tmp_path / "root"), "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        for line in process.stderr:
            if url := re.search(r"http://localhost:\d+", line):
                yield url[0]
                return
        pytest.fail("TensorBoard ended without an address")
    finally:
        process.kill()
        process.wait()


def ask(url):
    with urllib.request.urlopen(url, timeout=30) as answer:
        return json.load(answer)


def test_tensorboard_serves_the_curves_and_the_texts(server):
    deadline_s = time.monotonic() + 60  # it reads the files in the background
    while not (tags := ask(f"{server}/data/plugin/scalars/tags")).get("version_0") and time.monotonic() < deadline_s:
        time.sleep(0.3)
    assert {"train/loss", "val/loss", "val/perplexity", "throughput/tokens_per_s"} <= set(tags["version_0"])
    loss = ask(f"{server}/data/plugin/scalars/scalars?run=version_0&tag=train%2Floss")
    assert [step for _, step, _ in loss] == [1, 2, 3, 4]
    texts = ask(f"{server}/data/plugin/text/tags")["version_0"]
    assert sorted(texts) == ["config/text_summary", "sample/text_summary"]
