"""A run has one writer. The others here are real processes, killed as a power cut or a user kills them."""

import errno
import json
import os
import platform
import signal
import threading
import time

import pytest
from small_runs import LOOPS, small_run, started

from nanogpt_lit.checkpoint import run_lock
from nanogpt_lit.checkpoint.run_file import save_run
from nanogpt_lit.checkpoint.run_lock import HOLDER, LOCK, RunLock, read_holder
from nanogpt_lit.checkpoint.state import RunState
from nanogpt_lit.errors import UserError


def train(folder, forks=False):
    lock = RunLock()  # freed when it is forgotten
    lock.acquire(folder)
    if forks and os.fork() == 0:  # a data worker, which outlives us for a moment
        time.sleep(2)
        os._exit(0)
    (folder / "training").touch()
    time.sleep(60)


@pytest.fixture
def another(tmp_path):
    """Starts a process that trains the run in tmp_path."""
    children = []

    def start(**options):
        children.append(started(train, tmp_path, *options.values()))
        until_s = time.monotonic() + 60
        while not (tmp_path / "training").exists():
            assert time.monotonic() < until_s
            assert children[-1].exitcode is None
            time.sleep(0.02)
        return children[-1]

    yield start
    for child in children:
        child.kill()
        child.join()


def test_a_second_process_is_refused_and_told_by_whom_and_a_killed_one_is_no_obstacle(another, tmp_path):
    child = another()
    with pytest.raises(UserError, match=f"is being trained by process {child.pid} on {platform.node()}, since 20"):
        RunLock().acquire(tmp_path)
    child.kill()
    child.join()
    assert read_holder(tmp_path).pid == child.pid  # it had no time to clear up
    began_s = time.monotonic()
    lock = RunLock()
    lock.acquire(tmp_path)
    assert time.monotonic() - began_s < 5
    assert read_holder(tmp_path).pid == os.getpid()
    lock.release()
    assert not (tmp_path / HOLDER).exists()
    RunLock().acquire(tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="Windows does not fork")
def test_a_data_worker_that_outlives_a_killed_run_is_waited_for(another, tmp_path):
    child = another(forks=True)
    child.kill()
    child.join()
    RunLock().acquire(tmp_path)
    assert read_holder(tmp_path).pid == os.getpid()


@pytest.mark.parametrize("loop", LOOPS)
def test_a_run_that_is_being_trained_is_not_gone_on_with_by_a_second_process(loop, another, text, tmp_path, capsys):
    root = tmp_path.parent / f"{tmp_path.name}_root"
    root.mkdir()
    save_run(tmp_path / "checkpoints/last.safetensors", RunState({}, {}, {}, {}, {}, None, [], 5, 5, 1, 1))
    (root / "version_0").symlink_to(tmp_path)
    child = another()
    before = sorted(path.name for path in tmp_path.rglob("*"))
    assert loop(*small_run(text, root), "--resume=auto") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {root / 'version_0'} is being trained by process {child.pid} on ")
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
    assert [path.name for path in root.iterdir()] == ["version_0"]


@pytest.mark.parametrize("loop", LOOPS)
def test_a_run_is_locked_while_it_is_trained_and_free_afterwards(loop, text, tmp_path, monkeypatch):
    held = []
    acquire = RunLock.acquire

    def noted(self, folder):
        acquire(self, folder)
        with pytest.raises(UserError, match="is being trained by"):
            acquire(RunLock(), folder)
        held.append(folder)

    monkeypatch.setattr(RunLock, "acquire", noted)
    assert loop(*small_run(text, tmp_path), "--trainer.max_steps=1") == 0
    assert held == [tmp_path / LOOPS[loop]]
    assert not (held[0] / HOLDER).exists()
    acquire(RunLock(), held[0])


# Where locks are unknown (ENOLCK) or end at one machine, signs of life decide.


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(run_lock, "SILENT_S", 1.5)
    monkeypatch.setattr(run_lock, "SIGN_S", 0.1)


@pytest.fixture
def without_locks(monkeypatch):
    def fails(*arguments, **options):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_lock.FileLock, "acquire", fails)


def holder(folder, pid, host):
    (folder / HOLDER).write_text(json.dumps({"pid": pid, "host": host, "since": "2026-01-01 00:00:00"}))


def dead_pid():
    child = started(int)
    child.join()
    return child.pid


def gives_signs(folder, seconds):
    def give():
        for _ in range(int(seconds / 0.1)):
            time.sleep(0.1)
            os.utime(folder / HOLDER)

    threading.Thread(target=give, daemon=True).start()


@pytest.mark.parametrize("locks", [True, False])
def test_a_holder_on_another_machine_is_dead_once_it_is_silent(locks, quick, tmp_path, request):
    if not locks:
        request.getfixturevalue("without_locks")
    holder(tmp_path, 1, "elsewhere")
    gives_signs(tmp_path, 3)
    with pytest.raises(UserError, match="is being trained by process 1 on elsewhere"):
        RunLock().acquire(tmp_path)
    time.sleep(3)
    began_s = time.monotonic()
    RunLock().acquire(tmp_path)
    assert time.monotonic() - began_s < 10
    assert read_holder(tmp_path).host == platform.node()


def test_a_holder_that_was_silent_for_long_is_not_waited_for(tmp_path):
    holder(tmp_path, 1, "elsewhere")
    os.utime(tmp_path / HOLDER, (1, 1))
    began_s = time.monotonic()
    RunLock().acquire(tmp_path)
    assert time.monotonic() - began_s < 5


def test_without_locks_a_dead_process_is_known_by_its_number_and_a_living_one_by_its_signs(
    quick, without_locks, tmp_path
):
    holder(tmp_path, dead_pid(), platform.node())
    lock = RunLock()
    lock.acquire(tmp_path)  # from here on, signs come
    with pytest.raises(UserError, match=f"is being trained by process {os.getpid()} on "):
        RunLock().acquire(tmp_path)
    lock.release()
    holder(tmp_path, os.getpid(), platform.node())  # the number of a dead one, given to a process of today
    RunLock().acquire(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 90,
        b"[1]",
        b'{"pid": 1}',
        b'{"pid": "1", "host": 5, "since": null}',
        f'{{"pid": 1{"0" * 30}, "host": "{platform.node()}", "since": ""}}'.encode(),
        f'{{"pid": -1, "host": "{platform.node()}", "since": ""}}'.encode(),
        b"[" * 100_000,
    ],
)
def test_a_torn_file_of_a_holder_is_no_obstacle(content, tmp_path):
    (tmp_path / HOLDER).write_bytes(content)
    (tmp_path / LOCK).touch()
    RunLock().acquire(tmp_path)


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="POSIX")
def test_a_process_that_stands_still_keeps_its_run(another, quick, tmp_path):
    os.kill(another().pid, signal.SIGSTOP)  # a laptop that sleeps, a debugger
    time.sleep(2)
    with pytest.raises(UserError, match="is being trained by"):
        RunLock().acquire(tmp_path)
