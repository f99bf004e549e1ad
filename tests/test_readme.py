"""Every command of the README runs, made small by options that follow it."""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.M | re.S)
FENCED = [text for language, text in BLOCKS if language == "bash"]
IN_LINE = re.findall(r"`((?:python|pip) [^`]+)`", README)
COMMANDS = [
    part.strip()
    for line in [*"".join(FENCED).splitlines(), *IN_LINE]
    for part in line.split("&&")
    if line.strip() and not line.startswith("#")
]
INSTALLS = [command for command in COMMANDS if command.startswith("pip install")]
RUNS = [command for command in COMMANDS if command not in [*INSTALLS, "pytest"]]

TINY_NETWORK = "--model.gpt.n_layer=1 --model.gpt.n_head=1 --model.gpt.n_embd=16 --data.block_size=16"
TINY_RUN = f"{TINY_NETWORK} --data.batch_size=2 --trainer.max_steps=2 --trainer.limit_val_batches=2"

SMALLER = {
    "nanogpt_lit fit --config configs/quickstart.yaml": f"{TINY_RUN} --trainer.default_root_dir=ROOT/runs/quickstart",
    "nanogpt_lit fit": f"{TINY_RUN} --trainer.default_root_dir=ROOT/runs/own --data.tokenizer=byte",
    "nanogpt_lit plan": "--model.gpt.n_layer=2 --data.block_size=64 --model.gpt.vocab_size=512 --data.tokenizer=byte",
    "nanogpt_lit tune": f"{TINY_RUN} --trainer.default_root_dir=ROOT/runs/tune --out=ROOT/tuned.yaml",
    "nanogpt_lit doctor": "",
    "nanogpt_lit keep-alive-unit": "",
    "nanogpt_lit convert": "",
    "nanogpt_lit accelerate-config": "",
    "nanogpt_lit eval": "",
    "nanogpt_lit generate": "--max-new-tokens=4",
    "scripts/parity.py": "--steps=2 --precision 32-true --optimizer fused --processes 1 --skip-memory --out=ROOT/p",
    "scripts/bench.py --start": "1",
    "scripts/bench.py": "--steps=2 --warm-up=1 --sizes 1M --variants plain",
    "scripts/bench_prepare.py": "--pairs=1 --source=ROOT/my_texts",
    "scripts/bench_generate.py": "--tokens=8 --n-layer=1",
}
"""By the start of what a command runs; ROOT is where the test keeps its files."""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("readme")
    (root / "my_texts").mkdir()
    (root / "my_texts" / "a.txt").write_text("A bottle of beer on the wall.\n" * 200)
    return root


def run(command, root):
    what = re.sub(r"^python (-m )?", "", command)
    smaller = next((options for start, options in SMALLER.items() if what.startswith(start)), None)
    assert smaller is not None, f"this test knows no small form of `{command}`"
    words = shlex.split(f"{command} {smaller}".replace("ROOT", root.as_posix()))
    words = [re.sub(r"^(runs|my_texts)(?=/|$)", rf"{root.as_posix()}/\1", word) for word in words]
    answer = subprocess.run([sys.executable, *words[1:]], cwd=ROOT, capture_output=True, text=True)
    assert answer.returncode == 0, f"{command}\n{answer.stdout}\n{answer.stderr}"
    return answer.stdout


@pytest.fixture(scope="module")
def first_run(root):
    """What the first command of the README prints."""
    return run(RUNS[0], root)


@pytest.mark.parametrize("command", RUNS[1:])
def test_the_command_runs(command, root, first_run):
    run(command, root)


@pytest.mark.parametrize("script", [text for language, text in BLOCKS if language == "python"])
def test_the_script_runs_after_the_commands(script, root, first_run):
    for command in RUNS:
        made = re.search(r" (runs/\S+/(?:hf|best\.gguf)) ", f"{command} ")
        if "convert" in command and made and made[1] in script and not (root / made[1]).exists():
            run(command, root)
    script = re.sub(r'(?<=["=])(runs|my_texts)(?=[/"])', rf"{root.as_posix()}/\1", script)
    script = script.replace('/my_texts"', f'/my_texts", *{shlex.split(TINY_RUN)!r}')
    answer = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.strip()


def test_the_first_command_prints_what_the_readme_shows(first_run):
    shown = next(text for language, text in BLOCKS if not language)
    rows = re.findall(r"^([a-z]+(?: [a-z]+)?)  +\S", shown, flags=re.M)
    assert {"steps", "tokens", "time", "validation loss", "curves"} <= set(rows)
    assert rows == [row for row in re.findall(r"^([a-z]+(?: [a-z]+)?)  +\S", first_run, flags=re.M) if row in rows]


def test_the_commands_that_the_readme_shows_as_printed_run_too(root, first_run):
    printed = re.search(r"^write more +(.+)$", first_run, flags=re.M)[1]
    assert printed.split("--ckpt")[0] == re.search(r"^write more +(.+)$", README, flags=re.M)[1].split("--ckpt")[0]
    assert run(printed, root)
    folder = re.search(r"^curves +tensorboard --logdir (.+)$", first_run, flags=re.M)[1]
    assert list(Path(ROOT, folder).glob("version_0/events.out.tfevents.*"))


def test_every_installation_names_extras_that_exist_and_the_constraints():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert INSTALLS
    for command in INSTALLS:
        for named in re.findall(r"\.\[([\w,]+)\]", command):
            assert set(named.split(",")) <= set(extras), command
        for file in re.findall(r"-c (\S+)", command):
            assert (ROOT / file).is_file()


@pytest.mark.skipif(os.name != "posix", reason="the CI script is for bash")
def test_ci_calls_the_line_of_the_readme(tmp_path):
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    finder = re.search(r"^command=\$\((.+)\)$", script, flags=re.M)[1]
    line = subprocess.run(["bash", "-c", finder], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    assert line in README.splitlines()
    assert line.startswith("pip install -c constraints.txt")
    assert line.endswith("&& pytest")


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(((?!http)[^)#]+)\)", README))))
def test_every_link_leads_to_a_file(target):
    assert (ROOT / target).exists()


def test_every_room_on_the_map_exists():
    for path in re.findall(r"`((?:nanogpt_lit|configs|scripts|docs)/[\w./]*)`", README):
        assert (ROOT / path).exists(), path
