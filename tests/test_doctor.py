"""What is wrong is found and named, and what is sound is not complained about."""

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from nanogpt_lit.__main__ import main
from nanogpt_lit.checkpoint import run_file
from nanogpt_lit.checkpoint.run_file import save_run
from nanogpt_lit.checkpoint.run_lock import HOLDER
from nanogpt_lit.checkpoint.state import RunState
from nanogpt_lit.data.prepare import PrepareConfig, prepare
from nanogpt_lit.doctor import machine
from nanogpt_lit.doctor import run as of_run
from nanogpt_lit.doctor.finding import Finding
from nanogpt_lit.doctor.machine import advice, check_cpu, check_gpu, check_packages, check_page_locks, check_sleep
from nanogpt_lit.doctor.run import check_checkpoints, check_disk, check_shards

posix = pytest.mark.skipif(os.name != "posix", reason="its programs are shell scripts")


def state(step=3, weight=1.0):
    return RunState(
        weights={"gpt.wte": torch.full((4, 8), weight)}, hyper_parameters={}, data={}, optimizer={"state": {}},
        schedule={}, scaler=None, random=[], step=step, batches=step, processes=1, accumulate_grad_batches=1,
    )  # fmt: skip


@pytest.fixture(scope="module")
def sound_run(tmp_path_factory):
    """A folder of runs, as fit leaves it."""
    root = tmp_path_factory.mktemp("runs")
    (root / "text.txt").write_text("".join(f"{n} bottles of beer on the wall.\n" for n in range(200)))
    prepare(PrepareConfig(str(root / "text.txt"), "byte", val_fraction=0.1), root / "shards", show_progress=False)
    save_run(root / "version_0/checkpoints/last.safetensors", state())
    save_run(root / "version_0/checkpoints/last.safetensors", state(step=6))
    return root


@pytest.fixture
def a_run(sound_run, tmp_path):
    root = tmp_path / "runs"
    shutil.copytree(sound_run, root)
    (root / "version_0/config.yaml").write_text(f"data: {{shards_dir: '{root.as_posix()}/shards'}}\n")
    return root


def levels(findings):
    return [finding.level for finding in findings]


def only(findings):
    (finding,) = findings
    return finding


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


# The command.


@pytest.fixture
def sound_machine(monkeypatch):
    """So that what this machine lacks is not what a test sees."""
    monkeypatch.setattr(machine, "check_gpu", lambda: iter(()))
    monkeypatch.setattr(machine, "check_sleep", lambda: iter(()))
    monkeypatch.setattr(of_run, "TRIED_BYTES", 2**20)


def test_a_sound_run_passes(sound_machine, a_run, capsys):
    assert main(["doctor", "--run", str(a_run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert not [line for line in lines if line.startswith("wrong")]
    checked = [line for line in lines if "every byte as it was written" in line]
    for part in ("5,8", "last.safetensors: step 6", "previous.safetensors: step 3"):
        assert any(part in line for line in checked), part


def test_a_yaml_names_its_run(sound_machine, a_run, capsys):
    path = a_run / "run.yaml"
    path.write_text(f"trainer: {{default_root_dir: '{a_run.as_posix()}', max_steps: 3}}\n")
    assert main(["doctor", "--config", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [f["level"] for f in found if f["check"] in ("shards", "checkpoint")] == ["ok"] * 3
    (a_run / "shards/train_000000.bin").unlink()
    assert main(["doctor", "--config", str(path), "--json"]) == 1
    wrong = [f for f in json.loads(capsys.readouterr().out) if f["level"] == "wrong"]
    assert only(wrong)["text"].startswith(str(a_run / "shards/train_000000.bin"))


def test_what_is_wrong_is_named_and_exits_with_1(sound_machine, a_run, capsys):
    flip(a_run / "version_0/checkpoints/last.safetensors", -1)
    flip(a_run / "shards/val_000000.bin", -1)
    assert main(["doctor", "--run", str(a_run)]) == 1
    wrong = [line for line in capsys.readouterr().out.splitlines() if line.startswith("wrong")]
    assert [path for path in ("val_000000.bin", "last.safetensors") if path not in "".join(wrong)] == []
    assert len(wrong) == 2


@pytest.mark.parametrize("options", [["--run", "nowhere"], ["--config", "nowhere.yaml"]])
def test_a_run_that_is_not_there_is_a_mistake(capsys, options):
    assert main(["doctor", *options]) == 2
    assert f"error: {'--run=nowhere' if '--run' in options else 'nowhere.yaml'}" in capsys.readouterr().err


def test_a_line_holds_no_sign_that_a_terminal_obeys():
    assert "\x1b" not in str(Finding("ok", "shards", "a\x1b]0;b"))


def test_a_machine_without_a_card_is_examined_without_torch(tmp_path):
    code = (
        "import sys; from nanogpt_lit.__main__ import main; main(['doctor']);"
        "sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'lightning')))"
    )
    without_programs = {**os.environ, "PATH": str(tmp_path)}
    examined = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=without_programs, capture_output=True)
    assert examined.returncode == 0, examined.stderr


# Broken machines: each is told in a sentence, and everything else is still looked at.


def variable(name, value):
    return lambda a_run, monkeypatch: monkeypatch.setenv(name, value)


def yaml_of(content):
    return lambda a_run, monkeypatch: (a_run / "run.yaml").write_bytes(content)


def disk_of_no_bytes(a_run, monkeypatch):
    monkeypatch.setattr(of_run.shutil, "disk_usage", lambda folder: SimpleNamespace(free=0))


def a_clock_set_back(a_run, monkeypatch):
    os.utime(a_run / "version_0/checkpoints/last.safetensors", (time.time() + 7200,) * 2)


def a_killed_holder(a_run, monkeypatch):
    (a_run / "version_0" / HOLDER).write_text(json.dumps({"pid": 2**22 + 1, "host": platform.node(), "since": "noon"}))


def a_torn_holder(a_run, monkeypatch):
    (a_run / "version_0" / HOLDER).write_bytes(bytes(90))


def metadata_without_a_version(a_run, monkeypatch):
    monkeypatch.setattr(machine, "version", lambda asked: None if asked == "numpy" else version(asked))


def a_checkpoint_that_breaks_its_reader(a_run, monkeypatch):
    monkeypatch.setattr(of_run, "check_checkpoint", lambda path: 1 // 0)


def numbers_of_proc_that_are_none(a_run, monkeypatch):
    monkeypatch.setattr(machine, "content", lambda path: "0::/" if path.name == "cgroup" else "\N{SUPERSCRIPT TWO} x")


def a_root_below_a_file(a_run, monkeypatch):
    (a_run / "run.yaml").write_text(f"trainer: {{default_root_dir: '{(a_run / 'text.txt').as_posix()}/x'}}\n")


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (disk_of_no_bytes, "wrong  space       0.0 GB free"),
        (a_checkpoint_that_breaks_its_reader, "wrong  checkpoint  could not be looked at (ZeroDivisionError"),
        (metadata_without_a_version, "wrong  numpy "),
        (a_clock_set_back, "last.safetensors was saved 2.0 hours from now: a clock was set back"),
        (a_killed_holder, "noon, which was killed: fit --resume auto goes on with it"),
        (a_torn_holder, "training.json does not say who trains that run"),
        (numbers_of_proc_that_are_none, "ok     cpu"),
        (variable("OMP_NUM_THREADS", "\N{SUPERSCRIPT TWO}"), "is not a number of threads"),
        (yaml_of("trainer: {}".encode("utf-16")), "wrong  settings    "),
        (yaml_of(b"trainer: {accelerator: gpu, max_steps: 3}"), "trainer.accelerator=gpu is not here"),
        (yaml_of(b"trainer: {logger: WandbLogger, max_steps: 3}"), "needs the package wandb"),
        (yaml_of(b"data: 3\ntrainer: [1]"), "wrong  settings    "),
        (yaml_of(b"trainer: {max_stepz: 3}"), "did you mean trainer.max_steps"),
        (yaml_of(b"data: {source: nowhere.txt}"), "wrong  source      data.source=nowhere.txt does not exist"),
        (a_root_below_a_file, "Not a directory; name another folder"),
    ],
)
def test_a_broken_machine_is_told_in_a_sentence_and_all_else_is_still_looked_at(
    broken, said, sound_machine, a_run, monkeypatch, capsys
):
    monkeypatch.chdir(a_run)
    (a_run / "run.yaml").write_text(f"trainer: {{default_root_dir: '{a_run.as_posix()}', max_steps: 3}}\n")
    broken(a_run, monkeypatch)
    main(["doctor", "--config", "run.yaml"])
    lines = capsys.readouterr().out.splitlines()
    assert any(said in line for line in lines), lines
    checks = {line.split()[1] for line in lines}
    assert checks >= {"cpu", "checkpoint", "shards"}, lines


@pytest.mark.parametrize("name", ["yaml", "packaging"])
def test_without_a_package_that_it_needs_itself_the_doctor_looks_at_the_rest(name, tmp_path):
    (tmp_path / "run.yaml").write_text("trainer: {max_steps: 3}")
    code = (
        f"import sys; sys.modules['{name}'] = None; from nanogpt_lit.__main__ import main;"
        "sys.exit(main(['doctor', '--config', 'run.yaml']))"
    )
    examined = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (examined.returncode, examined.stderr) == (1, "")
    assert f"pip install --force-reinstall {name}" in examined.stdout
    assert {"cpu", "gpu", "disk", "shards"} <= {line.split()[1] for line in examined.stdout.splitlines()}


# Packages.


@pytest.mark.parametrize(
    ("name", "found", "said"),
    [
        ("lightning", "2.6.3", "malware"),
        ("lightning", "2.6.5", "CVE-2026-58659"),
        ("torch", "2.9.1+cu128", "CVE-2026-24747"),
        ("filelock", "3.0", "3.0 is not >=3.12"),
        ("tiktoken", None, 'is not installed: pip install "tiktoken'),
    ],
)
def test_a_package_that_is_missing_or_of_a_bad_version_is_named_with_the_reason(monkeypatch, name, found, said):
    def version_of(asked):
        if asked == name and found is None:
            raise PackageNotFoundError
        return found if asked == name else version(asked)

    monkeypatch.setattr(machine, "version", version_of)
    wrong = only(finding for finding in check_packages() if finding.level == "wrong")
    assert wrong.check == name
    assert said in wrong.text


def test_another_python_is_named(monkeypatch):
    monkeypatch.setattr(machine.python_platform, "python_version", lambda: "3.10.4")
    assert next(check_packages()).text.startswith("3.10.4 is not >=3.11")


def test_what_is_installed_here_passes():
    assert set(levels(check_packages())) == {"ok"}


# Shards and checkpoints.


def test_every_flipped_bit_of_a_shard_is_found(a_run):
    shard = a_run / "shards/train_000000.bin"
    for position in (0, 25, 1024, -1):
        flip(shard, position)
        wrong = only(check_shards(a_run / "shards"))
        assert (wrong.level, str(shard) in wrong.text) == ("wrong", True), position
        flip(shard, position)
    assert levels(check_shards(a_run / "shards")) == ["ok"]


def test_a_shard_cut_short_and_a_changed_tokenizer_are_found(a_run):
    folder = a_run / "shards"
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text() + " ")
    assert "tokenizer" in only(check_shards(folder)).text
    shard = folder / "val_000000.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    assert str(shard) in only(check_shards(folder)).text


@pytest.mark.parametrize("change", [{"splits": {"train": 3}}, {"tokenizer": {}}])
def test_a_manifest_of_something_else_is_wrong_and_no_traceback(a_run, change):
    path = a_run / "shards/manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert levels(check_shards(a_run / "shards")) == ["wrong"]


def test_shards_without_checksums_and_no_shards_are_told_apart(tmp_path):
    assert levels(check_shards(tmp_path)) == ["look"]
    for name in ("train", "val"):
        (tmp_path / f"{name}.bin").write_bytes(bytes(range(64)))
    found = only(check_shards(tmp_path))
    assert (found.level, "keeps no checksums" in found.text) == ("ok", True)


def test_every_flipped_bit_of_a_checkpoint_is_found(a_run):
    folder = a_run / "version_0/checkpoints"
    last = folder / "last.safetensors"
    for position in (0, 200, -1):
        flip(last, position)
        found = list(check_checkpoints(a_run))
        assert levels(found) == ["wrong", "ok"], position
        assert str(last) in found[0].text
        flip(last, position)
    assert levels(check_checkpoints(a_run)) == ["ok", "ok"]


def test_weights_that_are_not_numbers_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(run_file, "check_finite", lambda path, weights: None)  # as another program may write it
    save_run(tmp_path / "best.safetensors", state(weight=float("nan")))
    found = only(check_checkpoints(tmp_path))
    assert (found.level, "gpt.wte" in found.text) == ("wrong", True)


def test_a_write_that_was_cut_short_is_told_and_no_checkpoint_is_no_error(tmp_path):
    (tmp_path / "last.safetensors.partial").write_bytes(b"cut")
    assert levels(check_checkpoints(tmp_path)) == ["look", "look"]


# The machine.


def test_a_disk_too_small_for_the_next_checkpoint_is_wrong(monkeypatch, tmp_path):
    monkeypatch.setattr(of_run, "TRIED_BYTES", 2**20)
    monkeypatch.setattr(of_run.shutil, "disk_usage", lambda folder: SimpleNamespace(free=10**9))
    assert levels(check_disk(tmp_path / "not" / "yet", 10**8)) == ["ok", "ok"]
    assert levels(check_disk(tmp_path, 4 * 10**8)) == ["look", "ok"]
    assert levels(check_disk(tmp_path, None)) == ["look", "ok"]  # the size is a guess
    assert levels(check_disk(tmp_path, 95 * 10**7)) == ["wrong", "ok"]


def test_a_disk_that_cannot_be_written_or_is_slow_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(of_run, "bytes_per_s", lambda folder: 5e6)
    assert [f.level for f in check_disk(tmp_path, 10**6) if f.check == "disk"] == ["look"]

    def refused(folder):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(of_run, "bytes_per_s", refused)
    assert "Read-only file system" in only(f for f in check_disk(tmp_path, 10**6) if f.level == "wrong").text


def files(root, contents):
    for name, text in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")


def test_fewer_cpus_than_torch_counts_are_told(monkeypatch, tmp_path):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    group = "sys/fs/cgroup/a"
    limits = {f"{group}/cpu.max": "150000 100000", f"{group}/b/cpu.max": "max 100000"}
    files(tmp_path, {"proc/self/cgroup": "0::/a/b", **limits})
    found = only(check_cpu(tmp_path))
    assert found.level == "look"
    assert "may use 1.5" in found.text
    assert found.text.endswith("OMP_NUM_THREADS=2")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert levels(check_cpu(tmp_path)) == ["ok"]


def test_a_limit_of_memory_is_told_and_no_limit_is_not(tmp_path):
    group = "sys/fs/cgroup"
    limits = {f"{group}/memory.max": str(3 * 2**30), f"{group}/cpu.max": "max 1"}
    files(tmp_path, {"proc/self/cgroup": "0::/", **limits})
    assert "at most 3.0 GiB" in only(check_cpu(tmp_path)).text
    assert "GiB" not in only(check_cpu(tmp_path / "nowhere")).text


def program(folder, name, script):
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Programs of the system are those of this folder."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


@posix
@pytest.mark.skipif(torch.version.cuda is not None or torch.version.hip is not None, reason="torch can use a GPU here")
def test_a_card_that_this_torch_cannot_use_is_wrong(programs):
    program(programs, "nvidia-smi", "echo 'NVIDIA GeForce RTX 2050, 570.1, 4096, 1500'")
    card, cuda, *rest = check_gpu(platform="win32")
    assert card.level == "look"  # more than a quarter is in use
    assert "2,596 of 4,096 MiB free" in card.text
    assert (cuda.level, "was built without CUDA" in cuda.text) == ("wrong", True)
    assert "Sysmem Fallback" in only(rest).text
    program(programs, "nvidia-smi", "echo 'NVIDIA GeForce RTX 2050, 570.1, 4096, [N/A]'")
    assert levels(check_gpu(platform="linux")) == ["ok", "wrong"]


@posix
def test_a_driver_that_does_not_answer_is_wrong(programs):
    program(programs, "nvidia-smi", "echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18")
    found = only(check_gpu())
    assert (found.level, "mismatch" in found.text, "reboot" in found.text) == ("wrong", True, True)


def test_a_card_without_a_driver_is_wrong_and_no_card_is_not(programs, tmp_path):
    sound = {"sys/bus/pci/devices/0/vendor": "0x10de", "sys/bus/pci/devices/0/class": "0x040300"}  # its loudspeaker
    files(tmp_path, sound)
    assert levels(check_gpu(tmp_path)) == ["ok"]
    files(tmp_path, {"sys/bus/pci/devices/1/vendor": "0x10de", "sys/bus/pci/devices/1/class": "0x030000"})
    assert levels(check_gpu(tmp_path)) == ["wrong"]


def test_an_error_of_cuda_comes_with_what_mends_it():
    assert "too new or too old" in advice("CUDA error: no kernel image is available for execution on the device\nMore")
    assert "nvidia_uvm" in advice("CUDA unknown error - this may be due to")
    assert "update the driver" in advice("The NVIDIA driver on your system is too old (found version 11040).")


@pytest.mark.parametrize(
    ("platform", "advice"), [("linux", "systemd-inhibit"), ("win32", "powercfg"), ("darwin", "caffeinate")]
)
def test_a_laptop_is_told_how_to_stay_awake_and_a_machine_without_a_battery_is_not(platform, advice, monkeypatch):
    for plugged, checks in ((True, ["sleep"]), (None, ["sleep"]), (False, ["power", "sleep"])):
        battery = SimpleNamespace(power_plugged=plugged)
        monkeypatch.setattr(psutil, "sensors_battery", lambda battery=battery: battery, raising=False)
        found = list(check_sleep(platform))
        assert [(finding.level, finding.check) for finding in found] == [("look", check) for check in checks]
        assert advice in found[-1].text
    monkeypatch.setattr(psutil, "sensors_battery", lambda: None, raising=False)
    assert levels(check_sleep(platform)) == ["ok"]


@posix
@pytest.mark.parametrize(
    ("platform", "release", "found"),
    [
        ("win32", "10", [("look", "Windows")]),
        ("linux", "5.15.153.1-microsoft-standard-WSL2", [("look", "WSL2")]),
        ("linux", "6.8.0-45-generic", []),
    ],
)
def test_a_run_that_page_locks_more_than_windows_allows_is_told(platform, release, found, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=8 * 2**30))
    findings = list(check_page_locks(lambda: 4_800.0, platform, release))
    assert [(f.level, f.text.split("of which ")[1].split()[0]) for f in findings] == found
    assert all("the run page-locks 4,800 MiB of 8,192, of which" in f.text for f in findings)
    assert levels(check_page_locks(lambda: 4_000.0, platform, release)) == ["ok"] * len(found)


def test_the_doctor_plans_what_the_run_of_a_yaml_page_locks(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(machine, "check_page_locks", lambda needed_mib: asked.append(needed_mib()) or [])
    main(["doctor", "--config", str(Path(__file__).parents[1] / "configs" / "rtx2050.yaml")])
    assert asked == [pytest.approx(8 * 124.5e6 / 2**20, rel=0.01)]  # AdamW's moments


@pytest.mark.skipif(os.name == "nt", reason="links take a privilege there")
def test_a_broken_file_of_a_run_is_told_and_everything_else_is_still_looked_at(
    sound_machine, a_run, monkeypatch, capsys
):
    run = a_run / "version_0"
    (run / "config_2.yaml").write_bytes(bytes(300))
    (run / "checkpoints/a.safetensors").symlink_to(a_run / "away")
    monkeypatch.setattr("nanogpt_lit.doctor.machine.check_cpu", lambda: 1 // 0)
    assert main(["doctor", "--run", str(a_run)]) == 1
    lines = capsys.readouterr().out.splitlines()
    for said in ("config_2.yaml cannot be read", "a.safetensors is a link to", "ZeroDivisionError", "step 6", "5,8"):
        assert any(said in line for line in lines), said
    broken = a_run / "broken.yaml"
    broken.write_bytes("trainer: {}  # à".encode("latin-1"))
    monkeypatch.chdir(a_run)
    assert main(["doctor", "--config", str(broken)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "broken.yaml" in lines[0]
    assert len(lines) > 4
