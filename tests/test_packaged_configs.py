"""Configurations by name, and the package that carries them."""

import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from nanogpt_lit import __version__
from nanogpt_lit.__main__ import main
from nanogpt_lit.cli.packaged_configs import packaged_configs, with_packaged_configs

ROOT = Path(__file__).parents[1]


def test_every_yaml_of_the_repository_has_a_name():
    assert packaged_configs() == {path.stem: path for path in (ROOT / "configs").glob("*.yaml")}


@pytest.mark.parametrize("option", ["--config", "-c", "--from"])
def test_a_name_stands_for_the_packaged_file(option, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = str(ROOT / "configs" / "rtx2050.yaml")
    assert with_packaged_configs(["fit", option, "rtx2050", "--trainer.max_steps", "1"])[1:3] == [option, path]
    assert with_packaged_configs(["fit", f"{option}=rtx2050"]) == ["fit", f"{option}={path}"]


def test_a_file_of_that_name_comes_first_and_other_values_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rtx2050").write_text("trainer: {max_steps: 1}")
    for arguments in (["--config", "rtx2050"], ["--config=mine.yaml"], ["--ckpt", "rtx2050"], ["--config"]):
        assert with_packaged_configs(arguments) == arguments


def test_a_copy_is_written_once_and_then_left_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["init-config", "quickstart"]) == 0
    copy = tmp_path / "quickstart.yaml"
    assert copy.read_bytes() == (ROOT / "configs" / "quickstart.yaml").read_bytes()
    copy.write_text("mine")
    assert main(["init-config", "quickstart"]) == 2
    assert copy.read_text() == "mine"
    assert "quickstart.yaml exists" in capsys.readouterr().err


def test_the_list_has_a_sentence_for_each(capsys):
    assert main(["init-config"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == sorted(packaged_configs())
    assert all(len(line.split()) > 3 for line in lines)


def test_an_unknown_name_is_told_those_there_are(capsys):
    assert main(["init-config", "rtx9999"]) == 2
    assert "rtx2050" in capsys.readouterr().err


def test_the_version_is_one(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"nanogpt_lit {__version__}\n"
    assert f"version: {__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert re.search(rf"^## {re.escape(__version__)}\b", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)


def run(*command, **options):
    answer = subprocess.run([str(word) for word in command], capture_output=True, text=True, **options)
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel made of the source distribution, as an index gets it."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT)
    (path,) = folder.glob("*.whl")
    return path


@pytest.mark.slow
def test_the_wheel_carries_configurations_types_and_licence(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {f"nanogpt_lit/configs/{name}.yaml" for name in packaged_configs()} <= set(names)
    assert "nanogpt_lit/py.typed" in names
    assert f"nanogpt_lit-{__version__}.dist-info/licenses/LICENSE" in names
    assert not [name for name in names if name.startswith(("tests/", "scripts/", "docs/"))]


@pytest.mark.slow
def test_the_wheel_trains_in_an_empty_folder_with_the_console_script(wheel, tmp_path):
    """In an environment of its own, which takes the packages that it depends on from the one of the tests."""
    environment = tmp_path / "venv"
    run(sys.executable, "-m", "venv", environment)
    python = next(environment.glob("[bS]*/python*"))
    run(python, "-m", "pip", "install", "--no-deps", "--no-index", wheel)
    (site,) = environment.glob("[lL]ib/**/site-packages")
    there = {str(Path(find_spec(name).origin).parents[1]) for name in ("torch", "lightning", "accelerate", "tiktoken")}
    (site / "packages_of_the_tests.pth").write_text("\n".join(there))
    script = next(environment.glob("[bS]*/nanogpt-lit*"))
    work = tmp_path / "empty"
    work.mkdir()
    tiny = "--trainer.max_steps=2 --trainer.limit_val_batches=1 --model.gpt.n_layer=1 --model.gpt.n_embd=16 "
    tiny += "--model.gpt.n_head=1 --data.block_size=16 --data.batch_size=2"
    (work / "text.txt").write_text("99 bottles of beer on the wall. " * 100)
    printed = run(script, "fit", "--config", "quickstart", "--data.source=text.txt", *tiny.split(), cwd=work)
    assert "best checkpoint" in printed
    assert "test_packaged_configs" not in run(script, "--help", cwd=work)
    origin = run(python, "-c", "import nanogpt_lit; print(nanogpt_lit.__file__)", cwd=work)
    assert Path(origin.strip()).is_relative_to(environment)


def test_each_python_that_is_named_is_one_that_is_allowed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = {line.rpartition(" ")[2] for line in project["classifiers"] if re.search(r":: 3\.\d+$", line)}
    assert named == {"3.11", "3.12", "3.13"}
    assert project["requires-python"] == ">=3.11"
