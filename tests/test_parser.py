"""What the user reads who wrote something that cannot be."""

import pytest

from nanogpt_lit.cli.parser import sentence
from nanogpt_lit.cli.settings import SettingsCLI


def refused(option, capsys):
    with pytest.raises(SystemExit) as exit:
        SettingsCLI(args=[option])
    assert exit.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("error: ")


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("--model.gpt.n_layer=many", "model.gpt.n_layer=many does not work; what does: an integer"),
        ("--trainer.max_steps=1.5", "trainer.max_steps=1.5 does not work; what does: an integer"),
        ("--model.compile=perhaps", "model.compile=perhaps does not work; what does: true or false"),
        ("--model.gpt.n_layr=3", "there is no option model.gpt.n_layr; did you mean model.gpt.n_layer?"),
        ("--zzz=3", "there is no option zzz"),
    ],
)
def test_a_mistake_names_the_key_the_value_and_what_works(option, expected, capsys):
    assert refused(option, capsys) == expected


def test_a_choice_among_many_names_each_once(capsys):
    line = refused("--trainer.precision=8-mixed", capsys)
    works = line.removeprefix("trainer.precision=8-mixed does not work; what does: ").split(", ")
    assert len(works) == len(set(works))
    assert {"16-mixed", "bf16-mixed", "32-true", "null"} <= set(works)


def test_a_union_of_kinds_is_told_by_kind(capsys):
    line = refused("--trainer.callbacks=Nope", capsys)
    assert line.startswith("trainer.callbacks=Nope does not work; what does: ")
    assert "Errors" not in line
    assert "Subtypes" not in line


def test_what_it_does_not_know_it_passes_on():
    assert sentence("Something\n  else.", []) == "Something else."
