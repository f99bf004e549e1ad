"""A job of SLURM's: it is simulated by its variables, its signal and a `scontrol` of our own."""

import os
import signal
import sys

import pytest
from small_runs import LOOPS, different, small_run

from nanogpt_lit.checkpoint.run_file import load_run
from nanogpt_lit.module import LitNanoGPT
from nanogpt_lit.runtime.launch import requeue

pytestmark = pytest.mark.skipif(os.name == "nt", reason="SLURM is POSIX's")
LAST = "checkpoints/last.safetensors"


@pytest.fixture
def job(monkeypatch, tmp_path):
    """Job 7 of one task, and the file that notes what scontrol was called with."""
    asked = tmp_path / "asked"
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    note = f'open({str(asked)!r}, "a").write(" ".join(sys.argv[1:]) + chr(10))'
    scontrol.write_text(f"#!{sys.executable}\nimport sys\n{note}\n")
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{scontrol.parent}{os.pathsep}{os.environ['PATH']}")
    job = {"JOB_ID": "7", "NTASKS": "1", "JOB_NAME": "gpt", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    for name, value in job.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    return asked


@pytest.mark.parametrize("loop", LOOPS)
def test_a_job_that_is_warned_ends_its_step_saves_asks_to_be_queued_and_goes_on_to_the_same_bits(
    loop, text, tmp_path, job, monkeypatch, capsys
):
    assert loop(*small_run(text, tmp_path / "whole")) == 0
    forward, calls = LitNanoGPT.forward, iter(range(1, 10**6))

    def warned(self, tokens, targets):
        if self.training and next(calls) == 11:  # the first micro-batch of step 6
            signal.raise_signal(signal.SIGUSR1)
        return forward(self, tokens, targets)

    with monkeypatch.context() as patch:
        patch.setattr(LitNanoGPT, "forward", warned)
        capsys.readouterr()
        assert loop(*small_run(text, tmp_path / "cut")) == 0
    last = tmp_path / "cut" / LOOPS[loop] / LAST
    out = capsys.readouterr().out
    assert "stopped by SLURM's signal after step 6; saved " in out
    assert "job 7 is queued again" in out
    assert job.read_text() == "requeue 7\n"
    assert load_run(last).step == 6
    assert not list((tmp_path / "cut").glob("hpc_ckpt*"))  # Lightning's own, of any moment

    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert loop(*small_run(text, tmp_path / "cut")) == 0  # the same command
    assert f"resume: going on from {last}, step 6" in capsys.readouterr().out
    assert not different(tmp_path / "whole" / LOOPS[loop] / LAST, last)


def test_a_task_of_an_array_is_queued_by_its_number_and_a_failure_is_told(job, monkeypatch):
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "5")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    assert requeue() == "job 5_2 is queued again"
    assert job.read_text() == "requeue 5_2\n"
    monkeypatch.setenv("PATH", "")
    assert "job 5_2 could not be queued again (" in requeue()
