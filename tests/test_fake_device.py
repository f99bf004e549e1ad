"""The fake CUDA device of tests/fake_gpu: what it is built with, what it says, and its account of memory and time."""

import importlib.util
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent / "fake_gpu"


def load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


build = load("build")
run = load("run")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    try:
        build.find_compiler(), build.find_headers()
    except build.CannotBuildError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("fake_device")
    build.build(folder)
    return folder / "libcuda.so.1"


CALLS = """
import ctypes, json, os, sys
cuda = ctypes.CDLL(sys.argv[1])
MIB, said = 2**20, {}
a, b = ctypes.c_void_p(), ctypes.c_void_p()
said["fits"] = cuda.cudaMalloc(ctypes.byref(a), ctypes.c_size_t(40 * MIB))
said["does not fit"] = cuda.cudaMalloc(ctypes.byref(b), ctypes.c_size_t(40 * MIB))
said["stays until asked"] = [cuda.cudaGetLastError(), cuda.cudaGetLastError()]
said["freed"] = [cuda.cudaFree(a), cuda.cudaFree(a)]
said["fits again"] = cuda.cudaMalloc(ctypes.byref(b), ctypes.c_size_t(40 * MIB))
event = ctypes.c_void_p()
cuda.cudaEventCreate(ctypes.byref(event))
copy = lambda: cuda.cudaMemsetAsync(b, 0, ctypes.c_size_t(1), None)
copy()  # there has to be something to wait for
cuda.cudaEventRecord(event, None)
reached = [cuda.cudaEventQuery(event)]
for _ in range(3):
    copy()
    reached.append(cuda.cudaEventQuery(event))
said["reached"] = reached
cuda.cudaEventRecord(event, None)
said["waited for"] = [cuda.cudaEventQuery(event), cuda.cudaEventSynchronize(event), cuda.cudaEventQuery(event)]
room = ctypes.create_string_buffer(4 * MIB)
def lock(start, size):
    return cuda.cudaHostRegister(ctypes.c_void_p(ctypes.addressof(room) + start), ctypes.c_size_t(size), 0)
said["page-locked"] = [lock(0, MIB), lock(MIB // 2, MIB), lock(MIB, 2 * MIB)]
cuda.cudaHostUnregister(room)
said["after release"] = lock(MIB, 2 * MIB)
cuda.fake_cuda_report.restype = ctypes.c_char_p
said["report"] = json.loads(cuda.fake_cuda_report())
print(json.dumps(said))
"""
OUT_OF_MEMORY, NOT_READY, INVALID, ALREADY_REGISTERED = 2, 600, 1, 712


def test_memory_ends_events_lag_and_page_locked_memory_is_limited(library):
    settings = {"FAKE_CUDA_TOTAL_MIB": "64", "FAKE_CUDA_LAG": "2", "FAKE_CUDA_PAGE_LOCK_MIB": "2"}
    answer = subprocess.run(
        [sys.executable, "-c", CALLS, str(library)], env=settings, capture_output=True, text=True, check=True
    )
    said = json.loads(answer.stdout)
    assert (said["fits"], said["does not fit"], said["fits again"]) == (0, OUT_OF_MEMORY, 0)
    assert said["stays until asked"] == [OUT_OF_MEMORY, 0]
    assert said["freed"] == [0, INVALID]
    assert said["reached"] == [NOT_READY, NOT_READY, 0, 0]
    assert said["waited for"] == [NOT_READY, 0, 0]
    assert said["page-locked"] == [0, ALREADY_REGISTERED, OUT_OF_MEMORY]
    assert said["after release"] == 0
    report = said["report"]
    assert (report["used_mib"], report["peak_mib"], report["page_locked_peak_mib"]) == (40, 40, 2)
    assert (report["allocations"], report["refused"], report["registrations_refused"]) == (3, 1, 2)


COPIES = """
import ctypes, json, sys
cuda = ctypes.CDLL(sys.argv[1])
device, host, event = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
size = ctypes.c_size_t(16)
cuda.cudaMalloc(ctypes.byref(device), size), cuda.cudaHostAlloc(ctypes.byref(host), size, 0)
cuda.cudaEventCreate(ctypes.byref(event))
read = lambda where: bytes((ctypes.c_char * 16).from_address(where.value))
def write(text): ctypes.memmove(host, text, 16)
said = {}
write(b"a" * 16)
cuda.cudaMemcpyAsync(device, host, size, 1, None)
cuda.cudaDeviceSynchronize()
write(b"b" * 16)  # the copy is over
cuda.cudaMemcpyAsync(host, device, size, 2, None)
cuda.cudaEventRecord(event, None)
said["before it is waited for"] = read(host).decode()
cuda.cudaEventSynchronize(event)
said["after"] = read(host).decode()
cuda.cudaMemcpyAsync(device, host, size, 1, None)
write(b"c" * 16)  # which it is still to read
cuda.cudaDeviceSynchronize()
cuda.cudaMemcpyAsync(host, device, size, 2, None)
for _ in range(3):
    cuda.cudaMemsetAsync(device, 0, ctypes.c_size_t(1), None)
said["once the device has come so far"] = read(host).decode()
cuda.fake_cuda_report.restype = ctypes.c_char_p
said["sources changed"] = json.loads(cuda.fake_cuda_report())["sources_changed"]
print(json.dumps(said))
"""


def test_copies_arrive_late_and_read_late_when_the_device_lags(library):
    for lag, arrives, changed in (("0", "a", 0), ("3", "b", 1)):
        answer = subprocess.run(
            [sys.executable, "-c", COPIES, str(library)],
            env={"FAKE_CUDA_LAG": lag, "FAKE_CUDA_ARITHMETIC": "1"},
            capture_output=True,
            text=True,
        )
        assert answer.returncode == 0, answer.stderr
        said = json.loads(answer.stdout)
        assert said["before it is waited for"] == arrives * 16
        assert said["after"] == said["once the device has come so far"] == "a" * 16
        assert said["sources changed"] == changed


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"CXX": "no-such-compiler"}, "no C++ compiler: install g++"),
        (
            {"FAKE_CUDA_INCLUDE": "/no/such/folder"},
            "no CUDA headers (cuda.h and crt/host_defines.h) in /no/such/folder",
        ),
    ],
)
def test_what_is_missing_is_said_in_one_sentence(given, named, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(build, "find_compiler", (lambda: "g++") if "CXX" not in given else build.find_compiler)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert run.main([f"--work={tmp_path}"]) == 2
    said = capsys.readouterr().err
    assert named in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("python", ["/no/such/python", sys.executable])
def test_a_python_without_the_cuda_build_is_refused(python, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "build", lambda *folders: None)
    if python == sys.executable and torch.version.cuda is not None:
        pytest.skip("this environment has PyTorch's CUDA build")
    assert run.main([f"--work={tmp_path}", f"--python={python}"]) == 2
    said = capsys.readouterr().err
    assert python in said
    assert len(said.splitlines()) == 1


def test_what_pytorch_calls_and_the_device_lacks_is_refused_by_name():
    assert [build.family(name) for name in ("cudaGraphLaunch", "cuLinkCreate_v2", "cublasCgemm_v2", "__cudaFoo")] == [
        "cuda", "cu", "cublas", "__cuda",
    ]  # fmt: skip
    assert [build.family(name) for name in ("cudnnCreate", "cusolverDnCreate", "cutlass_thing", "malloc")] == [None] * 4
    assert 'refuse("cudaGraphLaunch", 801)' in build.not_supported(["cudaGraphLaunch"])


def test_the_readme_claims_of_the_plan_what_the_record_holds():
    root = FOLDER.parents[1]
    readme, page = ((root / name).read_text(encoding="utf-8") for name in ("README.md", "docs/fake_gpu.md"))
    record = json.loads((root / "docs" / "fake_gpu.json").read_text(encoding="utf-8"))
    largest = {}
    for part in ("fit", "expandable", "elsewhere"):
        rows = record[part]["rows"]
        assert record[part]["passed"]
        assert all(run.as_planned(row) for row in rows)
        largest[part] = max(
            abs(fit["reserved_error_percent"])
            for row in rows
            for fit in row["fits"]
            if abs(fit["reserved_mib"] - row["plan"][f"{fit['allocator']}_reserved_mib"]) > run.PAGE_MIB
        )
    for part in ("fit", "expandable"):
        yamls = [row["name"] for row in record[part]["rows"] if row["name"].endswith(".yaml")]
        others = len(record[part]["rows"]) - len(yamls)
        assert f"{len(yamls)} YAMLs here and {others} other configurations" in " ".join(readme.split())
        assert all({fit["lag"] for fit in row["fits"]} == {0, 1_000, 10_000} for row in record[part]["rows"])

    def up(percent):
        return math.ceil(10 * percent) / 10

    claimed = [float(number) for number in re.findall(r"within ([\d.]+) %\s+or\s+one\s+page\s+of 2 MiB", readme)]
    assert claimed == [up(max(largest["fit"], largest["expandable"]))] * 2
    told = {part: float(number) for part, number in re.findall(r"^\| .*\(`(\w+)`\) \| \d+ \| ([\d.]+) %", page, re.M)}
    assert told == {part: up(percent) for part, percent in largest.items()}
