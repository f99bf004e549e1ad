"""The help of the commands that read a YAML."""

import re
import sys

import pytest

from nanogpt_lit.__main__ import COMMANDS, main
from nanogpt_lit.cli.help import MORE, SHORT, WORDS


@pytest.fixture
def asked(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")

    def ask(*arguments):
        with pytest.raises(SystemExit) as ended:
            main(list(arguments))
        assert ended.value.code == 0
        return capsys.readouterr().out

    return ask


def options(text):
    return re.findall(r"^  --([\w.-]+)", text, flags=re.MULTILINE)


@pytest.mark.parametrize("command", ["fit", "test", "fit-accelerate"])
def test_the_help_begins_with_what_users_set_and_fits_two_screens(command, asked):
    text = asked(command, "--help")
    assert text.splitlines()[0] == f"usage: python -m nanogpt_lit {command} [--config FILE] [--SECTION.KEY VALUE ...]"
    names = [f"{section}.{name}" if section else name for section, keys in SHORT.items() for name in keys]
    assert [
        name for name in options(text) if f"--{name}" not in MORE and name not in ("print_config", "trust")
    ] == names
    sections = [name.partition(".")[0] for name in names if "." in name]
    assert list(dict.fromkeys(sections)) == ["data", "model", "trainer"]
    assert len(text.splitlines()) < 100
    assert "--help all` has every option" in text


def test_the_list_of_commands_fits_80_columns_and_begins_with_fit(capsys):
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    commands = [line.split()[0] for line in lines if line.startswith("  ")]
    assert commands[0] == "fit"
    assert commands == list(COMMANDS)


def test_help_all_has_every_option_in_the_same_order(asked):
    text = asked("fit", "--help", "all")
    assert text.startswith("usage: python -m nanogpt_lit fit [--config FILE]")
    found = options(text)
    assert {"trainer.plugins", "model.gpt.bias", "data.seed", "keep-alive", "trust"} <= set(found)
    assert {f"{section}.{name}" if section else name for section, keys in SHORT.items() for name in keys} <= set(found)
    places = [found.index(name) for name in ("data.source", "model.gpt.n_layer", "model.optim.lr", "trainer.max_steps")]
    assert places == sorted(places)
    assert set(WORDS) - {"config"} <= set(found)
    assert "Stop training after this number of steps" not in text  # Lightning's words for max_steps


def test_the_usage_names_the_program_as_it_was_called(asked, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/nanogpt-lit", "fit", "--help"])
    assert asked("fit", "-h").startswith("usage: nanogpt-lit fit ")
    assert asked("generate", "--help").startswith("usage: nanogpt-lit generate ")
