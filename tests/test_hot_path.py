"""How much of the package a steady optimizer step runs through, and how much is read before the first one ends."""

import json
import subprocess
import sys

import pytest
from small_runs import small_run

MOST_FILES, MOST_FUNCTIONS, MOST_FILES_BEFORE_THE_FIRST_STEP = 18, 50, 70
MEASURE = """
import json, sys
from pathlib import Path

import nanogpt_lit

PACKAGE = str(Path(nanogpt_lit.__file__).parent)
called, steps = set(), []

def note(frame, event, arg):
    code = frame.f_code
    if event == "call" and code.co_filename.startswith(PACKAGE):
        called.add((code.co_filename.removeprefix(PACKAGE), code.co_qualname))
        if code.co_qualname == "WarmupDecay.step":
            steps.append(sorted(called))
            called.clear()

sys.setprofile(note)
from nanogpt_lit.__main__ import main
code = main(sys.argv[1:])
sys.setprofile(None)
print("measured " + json.dumps({"code": code, "steps": steps}))
"""


@pytest.fixture(scope="module")
def steps(text, tmp_path_factory):
    """(file, function) of all that is called from one step of the schedule to the next, without log and validation."""
    root = tmp_path_factory.mktemp("hot_path")
    options = small_run(
        text, root, "--trainer.log_every_n_steps=100", "--trainer.val_check_interval=16",
        "--trainer.enable_progress_bar=true", "--model.gpt.dropout=0",
    )  # fmt: skip
    # -c, so that what pytest has imported and patched is not there.
    answer = subprocess.run([sys.executable, "-c", MEASURE, "fit", *options], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    (line,) = (line for line in answer.stdout.splitlines() if line.startswith("measured "))
    measured = json.loads(line.removeprefix("measured "))
    assert measured["code"] == 0
    built, first, *others = measured["steps"]  # the schedule steps once when it is built
    assert len(others) == 7
    return [built + first, *others]


def test_a_steady_step_runs_through_few_files_and_functions(steps):
    step = {tuple(call) for call in steps[4]}
    listed = "\n".join(f"{file} {function}" for file, function in sorted(step))
    assert len({file for file, _ in step}) <= MOST_FILES, listed
    assert len(step) <= MOST_FUNCTIONS, listed


def test_few_files_are_read_before_the_first_step_ends(steps):
    files = {file for file, _ in steps[0]}  # to import a file is to run it
    assert len(files) <= MOST_FILES_BEFORE_THE_FIRST_STEP, "\n".join(sorted(files))
