"""The map of the house, held as a rule: arrows point down, and each framework stays in its rooms."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_runs import small_run

PACKAGE = Path(__file__).parents[1] / "nanogpt_lit"

# What each room, or one file of it, may import of the others. Within a room, files may import each other.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "runtime": set(),
    "untrusted": set(),
    "gpt": {"runtime"},
    "gpt.generate": {"data"},
    "gpt.conversation": {"data"},
    "optim": {"untrusted"},
    "data": {"runtime", "untrusted"},
    "data.windows": {"gpt.loss"},
    "memory": {"gpt", "runtime"},
    "plan": {"gpt", "memory", "runtime"},
    "plan.command": {"module", "optim", "data", "loops"},
    "checkpoint": {"gpt", "optim", "data", "runtime", "untrusted"},
    "module": {"gpt", "optim", "memory", "loops.compatibility", "loops.sharded"},
    "run": {"gpt", "optim", "plan", "memory", "checkpoint", "runtime", "untrusted", "loops"},
    "loops": {"gpt", "optim", "memory", "checkpoint", "runtime", "untrusted", "run"},
    "accelerate_config": {"cli", "loops", "runtime", "untrusted"},
    "supervise": {"cli.options", "runtime"},
    "doctor": {"cli", "plan", "data", "checkpoint", "runtime", "untrusted"},
    "cli": {
        "module", "gpt", "optim", "memory", "data", "checkpoint", "plan", "run", "loops", "runtime", "untrusted",
    },
    "evaluate": {"cli", "checkpoint", "data", "gpt", "run", "plan", "runtime"},
    "parity": {"loops", "module", "gpt", "optim", "data", "run", "runtime", "cli"},
    "tune": {"cli", "module", "gpt", "optim", "memory", "data", "loops", "run", "plan", "runtime"},
    "forecast": {"cli", "tune", "checkpoint", "module", "gpt", "data", "loops", "run", "runtime"},
    "__main__": {"cli", "runtime", "supervise"},
    "__init__": {"module", "gpt", "optim", "memory", "data", "loops", "runtime"},
}  # fmt: skip
FRAMEWORKS = {
    "lightning": {
        "cli.fit", "cli.fit_accelerate", "cli.settings", "cli.parser", "module", "data.datamodule",
        "loops.lightning", "loops.lightning_plugins", "loops.lightning_run", "loops.lightning_sharded",
        "parity.brought_back", "parity.known_differences",
        "parity.runs",
    },
    "accelerate": {
        "cli.fit_accelerate", "loops.accelerate", "loops.accelerate_sharded", "parity.brought_back",
        "parity.known_differences", "parity.runs",
    },
    "deepspeed": {"loops.sharded", "checkpoint.sharded_network"},
}  # fmt: skip
OPTIONAL = {
    "deepspeed", "transformers", "gguf", "xllamacpp", "tokenizers", "huggingface_hub", "lm_eval", "datasets", "pyarrow",
}  # fmt: skip
"""Training needs none of them: what does is an extra, and imports it where it is used."""
LIGHT = {
    "__main__", "__init__", "accelerate_config.command", "cli.convert", "cli.generate", "cli.options",
    "cli.packaged_configs", "cli.plan", "cli.prepare", "doctor.command", "doctor.finding", "supervise.keep_alive",
}  # fmt: skip
"""These answer before torch is imported."""
NO_SUBJECT = {"Of", "What", "Whether", "Where", "When", "How", "That", "Those", "As", "By", "For", "None"}
"""Words with which no docstring begins: it begins with a verb or a noun."""
EVERYWHERE = {"errors", ""}  # light files that every room may import; the second is __init__, for __version__

FILES = sorted(PACKAGE.rglob("*.py"))


def imports(path, top_level_only=False):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def dotted(path):
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def test_imports_point_downwards():
    for path in FILES:
        file = dotted(path)
        room = file.partition(".")[0]
        allowed = ALLOWED[room] | ALLOWED.get(file, set()) | EVERYWHERE
        for name in imports(path):
            root, _, rest = name.partition(".")
            target = rest.partition(".")[0]
            if root == "nanogpt_lit" and target != room:
                assert {target, rest} & allowed, f"{file} may not import {name}"


def test_a_framework_is_imported_only_in_its_rooms():
    for path in FILES:
        for name in imports(path):
            root = name.partition(".")[0]
            assert root not in FRAMEWORKS or dotted(path) in FRAMEWORKS[root], f"{dotted(path)} imports {root}"


def test_no_file_needs_an_optional_package_to_be_imported():
    for path in FILES:
        needed = {name.partition(".")[0] for name in imports(path, top_level_only=True)}
        assert not OPTIONAL & needed, dotted(path)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="links to packages need a right on Windows")
def test_a_run_trains_validates_and_saves_where_no_optional_package_is_installed(text, tmp_path):
    packages = tmp_path / "packages"
    packages.mkdir()
    for path in (
        path for folder in sys.path if any(Path(folder).glob("*.dist-info")) for path in Path(folder).iterdir()
    ):
        name = re.sub(r"-[\d.]+\w*\.dist-info$", "", path.name)
        if name not in OPTIONAL and path.suffix != ".pth" and not (packages / path.name).exists():
            (packages / path.name).symlink_to(path)
    program = (
        f"import sys; sys.path += [{str(packages)!r}, {str(PACKAGE.parent)!r}]; "
        f"from nanogpt_lit.__main__ import main; code = main(sys.argv[1:]); "
        f"assert not {OPTIONAL!r} & sys.modules.keys(), sys.modules.keys(); sys.exit(code)"
    )
    command = [sys.executable, "-S", "-c", program, "fit", *small_run(text, tmp_path)]
    answer = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
    assert answer.returncode == 0, answer.stderr
    assert (tmp_path / "version_0/checkpoints/best.safetensors").is_file()


def test_light_files_import_only_the_standard_library_at_the_top():
    for name in sorted(LIGHT):
        for imported in imports(PACKAGE / f"{name.replace('.', '/')}.py", top_level_only=True):
            light = imported.removeprefix("nanogpt_lit.") in {"errors", "doctor", "runtime.launch", *LIGHT}
            assert light or imported.partition(".")[0] not in ("torch", "numpy", "lightning", "nanogpt_lit"), name


@pytest.mark.parametrize(
    ("file", "allowed"),
    [
        ("contract", {"errors", "runtime.precision", "runtime.process_settings", "runtime.processes"}),
        ("reference", {"loops", "loops.contract"}),
        ("accelerate", {"errors", "loops.accelerate_sharded", "loops.contract", "loops.sharded", "runtime.precision"}),
    ],
)
def test_a_loop_imports_nothing_of_ours_but_the_contract(file, allowed):
    ours = {
        name.removeprefix("nanogpt_lit.") for name in imports(PACKAGE / "loops" / f"{file}.py") if "nanogpt" in name
    }
    assert ours <= allowed


def test_what_a_run_does_knows_no_loop_but_the_contract():
    for path in (PACKAGE / "run").glob("*.py"):
        assert not [name for name in imports(path) if ".loops." in name and name != "nanogpt_lit.loops.contract"], path


def test_the_contract_never_reads_the_trainer():
    assert not re.search(r"self\.(_?trainer|optimizers\(|lr_schedulers\()", (PACKAGE / "module.py").read_text())


def test_there_is_no_room_for_everything():
    assert not [p for p in FILES if p.stem in ("utils", "common", "helpers", "config", "core", "base", "misc")]


def test_every_docstring_begins_with_a_verb_or_a_noun() -> None:
    openings = {
        f"{path.relative_to(PACKAGE)}:{line}": text.split()[0]
        for path in PACKAGE.rglob("*.py")
        for line, text in docstrings(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert len(openings) > 1000
    assert [place for place, word in openings.items() if word in NO_SUBJECT] == []


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Those of modules, classes and functions, and the strings below attributes, each with its line."""
    for node in ast.walk(tree):
        for child in ast.iter_child_nodes(node):
            match child:
                case ast.Expr(value=ast.Constant(value=str(text))):
                    yield child.lineno, text
