"""Runs the CUDA paths of the project on a fake CUDA device, and writes docs/fake_gpu.json. Needs no GPU.

    python tests/fake_gpu/run.py
    python tests/fake_gpu/run.py --parts fit --only rtx2050.yaml
    python tests/fake_gpu/run.py --python /path/to/venv/bin/python

PyTorch's own CUDA build runs over a libcuda.so.1 that is preloaded (build.py): Python, autograd's device thread, ATen's
host code, the caching allocator and the page-locked one, streams and events are PyTorch's; kernels are launched and
compute nothing, or, in the tests, are computed on the CPU (arithmetic.py). NEEDS_A_GPU is what it cannot show.

Needs Linux, g++, CUDA's headers, about 10 GiB of memory, and a virtual environment with PyTorch's CUDA build (3 GB). It
makes that one in build/fake_gpu/, unless --python or FAKE_CUDA_PYTHON names the Python of another. The exit code is 0
when all that was asked for passed, 1 when not, 2 when it cannot run.
"""

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from build import CannotBuildError, build

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
WORK = ROOT / "build" / "fake_gpu"
TORCH = "torch===2.13.0"
"""Three equal signs: a build for CPUs, 2.13.0+cpu, would do for two."""
TOLERANCE_PERCENT, PAGE_MIB = 1, 2
"""Of what PyTorch reserves, at every lag; or one page, of which it takes no less."""
OF_SEVERAL_PERCENT = 2
"""The same, of each of several devices."""
NEEDS_A_GPU = (
    "tokens per second", "the CUDA context and its loaded kernels", "what kernels round, and whether they are right",
    "cuDNN's attention, which compute capabilities 9.0 and 10.0 take: it is switched off here",
    "torch.compile, whose kernels Triton loads", "8-bit optimizer states, which bitsandbytes computes",
)  # fmt: skip
ASK_A_GPU = {
    "test_gpu_health::test_a_real_card_has_a_temperature": "what NVML measures",
    "test_matmul::test_with_tf32_a_gpu_multiplies_numbers_of_10_bits": "what its kernels round",
}
"""Tests marked gpu that emulation cannot carry, and why."""
ROOM = {"FAKE_CUDA_TOTAL_MIB": "24576"}
"""A device on which every configuration runs: what it needs is measured, not whether it fits 4 GB."""


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=os.environ.get("FAKE_CUDA_PYTHON"), help="of PyTorch's CUDA build")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="only these; others keep theirs")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="of the fits, these")
    parser.add_argument("--lags", nargs="+", metavar="LAUNCHES", default=[], help="of the fits")
    parser.add_argument("--work", type=Path, default=WORK, help="a folder for what is built and written on the way")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "fake_gpu.json", help="the record")
    options = parser.parse_args(arguments)
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    try:
        build(work / "lib")  # before 3 GB are installed for nothing
        python = Path(options.python) if options.python else environment(work / "venv")
        torch = find_torch(python)
        build(work / "lib", torch)
    except CannotBuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    record = json.loads(options.out.read_text(encoding="utf-8")) if options.out.is_file() else {}
    record |= {"command": "python tests/fake_gpu/run.py", "torch": version(python), "needs_a_gpu": NEEDS_A_GPU}
    device = Device(python, work)
    passed = True
    for part in options.parts:
        print(f"== {part}", flush=True)
        answer = PARTS[part](device, options)
        passed = passed and answer["passed"]
        record[part] = {"state": state(), "date": date.today().isoformat(), **answer}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(f"{part}: {'passed' if answer['passed'] else 'failed'}", flush=True)
    print(options.out)
    return 0 if passed else 1


class Device:
    """Commands of the CUDA build's Python, with the fake device preloaded."""

    def __init__(self, python: Path, work: Path) -> None:
        self.python, self.work = python, work

    def run(self, *command: str, **settings: str) -> int:
        """settings: the environment of the device, FAKE_CUDA_...   What it prints goes to the terminal."""
        lib = self.work / "lib"
        environment = {name: value for name, value in os.environ.items() if not name.startswith("FAKE_CUDA_")}
        environment |= {
            "LD_PRELOAD": str(lib / "libcuda.so.1"), "LD_LIBRARY_PATH": str(lib), "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE)]), "PYTHON": str(self.python), **settings,
        }  # fmt: skip
        return subprocess.run([str(self.python), *command], cwd=ROOT, env=environment).returncode


def fits(device: Device, options: argparse.Namespace) -> dict[str, Any]:
    return fits_at_lags(device, options, "native")


def expandable(device: Device, options: argparse.Namespace) -> dict[str, Any]:
    """The same runs with PYTORCH_ALLOC_CONF=expandable_segments:True."""
    return fits_at_lags(device, options, "expandable")


def fits_at_lags(device: Device, options: argparse.Namespace, allocator: str) -> dict[str, Any]:
    return fits_of(device, options, "--allocators", allocator, *(["--lags", *options.lags] if options.lags else []))


def elsewhere(device: Device, options: argparse.Namespace) -> dict[str, Any]:
    """On GPUs of other compute capabilities, with other workspaces, and in a fixed order."""
    return fits_of(device, options, "--elsewhere", "--lags", "0", "--allocators", "native")


def many(device: Device, options: argparse.Namespace) -> dict[str, Any]:
    """DDP and FSDP2 on two and four devices."""
    answer = fits_of(device, options, script="many_against_plan.py")
    errors = [abs(fit.get("reserved_error_percent", 100)) for row in answer["rows"] for fit in row["fits"]]
    return answer | {"passed": bool(errors) and max(errors) <= OF_SEVERAL_PERCENT}


def fits_of(
    device: Device, options: argparse.Namespace, *more: str, script: str = "fit_against_plan.py"
) -> dict[str, Any]:
    out = device.work / "fits.json"
    out.unlink(missing_ok=True)
    more += ("--only", *options.only) if options.only else ()
    code = device.run(str(HERE / script), f"--work={device.work}", f"--out={out}", *more, **ROOM)
    rows = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else []
    worst = max((fit["reserved_error_percent"] for fit in fits_in(rows)), key=abs, default=None)
    passed = code == 0 and bool(rows) and all(as_planned(row) for row in rows)
    return {"passed": passed, "largest_reserved_error_percent": worst, "rows": rows}


def fits_in(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that ran, beside a plan."""
    return [fit for row in rows for fit in row["fits"] if "reserved_error_percent" in fit]


def as_planned(row: dict[str, Any]) -> bool:
    if "failed" in row["plan"] or not row["fits"] or any("failed" in fit for fit in row["fits"]):
        return False
    differences = [abs(fit["reserved_mib"] - row["plan"][f"{fit['allocator']}_reserved_mib"]) for fit in row["fits"]]
    errors = [abs(fit["reserved_error_percent"]) for fit in row["fits"]]
    return all(e <= TOLERANCE_PERCENT or d <= PAGE_MIB for e, d in zip(errors, differences, strict=True))


def proof(device: Device, options: argparse.Namespace) -> dict[str, Any]:
    """scripts/gpu_proof.py from end to end on 4 GiB, for the first of its configurations: the others' host memory is
    more than many machines have. Kernels compute nothing in it, so its times are left out, and what its parity finds in
    memory that nothing has written: part "tests" compares the loops where they are computed."""
    out = device.work / "gpu_proof.json"
    out.unlink(missing_ok=True)
    device.run("scripts/gpu_proof.py", "--configs", "rtx2050.yaml", "--skip", "tests", f"--out={out}")
    return proven(json.loads(out.read_text(encoding="utf-8"))) if out.is_file() else {"passed": False}


def proven(found: dict[str, Any]) -> dict[str, Any]:
    kept = ("config", "rung", "planned_reserved_mib", "measured_reserved_mib", "failed")
    rungs = [{key: row[key] for key in kept if key in row} for row in [*found["configs"], *found["ladder"]]]
    fitting = [row for row in rungs if row["planned_reserved_mib"] <= found["card_mib"]]
    passed = bool(fitting) and all(
        abs(row.get("measured_reserved_mib", 0) - row["planned_reserved_mib"])
        <= max(PAGE_MIB, TOLERANCE_PERCENT / 100 * row["planned_reserved_mib"])
        for row in fitting
    )
    cases = len(found["parity"]["cases"])
    return {"passed": passed and cases > 0, "card_mib": found["card_mib"], "rungs": rungs, "parity_cases_run": cases}


def tests(device: Device, options: argparse.Namespace) -> dict[str, Any]:
    """What runs on the device only: tests/fake_gpu/test_*.py."""
    return pytest(device, "tests/fake_gpu")


def gpu(device: Device, options: argparse.Namespace) -> dict[str, Any]:
    """The tests marked gpu; those that ask for more than emulation has may fail, and are named."""
    files = [path for path in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in path.read_text("utf-8")]
    found = pytest(device, "-p", "arithmetic_plugin", "-m", "gpu", *map(str, files))
    failed = {name for name, outcome in found["tests"].items() if outcome.startswith("failed")}
    passed = bool(found["tests"]) and failed <= ASK_A_GPU.keys()
    return found | {"passed": passed, "need_a_gpu": ASK_A_GPU}


def pytest(device: Device, *arguments: str) -> dict[str, Any]:
    report = device.work / "tests.xml"
    report.unlink(missing_ok=True)
    plain = ["-o", "addopts=", "-o", "junit_family=xunit1", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
    code = device.run("-m", "pytest", *plain, *arguments, FAKE_CUDA_ARITHMETIC="1")
    outcomes = outcomes_of(report) if report.is_file() else {}
    return {"passed": code == 0, "exit_code": code, "tests": outcomes}


def outcomes_of(report: Path) -> dict[str, str]:
    """Of each test: passed, skipped or failed, with what it noted or the reason."""
    outcomes = {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
        bad = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        verdict = "passed" if bad is None else "skipped" if bad.tag == "skipped" else "failed"
        noted = case.find("properties/property[@name='outcome']")
        said = (noted.get("value") if noted is not None else None) or ("" if bad is None else bad.get("message") or "")
        outcomes[name] = f"{verdict}: {' '.join(said.split())[:200]}" if said else verdict
    return outcomes


PARTS: dict[str, Callable[[Device, argparse.Namespace], dict[str, Any]]] = {
    "fit": fits, "expandable": expandable, "elsewhere": elsewhere, "many": many, "proof": proof, "tests": tests,
    "gpu": gpu,
}  # fmt: skip


def environment(folder: Path) -> Path:
    """The Python of a virtual environment with PyTorch's CUDA build and what the project needs, made where it is not.

    Raises CannotBuildError when a package cannot be had.
    """
    python = folder / "bin" / "python"
    done = folder / "installed"
    if done.is_file():
        return python
    print(f"making {folder}: about 3 GB are downloaded", flush=True)
    pip = [str(python), "-m", "pip", "install"]
    commands = [
        [sys.executable, "-m", "venv", str(folder)],
        [*pip, TORCH],
        [*pip, "-c", str(ROOT / "constraints.txt"), "-e", f"{ROOT}[dev]"],
    ]
    for command in commands:
        # Folders of wheels that a machine is set up with may hold builds for CPUs, which pip would take first.
        if subprocess.run(command, env=os.environ | {"PIP_FIND_LINKS": ""}).returncode:
            raise CannotBuildError(
                f"{' '.join(command)} failed; a virtual environment of your own with {TORCH} from PyPI will do: "
                "--python PATH."
            )
    done.touch()
    return python


def find_torch(python: Path) -> Path:
    """The folder of PyTorch in that environment. Raises CannotBuildError without a CUDA build."""
    code = "import importlib.util as u; print(*(u.find_spec('torch') or u.find_spec('os')).submodule_search_locations)"
    try:
        answer = subprocess.run([str(python), "-c", code], capture_output=True, text=True)
    except OSError as error:
        raise CannotBuildError(
            f"--python {python} cannot be started: {error.strerror}; give the path of a Python."
        ) from None
    torch = Path(answer.stdout.strip()) if answer.returncode == 0 else None
    if torch is None or not (torch / "lib" / "libtorch_cuda.so").is_file():
        raise CannotBuildError(
            f"{python} has no CUDA build of PyTorch; pip install {TORCH!r} from PyPI has one, and without --python "
            "this command makes such an environment."
        )
    known = "import importlib.metadata as m; m.version('nanogpt_lit')"
    if subprocess.run([str(python), "-c", known], cwd=ROOT, capture_output=True).returncode:
        raise CannotBuildError(
            f"{python} does not know this project; {python} -m pip install --no-deps -e {ROOT} helps."
        )
    return torch


def version(python: Path) -> str:
    answer = subprocess.run(
        [str(python), "-c", "import torch; print(torch.__version__)"], capture_output=True, text=True
    )
    return answer.stdout.strip()


def state() -> str:
    """The commit, and whether files differ from it."""
    answer = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return answer.stdout.strip() or importlib.metadata.version("nanogpt_lit")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
