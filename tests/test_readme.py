"""Every command of the README runs, made small by options that follow it."""

import os
import re
import shlex
import subprocess

import pytest
from page_commands import ROOT, TINY_RUN, blocks_of, clone, commands_of, run, run_quickly, run_script

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = blocks_of(README)
COMMANDS = commands_of(README)
RUNS = [command for command in COMMANDS if command != "pytest" and not command.startswith("pip install")]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return clone(tmp_path_factory.mktemp("readme"))


@pytest.fixture(scope="module")
def first_run(root):
    """What the first command of the README prints."""
    return run(RUNS[0], root)


@pytest.mark.parametrize("command", RUNS[1:])
def test_the_command_runs(command, root, first_run):
    run_quickly(command, root)


@pytest.mark.parametrize("script", [text for language, text in BLOCKS if language == "python"])
def test_the_script_runs_after_the_commands(script, root, first_run):
    for command in RUNS:
        made = re.search(r" (runs/\S+/(?:hf|best\.gguf)) ", f"{command} ")
        if "convert" in command and made and made[1] in script and not (root / made[1]).exists():
            run_quickly(command, root)
    assert run_script(script.replace('=my_texts"', f'=my_texts", *{shlex.split(TINY_RUN)!r}'), root).strip()


def test_the_first_command_prints_what_the_readme_shows(first_run):
    shown = next(text for language, text in BLOCKS if not language)
    rows = re.findall(r"^([a-z]+(?: [a-z]+)?)  +\S", shown, flags=re.M)
    assert {"steps", "tokens", "validation loss", "curves"} <= set(rows)
    assert rows == [row for row in re.findall(r"^([a-z]+(?: [a-z]+)?)  +\S", first_run, flags=re.M) if row in rows]


def test_the_commands_that_the_readme_shows_as_printed_run_too(root, first_run):
    printed = re.search(r"^write more +(.+)$", first_run, flags=re.M)[1]
    assert printed.split("--ckpt")[0] == re.search(r"^write more +(.+)$", README, flags=re.M)[1].split("--ckpt")[0]
    assert run(printed, root)
    folder = re.search(r"^curves +tensorboard --logdir (.+)$", first_run, flags=re.M)[1]
    assert list((root / folder).glob("version_0/events.out.tfevents.*"))


@pytest.mark.skipif(os.name != "posix", reason="the CI script is for bash")
def test_ci_calls_the_line_of_the_readme(tmp_path):
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    finder = re.search(r"^command=\$\((.+)\)$", script, flags=re.M)[1]
    line = subprocess.run(["bash", "-c", finder], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    assert line in README.splitlines()
    assert line.startswith("pip install -c constraints.txt")
    assert line.endswith("&& pytest")


MAP = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(((?!http)[^)#]+)\)", README + MAP))))
def test_every_link_leads_to_a_file(target):
    assert (ROOT / target).exists()


def test_every_room_on_the_map_exists():
    for path in re.findall(r"`((?:nanogpt_lit|configs|scripts|docs)/[\w./]*)`", README + MAP):
        assert (ROOT / path).exists(), path
