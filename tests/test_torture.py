"""A handful of what scripts/torture.py does a hundred times; docs/torture.json is the record of those."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "torture.py"
COUNT = int(os.environ.get("TORTURE", "11"))
"""Trials of a long proof; 11 have every disturbance once."""


def torture(*options):
    return subprocess.run([sys.executable, str(SCRIPT), *options], capture_output=True, text=True)


def check(answer, record, count):
    assert answer.returncode == 0, answer.stdout + answer.stderr
    said = json.loads(record.read_text())
    assert (said["trials"], said["passed"]) == (count, count)
    assert sum(said["struck"].values()) > 0, "nothing was disturbed"


@pytest.mark.slow
def test_killed_and_stopped_runs_end_with_the_bits_of_the_undisturbed_one(tmp_path):
    record = tmp_path / "record.json"
    check(torture("--count=2", "--setups=1", f"--out={record}"), record, 2)


@pytest.mark.long
@pytest.mark.parametrize(
    ("processes", "strategy"), [(1, "ddp"), (2, "ddp"), (2, "ModelParallelStrategy"), (3, "ModelParallelStrategy")]
)
def test_every_disturbance(processes, strategy, tmp_path):
    record = tmp_path / "record.json"
    options = f"--count={COUNT}", f"--processes={processes}", f"--strategy={strategy}", f"--out={record}"
    check(torture(*options), record, COUNT)


BREAKS = {
    "parts of the state differ": """
from nanogpt_lit.loops import lightning_run
from nanogpt_lit.run import resume
for module in resume, lightning_run:
    module.random_state_of = lambda *_: None
""",
    "it went on from another": """
from nanogpt_lit.cli import beginning
beginning.newest_run = lambda *_: None
""",
}
RUN = f"""
import runpy, sys
sys.argv[0] = {str(SCRIPT)!r}
sys.path.insert(0, {str(SCRIPT.parent)!r})
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.long
@pytest.mark.parametrize("complaint", BREAKS)
def test_a_resume_that_loses_something_is_found_out(complaint):
    # The trial of this number is stopped by SIGTERM, and so goes on from a step in the middle of its run.
    command = [sys.executable, "-c", BREAKS[complaint] + RUN, "--only=2", "--setups=1"]
    answer = subprocess.run(command, capture_output=True, text=True)
    assert answer.returncode == 1, answer.stdout + answer.stderr
    assert complaint in answer.stdout
