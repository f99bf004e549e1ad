"""Runs that are told to stop, by real signals at any moment: saved between two steps, gone on from to the same bits."""

import os
import random
import signal
import subprocess
import sys
import time
from datetime import timedelta

import pytest
import torch
from small_runs import LOOPS, accelerate, different, fit, small_run, started

from nanogpt_lit.checkpoint.run_file import load_run
from nanogpt_lit.module import LitNanoGPT
from nanogpt_lit.parity.processes import run_together
from nanogpt_lit.run import stops
from nanogpt_lit.run.stops import Reason, Stops, seconds_of

STEPS = 8
posix = pytest.mark.skipif(os.name != "posix", reason="a process cannot send itself these signals on Windows")


def thirds(text, root, *more):
    """8 steps of 3 micro-batches, with a validation of 4 batches after 4."""
    split = ("--trainer.accumulate_grad_batches=3", "--trainer.val_check_interval=12", "--trainer.limit_val_batches=4")
    return small_run(text, root, f"--trainer.max_steps={STEPS}", *split, *more)


@pytest.fixture(scope="module")
def undisturbed(text, tmp_path_factory):
    root = tmp_path_factory.mktemp("undisturbed")
    assert fit(*thirds(text, root)) == 0
    return root / "version_0" / "checkpoints" / "last.safetensors"


@pytest.fixture
def at_forward(monkeypatch):
    """at_forward(n, act) calls act inside the n-th forward: in the middle of a micro-batch, or of a validation."""
    forward = LitNanoGPT.forward

    def arrange(n, act):
        calls = iter(range(1, 10**6))

        def counted(self, tokens, targets):
            if next(calls) == n:
                act()
            return forward(self, tokens, targets)

        monkeypatch.setattr(LitNanoGPT, "forward", counted)

    return arrange


def signal_here(number):
    return lambda: os.kill(os.getpid(), number)


def step_of(forward):
    """The step that the n-th forward belongs to, and so the one that is saved; 13 to 16 are the first validation."""
    return 4 if 13 <= forward <= 16 else -(-(forward - 4 * (forward > 16)) // 3)


@posix
@pytest.mark.parametrize(
    ("loop", "number", "code"),
    [(fit, signal.SIGTERM, 143), (accelerate, signal.SIGINT, 130), (fit, getattr(signal, "SIGHUP", None), 129)],
)
def test_a_signal_at_any_moment_ends_a_step_saves_and_the_run_gone_on_from_has_the_same_bits(
    loop, number, code, undisturbed, text, tmp_path, at_forward, monkeypatch, capsys
):
    moment = random.randint(1, 24)  # of 32, the rest being the last step and the validation after it
    before = signal.getsignal(number)
    at_forward(moment, signal_here(number))
    assert loop(*thirds(text, tmp_path)) == code, moment
    assert signal.getsignal(number) == before
    last = tmp_path / LOOPS[loop] / "checkpoints" / "last.safetensors"
    assert load_run(last).step == step_of(moment), moment
    out = capsys.readouterr().out
    assert f"after step {step_of(moment)}; saved {last}" in out
    monkeypatch.undo()
    assert loop(*thirds(text, tmp_path / "on"), f"--ckpt_path={last}") == 0
    assert not different(tmp_path / "on" / LOOPS[loop] / "checkpoints/last.safetensors", undisturbed), moment


@pytest.mark.parametrize(("loop", "moment"), [(fit, 2), (fit, 12), (fit, 14), (accelerate, 14)])
def test_a_stop_file_ends_the_run_in_peace_and_is_taken_away(loop, moment, text, tmp_path, at_forward, capsys):
    folder = tmp_path / LOOPS[loop]
    at_forward(moment, (folder / "stop").touch)
    assert loop(*thirds(text, tmp_path)) == 0
    state = load_run(folder / "checkpoints/last.safetensors")
    assert state.step == step_of(moment)
    assert (state.validations["latest"] is not None) == (state.step == 4)
    assert not (folder / "stop").exists()
    assert f"stopped by the stop file after step {step_of(moment)}; saved" in capsys.readouterr().out
    if step_of(moment) == 4:  # saved by the validation: not a second time
        assert not (folder / "checkpoints" / "previous.safetensors").exists()


@pytest.mark.parametrize("loop", LOOPS)
def test_max_time_ends_a_whole_step(loop, text, tmp_path, at_forward, monkeypatch):
    clock = {"s": 0.0}
    monkeypatch.setattr(stops.Stops.__init__, "__defaults__", (None, lambda: clock["s"], None))
    at_forward(8, lambda: clock.update(s=60.0))
    assert loop(*thirds(text, tmp_path), "--trainer.max_time=00:00:01:00") == 0
    assert load_run(tmp_path / LOOPS[loop] / "checkpoints/last.safetensors").step == 3


def test_max_time_is_read_as_lightning_reads_it():
    assert seconds_of("01:02:03:04") == timedelta(1, 4, minutes=3, hours=2).total_seconds()
    assert seconds_of({"minutes": 2}) == 120
    assert seconds_of(timedelta(hours=1)) == 3600
    assert seconds_of(None) is None
    with pytest.raises(ValueError, match=r"trainer\.max_time=8h should be DD:HH:MM:SS"):
        seconds_of("8h")


@posix
@pytest.mark.parametrize("loop", LOOPS)
def test_without_checkpoints_a_stop_says_that_nothing_was_saved(loop, text, tmp_path, at_forward, capsys):
    at_forward(5, signal_here(signal.SIGTERM))
    assert loop(*thirds(text, tmp_path), "--trainer.enable_checkpointing=false") == 143
    assert "after step 2; nothing was saved: checkpoints are off" in capsys.readouterr().out
    assert not list(tmp_path.rglob("*.safetensors"))


@posix
def test_a_signal_in_the_last_step_lets_the_run_end(undisturbed, text, tmp_path, at_forward):
    at_forward(27, signal_here(signal.SIGTERM))
    assert fit(*thirds(text, tmp_path)) == 0
    assert not different(tmp_path / "version_0" / "checkpoints/last.safetensors", undisturbed)


@posix
def test_a_second_ctrl_c_ends_the_process_at_once(tmp_path):
    program = (
        "import os, signal, sys, time\n"
        "from nanogpt_lit.run.stops import Stops\n"
        "now = [0.0]\n"
        "with Stops(None, clock=lambda: now[0]) as stops:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    now[0] = 0.5\n"
        "    os.kill(os.getpid(), signal.SIGINT)  # by torchrun, of the same keystroke\n"
        "    assert stops.between_steps()\n"
        "    print('still here', flush=True)\n"
        "    now[0] = 2.0\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('never here', flush=True)\n"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (answer.returncode, answer.stdout) == (130, "still here\n"), answer.stderr
    assert answer.stderr.count("finishing this step, then saving") == 1


@posix
def test_under_nohup_a_closed_terminal_does_not_stop_a_run_and_ctrl_c_does():
    program = (
        "import os, signal\n"
        "from nanogpt_lit.run.stops import Stops\n"
        "with Stops(None) as stops:\n"
        "    os.kill(os.getpid(), signal.SIGHUP)\n"
        "    print(stops.between_steps())\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print(stops.between_steps(), stops.reason.name)\n"
        "print(signal.getsignal(signal.SIGHUP).name)\n"
    )
    answer = subprocess.run(["nohup", sys.executable, "-c", program], capture_output=True, text=True)
    assert answer.stdout.splitlines() == ["False", "True INTERRUPT", "SIG_IGN"], answer.stderr


@posix
@pytest.mark.parametrize(
    ("loop", "number"), [(fit, signal.SIGTERM), (fit, signal.SIGINT), (accelerate, getattr(signal, "SIGHUP", None))]
)
def test_a_signal_that_the_process_ignores_leaves_the_run_alone(
    loop, number, undisturbed, text, tmp_path, at_forward, request
):
    before = signal.signal(number, signal.SIG_IGN)
    request.addfinalizer(lambda: signal.signal(number, before))
    at_forward(5, signal_here(number))
    assert loop(*thirds(text, tmp_path)) == 0
    assert not different(tmp_path / LOOPS[loop] / "checkpoints/last.safetensors", undisturbed)
    assert signal.getsignal(number) is signal.SIG_IGN


BREAK = """
import os, signal
signal.SIGBREAK = signal.SIGUSR2  # as Windows has it
from nanogpt_lit.run.stops import Stops
with Stops(None) as stops:
    os.kill(os.getpid(), signal.SIGBREAK)
    assert stops.between_steps()
    print(stops.reason.exit_code)
"""


@posix
def test_ctrl_break_and_a_closed_console_stop_as_ctrl_c_does():
    answer = subprocess.run([sys.executable, "-c", BREAK], capture_output=True, text=True)
    assert answer.stdout.strip() == "130", answer.stderr


def test_the_strongest_reason_is_the_one_that_counts(tmp_path):
    clock = {"s": 0.0}
    with Stops(tmp_path, max_time_s=1.0, clock=lambda: clock["s"]) as asked_to:
        assert not asked_to.between_steps()
        assert asked_to.reason is None
        clock["s"] = 1.0
        assert asked_to.between_steps()
        assert asked_to.reason is Reason.MAX_TIME
        (tmp_path / "stop").touch()
        assert asked_to.between_steps()
        assert asked_to.reason is Reason.STOP_FILE


def in_a_session(loop, *arguments):
    os.setsid()  # as a shell starts it: with a process group of its own
    sys.exit(loop(*arguments))


@posix
@pytest.mark.slow
@pytest.mark.parametrize(("loop", "number", "code"), [(fit, signal.SIGINT, 130), (accelerate, signal.SIGTERM, 143)])
def test_a_signal_to_a_whole_process_group_ends_the_step(loop, number, code, text, tmp_path):
    options = thirds(text, tmp_path, "--trainer.max_steps=100000")
    run = started(in_a_session, loop, *options, "--trainer.val_check_interval=300000")
    events = tmp_path / LOOPS[loop]
    while not list(events.glob("events*")):
        assert run.is_alive()
        time.sleep(0.1)
    time.sleep(random.uniform(1.0, 2.0))
    os.killpg(run.pid, number)
    try:
        run.join(60)
        assert run.exitcode == code
    finally:
        run.kill()
    assert load_run(events / "checkpoints/last.safetensors").step > 0


def stop_by_one(folder):
    """Each of two processes: the second alone is signalled, in its third step."""
    stopped_after, rank = None, torch.distributed.get_rank()
    with Stops(folder) as asked_to:
        for step in range(1, 6):
            if rank == 1 and step == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            if asked_to.between_steps():
                stopped_after = step
                break
    return stopped_after, asked_to.reason.name


@posix
def test_all_processes_stop_after_the_same_step(tmp_path):
    assert run_together(2, stop_by_one, tmp_path) == [(3, "TERMINATE")] * 2
