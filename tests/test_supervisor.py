"""The supervisor with children that are a few lines of Python, and then with the real fit."""

import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from small_runs import BOTTLES

from nanogpt_lit.__main__ import main
from nanogpt_lit.checkpoint.run_file import load_run
from nanogpt_lit.supervise.keep_alive import Supervisor, ending, keep_alive

posix = pytest.mark.skipif(os.name != "posix", reason="sends POSIX signals")

BEGINNING = """
import os, signal, sys, time
from pathlib import Path
from nanogpt_lit.runtime.launch import TokensReport, report_error, stop_with_supervisor
here = Path({folder!r})
start = len(list(here.glob("start_*")))
(here / f"start_{{start}}").write_text(" ".join(sys.argv[1:]))
position = TokensReport()
def fail(error, code=1):
    report_error(error)
    sys.exit(code)
"""


@pytest.fixture
def child(tmp_path):
    """The command of a child whose code knows `start`, the number of starts before it."""

    def command(code):
        script = tmp_path / "child.py"
        script.write_text(BEGINNING.format(folder=str(tmp_path)) + code)
        return [sys.executable, str(script)]

    return command


def run(command, **options):
    return Supervisor(command, pause_s=0.01, **options).run()


def starts(folder):
    return len(list(folder.glob("start_*")))


def lines(capfd):
    return [line.partition("keep-alive: ")[2] for line in capfd.readouterr().err.splitlines() if "keep-alive: " in line]


def test_a_run_that_ends_well_is_started_once_and_nothing_is_said(child, tmp_path, capfd):
    assert run(child("position.write(100)")) == 0
    assert starts(tmp_path) == 1
    assert lines(capfd) == []


@posix
def test_a_child_killed_at_different_steps_is_started_until_it_ends(child, tmp_path, capfd):
    code = "position.write(1000 * (start + 1))\nif start < 3: os.kill(os.getpid(), signal.SIGKILL)"
    assert run(child(code)) == 0
    assert starts(tmp_path) == 4
    assert lines(capfd) == [
        f"killed by SIGKILL, after {n},000 tokens; starting again in 0.01 s" for n in (1, 2, 3)
    ]  # progress each time: the pause does not grow


def test_the_same_error_at_the_same_step_stops_and_is_named(child, tmp_path, capfd):
    # What differs from time to time in a message of CUDA does not make it another error.
    code = "position.write(2048)\nfail(RuntimeError(f'out of memory: {start}.5 GiB free at 0x{start}ff'))"
    assert run(child(code)) == 1
    assert starts(tmp_path) == 2
    sentence = "stopped: the same again, RuntimeError: out of memory: 1.5 GiB free at 0x1ff, after 2,048 tokens"
    assert lines(capfd)[-1] == sentence


def test_another_error_at_the_same_step_and_the_same_error_at_another_are_tried_again(child, tmp_path):
    code = "position.write([5, 5, 6, 6][start])\nfail([KeyError(), IndexError(), IndexError(), IndexError()][start], 3)"
    assert run(child(code)) == 3
    assert starts(tmp_path) == 4


def test_an_error_that_alternates_with_another_is_recognised(child, tmp_path):
    assert run(child("position.write(5)\nfail([KeyError(), IndexError(), KeyError()][start])")) == 1
    assert starts(tmp_path) == 3


def test_pauses_grow_while_there_is_no_progress_and_stop_growing(child, capfd):
    code = "fail(RuntimeError('abcdef'[start])) if start < 5 else None"
    assert run(child(code), longest_pause_s=0.05) == 0
    pauses = [line.rpartition(" in ")[2] for line in lines(capfd)]
    assert pauses == ["0.01 s", "0.02 s", "0.04 s", "0.05 s", "0.05 s"]


def test_a_mistake_of_the_user_is_not_tried_again(child, tmp_path, capfd):
    assert run(child("fail(ValueError('data.source=x does not exist.'), 2)")) == 2
    assert starts(tmp_path) == 1
    assert lines(capfd) == ["stopped: ValueError: data.source=x does not exist., which starting again does not mend"]


def test_a_defect_before_the_first_step_is_tried_again_and_a_mistake_is_not(child, tmp_path):
    code = (
        "from nanogpt_lit.__main__ import exit_code\n"
        "from nanogpt_lit.errors import UserError\n"
        "def refuse(): raise UserError('data.source=x does not exist.')\n"
        "sys.exit(exit_code((lambda: int('x')) if start == 0 else refuse))"
    )
    assert run(child(code)) == 2
    assert starts(tmp_path) == 2


def test_a_file_that_fails_in_the_middle_of_training_is_tried_again(child, tmp_path):
    assert run(child("position.write(7)\nfail(OSError('read error'), 2) if start == 0 else None")) == 0
    assert starts(tmp_path) == 2


@pytest.mark.parametrize("code", [130, 143, 129])
def test_a_stop_that_was_asked_for_is_passed_on(child, tmp_path, capfd, code):
    assert run(child(f"sys.exit({code})")) == code
    assert starts(tmp_path) == 1
    assert lines(capfd) == []


def test_after_an_error_of_cuda_the_run_does_not_go_on_without_the_card(child, tmp_path, capfd):
    code = "position.write(start or 1)\nfail(RuntimeError('CUDA error: unknown error'))"
    assert run(child(code), on_gpu=["--trainer.accelerator=gpu"]) == 1
    assert (tmp_path / "start_0").read_text() == ""
    assert (tmp_path / "start_1").read_text() == "--trainer.accelerator=gpu"
    assert "sudo modprobe nvidia_uvm" in lines(capfd)[-1]


# Signals.

WAITS_FOR_SIGNALS = """
got = []
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, lambda number, _: got.append(number))
stop_with_supervisor()
(here / "ready").touch()
until = time.monotonic() + 60
while not got and time.monotonic() < until:
    time.sleep(0.01)
time.sleep(0.6)  # for a second one to arrive
(here / "got").write_text(" ".join(str(int(number)) for number in got))
sys.exit(128 + got[0])
"""


def appears(path):
    until = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < until, f"{path} did not appear"
        time.sleep(0.01)


@posix
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP] if os.name == "posix" else [])
def test_a_signal_reaches_the_child_once_and_its_exit_code_is_passed_on(child, tmp_path, number):
    def press():
        appears(tmp_path / "ready")
        os.kill(os.getpid(), number)

    threading.Thread(target=press).start()
    before = signal.getsignal(number)
    assert run(child(WAITS_FOR_SIGNALS)) == 128 + number
    assert (tmp_path / "got").read_text() == str(int(number))
    assert signal.getsignal(number) == before


@posix
def test_a_signal_that_is_ignored_stays_so(child):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        code = "os.kill(os.getppid(), signal.SIGHUP)\nos.kill(os.getpid(), signal.SIGHUP)\ntime.sleep(0.2)"
        assert run(child(code)) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


SUPERVISE = (
    "import sys; from nanogpt_lit.supervise.keep_alive import Supervisor; sys.exit(Supervisor({command!r}).run())"
)


@posix
def test_ctrl_c_in_a_terminal_goes_to_the_whole_group_and_reaches_the_child_once(child, tmp_path):
    command = [sys.executable, "-c", SUPERVISE.format(command=child(WAITS_FOR_SIGNALS))]
    with subprocess.Popen(command, process_group=0) as supervisor:
        appears(tmp_path / "ready")
        os.killpg(supervisor.pid, signal.SIGINT)
        assert supervisor.wait() == 130
    assert (tmp_path / "got").read_text() == str(int(signal.SIGINT))


@posix
def test_a_child_ends_when_its_supervisor_is_killed(child, tmp_path):
    command = [sys.executable, "-c", SUPERVISE.format(command=child(WAITS_FOR_SIGNALS))]
    with subprocess.Popen(command) as supervisor:
        appears(tmp_path / "ready")
        supervisor.kill()
    appears(tmp_path / "got")


@posix
def test_a_stop_in_a_pause_ends_it(child, tmp_path):
    def press():
        appears(tmp_path / "failing")
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=press).start()
    code = "(here / 'failing').touch()\nfail(RuntimeError())"
    assert Supervisor(child(code), pause_s=60).run() == 143
    assert starts(tmp_path) == 1


# The command line.


@pytest.mark.parametrize("option", ["--ckpt_path=a.safetensors", "--resume=a.safetensors", "--ckpt_path a.safetensors"])
def test_a_checkpoint_named_by_the_user_is_refused(capsys, option):
    assert main(["fit", "--keep-alive", *option.split()]) == 2
    assert re.search(r"error: --\w+ names one checkpoint", capsys.readouterr().err)


def test_the_fit_that_is_started_resumes_by_itself(monkeypatch):
    commands = []
    monkeypatch.setattr(Supervisor, "run", lambda self: commands.append(self._command) or 0)
    keep_alive(["fit", "--keep-alive", "--config", "a.yaml"])
    keep_alive(["fit", "--resume=auto", "--keep-alive"])
    assert commands == [
        [sys.executable, "-m", "nanogpt_lit", "fit", "--config", "a.yaml", "--resume", "auto"],
        [sys.executable, "-m", "nanogpt_lit", "fit", "--resume=auto"],
    ]


def test_the_accelerate_loop_is_kept_alive_as_fit_is(monkeypatch):
    commands = []
    monkeypatch.setattr(Supervisor, "run", lambda self: commands.append(self._command) or 0)
    assert main(["fit-accelerate", "--config", "a.yaml", "--keep-alive"]) == 0
    expected = [sys.executable, "-m", "nanogpt_lit", "fit-accelerate", "--config", "a.yaml", "--resume", "auto"]
    assert commands == [expected]


def test_help_of_fit_names_what_keeps_it_alive(capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    assert "--keep-alive" in capsys.readouterr().out


def test_the_supervisor_holds_no_torch_in_memory():
    code = "import sys, nanogpt_lit.supervise.keep_alive; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1]).returncode == 0


# The real fit.


def small_fit(folder, root):
    text = folder / "text.txt"
    text.write_text(BOTTLES)
    return [
        f"--trainer.default_root_dir={root}", "--trainer.accelerator=cpu", "--trainer.max_steps=42",
        "--trainer.val_check_interval=6", "--trainer.limit_val_batches=1", "--trainer.enable_progress_bar=false",
        "--trainer.callbacks=nanogpt_lit.loops.lightning.TextSamples", "--trainer.callbacks.tokens=2",
        "--model.gpt.n_layer=1", "--model.gpt.n_head=2", "--model.gpt.n_embd=8", "--model.gpt.dropout=0.1",
        f"--data.source={text}", f"--data.shards_dir={folder / 'shards'}", "--data.tokenizer=byte",
        "--data.block_size=16", "--data.batch_size=2", "--data.val_fraction=0.1",
    ]  # fmt: skip


def newest(root):
    return max((load_run(path) for path in root.rglob("last.safetensors")), key=lambda state: state.step)


@posix
@pytest.mark.slow
def test_a_fit_that_is_killed_ends_with_the_weights_of_one_that_was_not(tmp_path, monkeypatch, capfd):
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    assert main(["fit", *small_fit(tmp_path, undisturbed)]) == 0
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))  # on which the sums of a product depend
    made = []

    def impatient(command, on_gpu):
        made.append(Supervisor(command, on_gpu, pause_s=0.01))
        return made[0]

    monkeypatch.setattr("nanogpt_lit.supervise.keep_alive.Supervisor", impatient)

    def kill_after_a_checkpoint():
        while not list(disturbed.rglob("last.safetensors")):
            time.sleep(0.005)
        time.sleep(random.uniform(0, 0.05))
        made[0]._child.kill()

    threading.Thread(target=kill_after_a_checkpoint, daemon=True).start()
    assert main(["fit", "--keep-alive", *small_fit(tmp_path, disturbed)]) == 0
    (line,) = lines(capfd)
    assert re.fullmatch(r"killed by SIGKILL, after [\d,]+ tokens; starting again in 0.01 s", line)
    assert len(list(disturbed.glob("version_*"))) == 1  # one run, gone on
    there, here = newest(undisturbed), newest(disturbed)
    assert here.step == there.step == 42
    assert not [name for name, weight in there.weights.items() if not torch.equal(weight, here.weights[name])]


@posix
def test_a_signal_without_a_name_is_told_by_its_number(tmp_path):
    assert ending(-int(signal.SIGRTMIN + 1), tmp_path).error == f"killed by signal {signal.SIGRTMIN + 1}"
    assert ending(-int(signal.SIGKILL), tmp_path).error == "killed by SIGKILL"
