"""YAML files that are broken, or made to cost memory and time."""

import os
import subprocess
import sys
import time

import pytest

from nanogpt_lit.cli.settings import SettingsCLI
from nanogpt_lit.errors import UserError
from nanogpt_lit.untrusted.yaml_file import load_yaml_file


def bomb(line, inner):
    return "a0: &a0 {x: 1}\n" + "".join(line.format(i, ",".join([f"*a{i - 1}"] * 9)) for i in range(1, inner))


BROKEN = {
    "Latin-1": ("# caf\xe9\ntrainer: {max_steps: 3}".encode("latin-1"), "is not UTF-8, in line 1; save it as UTF-8"),
    "UTF-16": ("trainer: {max_steps: 3}".encode("utf-16"), "is UTF-16, in line 1; save it as UTF-8"),
    "3,000 brackets": (b"trainer: " + b"[" * 3000 + b"]" * 3000, "line 1 is nested more than 50 deep"),
    "100,000 brackets": (b"trainer: " + b"[" * 100_000, "line 1 is nested more than 50 deep"),
    "block nesting": (b"".join(b" " * i + b"a:\n" for i in range(600)), "nested more than 50 deep"),
    "brackets in a text": (b"trainer: {callbacks: '" + b"[" * 100_000 + b"'}", "opens 100,000 brackets"),
    "an alias in itself": (b"trainer: &a {callbacks: *a}", "stands for what it is part of"),
    "an alias bomb": (bomb("a{0}: &a{0} [{1}]\n", 12).encode(), "more than 10,000 values"),
    "a bomb of merged keys": (bomb("a{0}: &a{0} {{<<: [{1}]}}\n", 12).encode(), "more than 10,000 values"),
    "5,000 digits": (b"trainer: {max_steps: " + b"9" * 5000 + b"}", "the number in line 1 has 5,000 digits"),
    "5,000 hours": (b"trainer: {max_steps: 1" + b":1" * 5000 + b"}", "the number in line 1 has"),
    "a number without digits": (b"trainer: {max_steps: 0x_}", "invalid literal"),
    "no date": (b"trainer: {max_steps: 2001-99-99}", "month must be in"),
    "a tag": (b"trainer: {max_steps: !!int foo}", "the tag tag:yaml.org,2002:int in line 1 is not read"),
    "a tab": (b"trainer:\n\tmax_steps: 3", "a tab; indent with spaces (line 2)"),
    "a tab after spaces": (b"trainer:\n  max_steps: 3\n \t precision: 1\n", "a tab; indent with spaces (line 3)"),
    "a NUL": (b"trainer: {max_steps: 3}\0", "unacceptable character"),
    "too long": (b"a: " + b"x" * 2**20, "is larger than 256 KiB"),
    "a key twice": (b"trainer:\n  max_steps: 3\n  max_steps: 4\n", "max_steps is in line 2 and again in line 3"),
    "a section twice": (b"trainer: {max_steps: 3}\ntrainer: {devices: 1}", "trainer is in line 1 and again in line 2"),
    "two documents": (b"trainer: {max_steps: 3}\n---\n", "expected a single document in the stream, but found another"),
    "a list": (b"- 1\n- 2", "holds no settings"),
    "nothing": (b"", "holds no settings"),
    "a section without keys": (b"trainer:\n", "trainer holds no keys"),
    "a section that is a list": (b"trainer: [1]\n", "trainer holds no keys"),
}


@pytest.mark.parametrize(("content", "said"), BROKEN.values(), ids=BROKEN)
def test_a_broken_yaml_is_one_sentence_that_names_the_file_at_once(content, said, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    started_s = time.perf_counter()
    with pytest.raises(UserError) as refused:
        SettingsCLI(args=["--config", str(path)])
    assert time.perf_counter() - started_s < 10  # making the parser takes most of it
    assert str(refused.value).startswith(str(path))
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 600


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no such files")
def test_a_pipe_and_a_device_are_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "outer.yaml").write_text(f"trainer: {tmp_path / 'pipe'}\n")
    for path, named in (("pipe", "pipe"), ("outer.yaml", "pipe")):
        with pytest.raises(UserError, match=f"{named} is no regular file"):
            SettingsCLI(args=["--config", str(tmp_path / path)])
    with pytest.raises(UserError, match="is a folder"):
        load_yaml_file(tmp_path)


def test_the_deepest_that_is_read_does_not_end_the_process(tmp_path):
    """Where a text is read as YAML again by what parses the command line."""
    path = tmp_path / "run.yaml"
    path.write_text(f"trainer: {{callbacks: '{'[' * 200}{']' * 200}'}}\n")
    command = [sys.executable, "-m", "nanogpt_lit", "prepare", "--config", str(path)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2, ended.stderr
    assert len(ended.stderr.splitlines()) == 1


def test_a_byte_order_mark_anchors_and_merged_keys_are_read(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_bytes(b"\xef\xbb\xbfa: &a {x: 1, y: [1, 2]}\nb: {<<: *a, z: *a}\n")
    assert load_yaml_file(path)["b"] == {"x": 1, "y": [1, 2], "z": {"x": 1, "y": [1, 2]}}


@pytest.mark.parametrize("text", [".nan", ".inf", "-.inf", "1e999"])
def test_a_rate_that_is_no_number_is_refused_by_its_key(text, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(f"model: {{optim: {{lr: {text}}}}}\ntrainer: {{gradient_clip_val: {text}}}\n")
    with pytest.raises(UserError, match=r"(lr|gradient_clip_val)=-?(nan|inf) is not a number to train with"):
        SettingsCLI(args=["--config", str(path)])
