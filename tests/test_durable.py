import os
import signal
import subprocess
import sys
import time

import pytest

from nanogpt_lit.checkpoint.run_file import load_run
from nanogpt_lit.errors import UserError
from nanogpt_lit.runtime.durable import check_writable, durable_file, durable_folder, sweep, write_durably


def write(path, content, **options):
    with durable_file(path, **options) as file:
        file.write(content)


def test_a_file_appears_whole_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "new" / "x"
    write(path, b"1")
    write(path, b"2")
    assert path.read_bytes() == b"2"
    assert list(path.parent.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "x"
    write(path, b"old")
    with pytest.raises(ZeroDivisionError), durable_file(path) as file:
        file.write(b"half" + bytes(1 // 0))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_file_that_is_replaced_is_kept_under_another_name(tmp_path):
    last, previous = tmp_path / "last", tmp_path / "previous"
    for n in range(3):
        write(last, str(n).encode(), keep_as=previous)
        assert last.read_bytes() == str(n).encode()
        assert not n or previous.read_bytes() == str(n - 1).encode()
    assert {path.name for path in tmp_path.iterdir()} == {"last", "previous"}


def test_the_name_is_never_missing_while_the_next_file_takes_it(tmp_path, monkeypatch):
    last, replace, missing = tmp_path / "last", os.replace, []

    def watched(*paths):
        missing.append(not last.exists())
        replace(*paths)
        missing.append(not last.exists())

    write(last, b"0")
    monkeypatch.setattr(os, "replace", watched)
    monkeypatch.setattr("pathlib.os.replace", watched)
    for n in (1, 2):
        write(last, str(n).encode(), keep_as=tmp_path / "previous")
    assert missing == [False] * 8


def test_a_writer_that_was_killed_between_two_names_is_followed_by_one_that_is_not(tmp_path):
    last, previous = tmp_path / "last", tmp_path / "previous"
    write(last, b"0")
    os.link(last, previous)  # a kill left both names to one file
    os.link(last, tmp_path / "previous.partial")  # or one name more
    write(last, b"1", keep_as=previous)
    assert (last.read_bytes(), previous.read_bytes()) == (b"1", b"0")
    assert {path.name for path in tmp_path.iterdir()} == {"last", "previous"}


def test_without_hard_links_the_file_is_kept_all_the_same(tmp_path, monkeypatch):
    def refused(*paths):
        raise PermissionError(1, "Operation not permitted")  # as exFAT says

    monkeypatch.setattr(os, "link", refused)
    last, previous = tmp_path / "last", tmp_path / "previous"
    for content in (b"0", b"1"):
        write(last, content, keep_as=previous)
    assert (last.read_bytes(), previous.read_bytes()) == (b"1", b"0")
    assert {path.name for path in tmp_path.iterdir()} == {"last", "previous"}


def test_the_bytes_are_on_the_disk_before_the_name_is_theirs(tmp_path, monkeypatch):
    """After a power loss a name without its bytes would be an empty file."""
    done = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: done.append("sync"))
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *paths: done.append("replace") or replace(*paths))
    monkeypatch.setattr("pathlib.os.replace", os.replace)
    write(tmp_path / "x", b"1")
    assert done == ["sync", "replace", *(["sync"] if os.name == "posix" else [])]


def test_a_folder_appears_with_all_its_files_on_the_disk_or_not_at_all(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: done.append("sync"))
    (tmp_path / "run.partial").mkdir()
    (tmp_path / "run.partial" / "of a killed process").write_bytes(b"half")
    with pytest.raises(ZeroDivisionError), durable_folder(tmp_path / "run") as folder:
        (folder / "a").write_bytes(bytes(1 // 0))
    assert list(tmp_path.iterdir()) == []
    with durable_folder(tmp_path / "run") as folder:
        (folder / "a").write_bytes(b"1")
        (folder / "b").write_bytes(b"2")
        assert not (tmp_path / "run").exists()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["a", "b"]
    assert len(done) == (4 if os.name == "posix" else 2)


def test_text_is_written_as_it_is_in_place_of_what_was_there(tmp_path):
    for text in ("1\n", "\u0259\r\n"):
        write_durably(tmp_path / "x", text)
        assert (tmp_path / "x").read_bytes() == text.encode()
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_leftovers_are_swept_and_nothing_else(tmp_path):
    (tmp_path / "last.safetensors.partial").write_bytes(b"half")
    (tmp_path / "last.safetensors").write_bytes(b"whole")
    assert [path.name for path in sweep(tmp_path)] == ["last.safetensors.partial"]
    assert [path.name for path in tmp_path.iterdir()] == ["last.safetensors"]
    assert sweep(tmp_path / "nowhere") == []


WRITER = """
import sys
import torch
from pathlib import Path
from nanogpt_lit.checkpoint.run_file import save_run
from nanogpt_lit.checkpoint.state import RunState
for step in range(1, 10_000):
    weights = {"w": torch.full((2_000_000,), float(step)), "v": torch.full((500_000,), float(step))}
    save_run(Path(sys.argv[1]), RunState(weights, {}, {}, {}, {}, None, [], step, step, 1, 1))
    print(step, flush=True)
"""


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL is POSIX's")
@pytest.mark.parametrize("times", [2, pytest.param(12, marks=pytest.mark.long)])
def test_a_process_killed_at_any_moment_of_a_write_leaves_a_checkpoint_that_loads(tmp_path, times):
    last = tmp_path / "last.safetensors"
    for n in range(times):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(last)], stdout=subprocess.PIPE, text=True)
        try:
            saved = [int(writer.stdout.readline()) for _ in range(2)][-1]  # from here on, it is writing all the time
            time.sleep(0.003 * n)
        finally:
            writer.send_signal(signal.SIGKILL)
        saved = max([saved, *(int(line) for line in writer.stdout)])
        writer.wait()
        found = [path for path in (last, tmp_path / "previous.safetensors") if path.exists()]
        states = [load_run(path) for path in found]  # every one that has its name is whole
        assert states[0].step >= saved
        assert all(bool((state.weights["w"] == state.step).all()) for state in states)
        sweep(tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="links")
def test_a_folder_that_cannot_be_made_is_refused_by_its_key_and_none_is_made(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "link").symlink_to(tmp_path)
    for name, said in (
        ("file", "file is no folder"),
        ("file/below", "file/below: Not a directory"),
        ("loop", "loop: Too many levels of symbolic links"),
        ("loop/below", "loop/below: Too many levels of symbolic links"),
        ("dangling/below", "dangling is a link to .*nowhere, which is not there"),
        ("a" * 300, "a: File name too long"),
    ):
        with pytest.raises(UserError, match=f"a.key=.*{said}; name another folder"):
            check_writable("a.key", tmp_path / name)
    for fine in ("", "link", "link/new", "new/and/below"):
        check_writable("a.key", tmp_path / fine)
    assert not (tmp_path / "new").exists()
