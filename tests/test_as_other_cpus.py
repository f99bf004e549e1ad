"""The suite as other CPUs run it: the limits reach PyTorch, and what this machine lacks is left out."""

import importlib.util
import multiprocessing
import os
import subprocess
import time
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "scripts" / "test_as_other_cpus.py"


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("as_other_cpus", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_files_that_compare_bits_are_there(script):
    assert [path for path in script.COMPARE_BITS if not (script.ROOT / path).is_file()] == []


def test_pytest_is_run_with_the_kernels_of_the_cpu_and_a_failure_is_told(script, tmp_path, capfd):
    test = tmp_path / "test_capability.py"
    test.write_text("import torch\ndef test_it():\n    assert torch.backends.cpu.get_cpu_capability() == 'DEFAULT'\n")
    here = torch.backends.cpu.get_cpu_capability()
    code = script.main(["--cpus", "sse4", "this", "--", "-n", "0", f"--rootdir={tmp_path}", str(test)])
    assert code == int(here != "DEFAULT")
    last = capfd.readouterr().out.splitlines()[-2:]
    assert last[0].split() == ["sse4", "passed"]
    assert last[1].startswith("this")
    assert last[1].endswith("passed" if here == "DEFAULT" else "exit code 1")


def test_the_others_that_keep_the_machine_busy_end_with_the_tests(script, monkeypatch):
    during = []
    monkeypatch.setattr(script, "never_rest", lambda: time.sleep(60))
    monkeypatch.setattr(
        subprocess,
        "run",
        lambda *args, **options: (
            during.extend(multiprocessing.active_children()) or subprocess.CompletedProcess(args, 1)
        ),
    )
    assert script.main(["--cpus", "busy"]) == 1
    assert len(during) > os.cpu_count()
    for process in during:
        process.join(10)
        assert process.exitcode is not None


def test_kernels_that_this_cpu_lacks_are_left_out(script, monkeypatch, capsys):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: subprocess.CompletedProcess(args, 0))
    assert script.main(["--cpus", "avx2", "avx512"]) == 0
    assert [line.split(maxsplit=1)[1] for line in capsys.readouterr().out.splitlines()[-2:]] == [
        "passed", "left out: this CPU has no AVX512",
    ]  # fmt: skip
