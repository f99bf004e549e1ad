"""What the user reads who wrote something that cannot be."""

import docstring_parser
import pytest
from lightning.pytorch.cli import LightningCLI

from nanogpt_lit.cli.fit import NanoGPTCLI
from nanogpt_lit.cli.parser import installable, sentence
from nanogpt_lit.cli.settings import SettingsCLI
from nanogpt_lit.errors import UserError


def refused(option):
    with pytest.raises(UserError) as refusal:
        SettingsCLI(args=[option])
    (line,) = str(refusal.value).splitlines()
    return line


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("--model.gpt.n_layer=many", "model.gpt.n_layer=many does not work; what does: an integer"),
        ("--trainer.max_steps=1.5", "trainer.max_steps=1.5 does not work; what does: an integer"),
        ("--teachers=a.safetensors", "teachers=a.safetensors does not work; what does: a list, as [a, b], null"),
        ("--model.compile=perhaps", "model.compile=perhaps does not work; what does: true or false"),
        ("--model.gpt.n_layr=3", "there is no option model.gpt.n_layr; did you mean model.gpt.n_layer?"),
        ("--zzz=3", "there is no option zzz"),
    ],
)
def test_a_mistake_names_the_key_the_value_and_what_works(option, expected):
    assert refused(option) == expected


def test_a_choice_among_many_names_each_once():
    line = refused("--trainer.precision=8-mixed")
    works = line.removeprefix("trainer.precision=8-mixed does not work; what does: ").split(", ")
    assert len(works) == len(set(works))
    assert {"16-mixed", "bf16-mixed", "32-true", "null"} <= set(works)


def test_a_union_of_kinds_is_told_by_kind():
    line = refused("--trainer.callbacks=Nope")
    assert line.startswith("trainer.callbacks=Nope does not work; what does: ")
    assert "Errors" not in line
    assert "Subtypes" not in line


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (
            "Parser key \"trainer.max_epochs\": [<class 'int'>, <class 'NoneType'>] Got value: 1e+30 Given value",
            "trainer.max_epochs=1e+30 does not work; what does: an integer, null",
        ),
        (
            'Parser key "trainer": Unable to load config \'max_steps:3\' - Parser key "trainer": Unable to load config',
            "trainer=max_steps:3 does not work; what does: keys below it, each as `max_steps: 1000`, with a space",
        ),
        (
            'Parser key "trainer.callbacks": Subclass types expect one of: - a class path (str) Given value: [1]',
            "trainer.callbacks=[1] does not work; what does: class_path, with init_args below it",
        ),
        (
            "Parser key \"trainer.callbacks\": Problem with given class_path 'a.B': module 'a' has no 'B' - Not",
            "trainer.callbacks: there is no class a.B that works there: module 'a' has no 'B'",
        ),
        (
            'Parser key "trainer.callbacks": - Import path a.B does not correspond to a subclass of Callback - Not a',
            "trainer.callbacks: a.B is no Callback, and only one of these works there",
        ),
        ("Key must be a string, got: 1.", "a key of the configuration is 1, and keys are words, such as max_steps"),
        ("Parser key \"config\": File does not exist: 'x'", "config: File does not exist: 'x'"),
    ],
)
def test_what_jsonargparse_says_in_many_words_is_said_in_few(said, expected):
    assert sentence(said, []) == expected


def test_a_class_that_refuses_its_arguments_is_a_mistake_of_the_configuration():
    options = ["--trainer.callbacks=EarlyStopping", "--trainer.callbacks.monitor=x", "--trainer.callbacks.mode=zz"]
    cli = SettingsCLI(args=options)
    with pytest.raises(UserError, match="a class of the configuration cannot be made: `mode` can be min, max, got zz"):
        cli.parser.instantiate(cli.config)


@pytest.mark.parametrize("said", ["Requirement 'wandb>=0.12.10' not met. HINT", "No module named 'wandb'"])
def test_a_package_that_is_missing_comes_with_the_line_that_brings_it(said):
    assert installable(said) == "it needs the package wandb: pip install wandb"


def test_what_it_does_not_know_it_passes_on():
    assert sentence("Something\n  else.", []) == "Something else."


def test_descriptions_are_read_out_of_the_source_only_where_they_are_shown(monkeypatch, capsys):
    read = []
    parse = docstring_parser.parse_from_object
    monkeypatch.setattr(
        docstring_parser, "parse_from_object", lambda *args, **more: read.append(1) or parse(*args, **more)
    )
    SettingsCLI(args=["--model.gpt.n_layer=3"])
    assert not read
    with pytest.raises(SystemExit):
        SettingsCLI(args=["--help", "all"])
    assert read
    assert "Peak learning rate, reached after warm-up" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("command", ["fit", "validate", "test"])
def test_a_command_makes_its_own_parser_alone(monkeypatch, capsys, command):
    made = []
    prepare = LightningCLI._prepare_subcommand_parser

    def recorded(self, trainer, name, **options):
        made.append(name)
        return prepare(self, trainer, name, **options)

    monkeypatch.setattr(LightningCLI, "_prepare_subcommand_parser", recorded)
    with pytest.raises(SystemExit):
        NanoGPTCLI(args=[command, "--print_config"])
    assert made == [command]
    assert "seed_everything: 1337" in capsys.readouterr().out
