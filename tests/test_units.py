import os
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from nanogpt_lit.__main__ import main
from nanogpt_lit.supervise.keep_alive import scheduled_task, systemd_unit, systemd_word

TASK_NAMESPACE = "http://schemas.microsoft.com/windows/2004/02/mit/task"

COMMAND = [sys.executable, "-m", "nanogpt_lit", "fit", "--keep-alive", "--config", 'my "50 %" $HOME\\run.yaml']


def complaints(path):
    """What systemd says about a unit, by the key or the file that it names."""
    verify = ["systemd-analyze", "--user", "--man=no", "verify", str(path)]
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(path.parent)}
    said = subprocess.run(verify, capture_output=True, text=True, env=environment).stderr
    assert "Failed to initialize manager" not in said
    return [line for line in said.splitlines() if path.name in line]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_the_unit_is_one_that_systemd_accepts(tmp_path):
    folder = tmp_path / "50 % done"
    folder.mkdir()
    path = tmp_path / "nanogpt_lit.service"
    path.write_text(systemd_unit(COMMAND, folder))
    assert complaints(path) == []
    # The same check sees what is wrong.
    path.write_text(systemd_unit(["/no/such/python"], folder).replace("KillMode=mixed", "KillMode=some"))
    assert [key for key in ("kill mode", "/no/such/python") if not any(key in line for line in complaints(path))] == []


@pytest.mark.parametrize(
    ("word", "written"),
    [("plain", '"plain"'), ("a b", '"a b"'), ("50%", '"50%%"'), ("$HOME", '"$$HOME"'), ('"\\', '"\\"\\\\"')],
)
def test_systemd_reads_a_word_back_as_it_was(word, written):  # by the rules of systemd.service(5)
    assert systemd_word(word) == written


def test_a_folder_that_a_unit_cannot_name_is_refused():
    with pytest.raises(ValueError, match="systemd cannot name"):
        systemd_unit(COMMAND, Path("/a\nExecStart=/bin/false"))


def found(text, path):
    return ElementTree.fromstring(text).find(path.replace("/", "/t:").join(["t:", ""]), {"t": TASK_NAMESPACE}).text


def test_the_task_runs_the_command_for_more_than_three_days_and_on_batteries():
    text = scheduled_task(COMMAND, Path("C:/Müller/runs"))
    assert found(text, "Actions/Exec/Command") == sys.executable
    assert found(text, "Actions/Exec/Arguments").startswith("-m nanogpt_lit fit --keep-alive --config ")
    assert found(text, "Actions/Exec/WorkingDirectory") == str(Path("C:/Müller/runs"))
    assert found(text, "Settings/ExecutionTimeLimit") == "PT0S"
    assert found(text, "Settings/DisallowStartIfOnBatteries") == "false"
    assert found(text, "Triggers/LogonTrigger/UserId") == found(text, "Principals/Principal/UserId")
    assert text.isascii()  # PowerShell saves it as UTF-16, other shells as they like


def test_the_command_prints_the_unit_of_this_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["keep-alive-unit", "--systemd", "--config", "a.yaml", "--data.source=x"]) == 0
    unit = capsys.readouterr().out
    assert f"\nWorkingDirectory={tmp_path}\n" in unit
    python = f'"{sys.executable}" "-m" "nanogpt_lit" "fit" "--keep-alive" "--config" "a.yaml" "--data.source=x"'
    assert f"\nExecStart={python}\n" in unit
    assert main(["keep-alive-unit", "--task-scheduler", "--config", "a.yaml"]) == 0
    assert found(capsys.readouterr().out, "Actions/Exec/Command") == sys.executable


def test_a_unit_with_a_checkpoint_in_it_is_refused(capsys):
    assert main(["keep-alive-unit", "--ckpt_path=a.safetensors"]) == 2
    assert "leave --ckpt_path out" in capsys.readouterr().err
