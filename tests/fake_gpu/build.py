"""Builds the fake CUDA device: libcuda.so.1 (driver, runtime and cuBLAS in one) and libnvidia-ml.so.1.

    python tests/fake_gpu/build.py --out FOLDER [--torch SITE-PACKAGES/torch]

Needs Linux, g++ and CUDA's headers (cuda.h, cuda_runtime_api.h and crt/; version 12 or later). The headers are looked
for in CUDA_HOME and in /usr/local/cuda*; without a toolkit, NVIDIA's packages nvidia-cuda-runtime and nvidia-cuda-crt
have them: FAKE_CUDA_INCLUDE names their include folder.

With --torch, each CUDA function that this PyTorch calls and the device does not have is added as one that says its name
on stderr and fails as "not supported": nothing that is missing passes for done.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = ("device.cpp", "runtime.cpp", "driver.cpp", "cublas.cpp")
NOT_SUPPORTED = {"cublas": 15, "cuda": 801, "__cuda": 801, "cu": 801}
"""What a missing function answers: CUBLAS_STATUS_NOT_SUPPORTED, cudaErrorNotSupported, CUDA_ERROR_NOT_SUPPORTED."""
REAL = ("cudnn", "cufft", "cusolver", "cusparse", "curand", "cupti", "cufile")
"""Libraries that come with PyTorch and that nothing here calls: they stay NVIDIA's own."""


class CannotBuildError(Exception):
    """One sentence: what is missing, and what would do."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the folder of the two libraries")
    parser.add_argument("--torch", type=Path, help="the folder of PyTorch's CUDA build")
    options = parser.parse_args()
    try:
        build(options.out, options.torch)
    except CannotBuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(options.out)
    return 0


def build(out: Path, torch: Path | None = None) -> None:
    """Raises CannotBuildError."""
    compiler, include = find_compiler(), find_headers()
    out.mkdir(parents=True, exist_ok=True)
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-fvisibility=hidden", "-Wall", "-Werror"]
    driver = out / "libcuda.so.1"

    def compile_driver(*more: Path) -> None:
        sources = [str(HERE / name) for name in SOURCES] + [str(path) for path in more]
        soname = f"-Wl,-soname,{driver.name}"
        # isystem: a warning about NVIDIA's headers is none about ours.
        run([compiler, *flags, "-isystem", str(include), soname, *sources, "-o", str(driver), "-ldl", "-lpthread"])

    compile_driver()
    if torch is not None:
        rest = out / "not_supported.cpp"
        rest.write_text(not_supported(missing(torch, driver)), encoding="utf-8")
        compile_driver(rest)
    management = out / "libnvidia-ml.so.1"
    run([compiler, *flags, f"-Wl,-soname,{management.name}", str(HERE / "nvml.cpp"), "-o", str(management)])


def find_compiler() -> str:
    if sys.platform != "linux":
        raise CannotBuildError(f"the fake CUDA device is preloaded, which only Linux can do; this is {sys.platform}.")
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise CannotBuildError("no C++ compiler: install g++ (apt install g++), or name one with CXX.")
    return compiler


def find_headers() -> Path:
    """The folder of cuda_runtime_api.h."""
    given = os.environ.get("FAKE_CUDA_INCLUDE")
    homes = [os.environ.get("CUDA_HOME"), *sorted(map(str, Path("/usr/local").glob("cuda*")), reverse=True)]
    folders = [Path(given)] if given else [Path(home) / "include" for home in homes if home]
    for folder in folders:
        if (folder / "cuda.h").is_file() and (folder / "crt" / "host_defines.h").is_file():
            return folder
    places = ", ".join(map(str, folders)) or "/usr/local/cuda*/include"
    raise CannotBuildError(
        f"no CUDA headers (cuda.h and crt/host_defines.h) in {places}: install a CUDA toolkit (apt install "
        "cuda-cudart-dev-13-0 cuda-crt-13-0), or name the folder with FAKE_CUDA_INCLUDE."
    )


def missing(torch: Path, driver: Path) -> list[str]:
    """What PyTorch's libraries want of CUDA and cuBLAS and the device does not have."""
    wanted: set[str] = set()
    for library in sorted((torch / "lib").glob("*.so")):
        wanted |= symbols(library, "--undefined-only")
    if not any(name.startswith("cudaMalloc") for name in wanted):
        raise CannotBuildError(f"{torch} is not PyTorch's CUDA build: none of its libraries calls cudaMalloc.")
    ours = symbols(driver, "--defined-only")
    return sorted(name for name in wanted - ours if family(name) is not None)


def family(name: str) -> str | None:
    if name.startswith(REAL):
        return None
    kind = next((prefix for prefix in NOT_SUPPORTED if name.startswith(prefix)), None)
    return None if kind == "cu" and not name[2:3].isupper() else kind


def symbols(library: Path, which: str) -> set[str]:
    lines = run(["nm", "-D", which, str(library)]).splitlines()
    return {line.split()[-1].partition("@")[0] for line in lines}


def not_supported(names: list[str]) -> str:
    lines = ["#include <cstdio>", "static int refuse(const char* name, int answer) {"]
    lines += ['  fprintf(stderr, "[fake CUDA] %s is not supported\\n", name);', "  return answer;", "}"]
    for name in names:
        answer = NOT_SUPPORTED[family(name) or "cu"]
        lines.append(
            f'extern "C" __attribute__((visibility("default"))) int {name}() {{ return refuse("{name}", {answer}); }}'
        )
    return "\n".join(lines) + "\n"


def run(command: list[str]) -> str:
    answer = subprocess.run(command, capture_output=True, text=True)
    if answer.returncode:
        raise CannotBuildError(f"{Path(command[0]).name} failed:\n{answer.stderr.strip()[-3000:]}")
    return answer.stdout


if __name__ == "__main__":
    sys.exit(main())
