"""Runs the tests as other CPUs would: with the kernels that each has, and on a busy machine.

    python scripts/test_as_other_cpus.py
    python scripts/test_as_other_cpus.py --cpus avx2 busy -- tests/test_parity.py -k clipping

PyTorch, oneDNN and MKL choose their kernels by what the CPU can do, and sum in another order in each. The environment
variables that this sets limit all three to an older CPU; newer ones than this machine's are left out. What follows `--`
goes to pytest, in place of the files that compare bits. The exit code is 1 when a test failed on any of them.
"""

import argparse
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
CAPABILITIES = ("DEFAULT", "AVX2", "AVX512")
"""PyTorch's own names for its sets of kernels, each with those before it."""
CPUS: dict[str, dict[str, str]] = {
    "sse4": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    # Skylake-X; then Zen 4 and 5, which multiply bfloat16; tiles (AMX) are what a Sapphire Rapids has by itself.
    "avx512": {
        "ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "MKL_ENABLE_INSTRUCTIONS": "AVX512"
    },
    "avx512_bf16": {"ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
    "this": {},
    "busy": {},
}  # fmt: skip
COMPARE_BITS = [
    f"tests/test_{name}.py"
    for name in (
        "accelerate_loop", "checkpoint_switch", "eight_bit", "elastic", "generate", "guards", "host_optimizer",
        "host_weights", "loss", "matmul", "model", "module", "optim", "parity", "networks", "reference", "resume",
        "scale_out", "techniques",
    )
]  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpus", nargs="+", choices=[*CPUS], default=[*CPUS], help="only these")
    parser.add_argument("pytest", nargs="*", help="what pytest is given (the files that compare bits)")
    options = parser.parse_args(arguments)
    answers = {}
    for cpu in options.cpus:
        if (lacks := needs(cpu)) is not None:
            answers[cpu] = f"left out: this CPU has no {lacks}"
            continue
        print(f"--- {cpu}: {CPUS[cpu] or 'nothing limited'}", flush=True)
        command = [sys.executable, "-m", "pytest", "-q", *(options.pytest or COMPARE_BITS)]
        with busy_cores() if cpu == "busy" else contextmanager(lambda: iter([None]))():
            code = subprocess.run(command, cwd=ROOT, env=os.environ | CPUS[cpu], check=False).returncode
        answers[cpu] = "passed" if code == 0 else f"FAILED, pytest's exit code {code}"
    for cpu, answer in answers.items():
        print(f"{cpu:<12} {answer}")
    return int(any(answer.startswith("FAILED") for answer in answers.values()))


def needs(cpu: str) -> str | None:
    """The kernels that this machine lacks for it, if it does: PyTorch would run them all the same, and die of it."""
    wanted = CPUS[cpu].get("ATEN_CPU_CAPABILITY", "default").upper()
    here = torch.backends.cpu.get_cpu_capability()
    return wanted if CAPABILITIES.index(wanted) > CAPABILITIES.index(here) else None


@contextmanager
def busy_cores() -> Iterator[None]:
    """Two processes more than this machine has cores, that never rest."""
    others = [multiprocessing.Process(target=never_rest, daemon=True) for _ in range((os.cpu_count() or 1) + 2)]
    for process in others:
        process.start()
    try:
        yield
    finally:
        for process in others:
            process.kill()


def never_rest() -> None:
    while True:
        pass


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
