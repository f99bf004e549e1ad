"""docs/t4.ipynb, the notebook for a T4: run here in a tiny form, without the cells that need the GPU or the network."""

import ast
import json
import re
import zipfile

import pytest
from page_commands import ROOT, TINY_RUN, clone

NOTEBOOK = json.loads((ROOT / "docs" / "t4.ipynb").read_text(encoding="utf-8"))
CELLS = {cell["id"]: cell for cell in NOTEBOOK["cells"]}
SCRIPTS = {name: "".join(cell["source"]) for name, cell in CELLS.items() if cell["cell_type"] == "code"}
ELSEWHERE = {"install", "gpu"}
"""Tags of the cells that only a machine with a T4 can run."""
TINY = {
    "FOLDER": "runs/tiny",
    "SOURCE": "my_texts",
    "STEPS": 4,
    "PROMPT": "A bottle",
    "OPTIONS": [*TINY_RUN.split(), "--data.tokenizer=byte", "--model.gpt.vocab_size=257"],
}


def tags(name):
    return set(CELLS[name]["metadata"].get("tags", []))


def test_the_notebook_has_the_parts_of_its_format_and_is_saved_without_output():
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    assert NOTEBOOK["metadata"]["kernelspec"] == {"display_name": "Python 3", "language": "python", "name": "python3"}
    assert len(CELLS) == len(NOTEBOOK["cells"])
    for name, cell in CELLS.items():
        assert re.fullmatch(r"[a-zA-Z0-9-_]{1,64}", name)
        kind = {"outputs": [], "execution_count": None} if cell["cell_type"] == "code" else {}
        assert set(cell) == {"id", "cell_type", "metadata", "source", *kind}
        assert {key: cell[key] for key in kind} == kind
    assert {tag: [name for name in SCRIPTS if tag in tags(name)] for tag in (*ELSEWHERE, "parameters")} == {
        "install": ["install"],
        "gpu": ["gpu"],
        "parameters": ["parameters"],
    }


@pytest.mark.parametrize("name", SCRIPTS)
def test_each_cell_is_plain_python(name):
    ast.parse(SCRIPTS[name])


def test_the_test_replaces_each_parameter_and_no_other():
    assigned = [
        target.id
        for statement in ast.parse(SCRIPTS["parameters"]).body
        for target in getattr(statement, "targets", None) or [statement.target]
    ]
    assert assigned == [*TINY]


@pytest.mark.slow
def test_the_notebook_runs_from_the_text_to_the_export_and_its_training_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(clone(tmp_path))
    names = {}
    for name, script in SCRIPTS.items():
        if not tags(name) & ELSEWHERE:
            exec(compile(script, name, "exec"), names)
        if name == "parameters":
            names |= TINY
    printed = capsys.readouterr().out
    assert "t4: 15,360 MiB" in printed
    assert re.search(r"^steps +2$", printed, flags=re.M)
    assert "A bottle" in printed
    with zipfile.ZipFile("t4-hf.zip") as exported:
        assert {"config.json", "model.safetensors"} <= set(exported.namelist())

    names["OPTIONS"] = [*TINY["OPTIONS"], "--trainer.max_steps=4"]
    exec(SCRIPTS["train"], names)
    assert re.search(r"^steps +4$", capsys.readouterr().out, flags=re.M)
    assert [folder.name for folder in (tmp_path / "runs" / "tiny").glob("version_*")] == ["version_0"]
