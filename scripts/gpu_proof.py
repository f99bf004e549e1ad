"""On a CUDA GPU: is the memory that was planned the memory that is used, and what does each way to save it cost?

    bash scripts/gpu_proof.sh
    bash scripts/gpu_proof.sh --caps 3200MiB 2400MiB --configs rtx2050.yaml --skip ladder
    bash scripts/gpu_proof.sh --dry-run

Trains each configuration of an RTX 2050, as `fit` does, in a process that may reserve no more than 3,200 MiB, which is
what 4 GB leave to PyTorch; then every rung of the plan's ladder for GPT-2 small without a limit. Each runs for a few
steps and a validation, past its peak. The parity grid in float16 and the tests marked gpu follow. Needs no network, and
nothing but what the package needs; without pytest the tests are left out, and the record says so.

Writes a record to docs/gpu/. The exit code is 0 when all that was asked for ran, each peak reserved is within 5 % of
the plan, the loops are identical and the tests pass; 1 when not; 2 without a GPU. --dry-run takes tiny networks on the
processor, measures nothing and proves nothing: it shows that the script runs.
"""

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import torch

from nanogpt_lit.__main__ import exit_code
from nanogpt_lit.cli.fit import NanoGPTCLI
from nanogpt_lit.cli.settings import SettingsCLI, quiet_lightning
from nanogpt_lit.errors import UserError
from nanogpt_lit.memory.ladder import ladder
from nanogpt_lit.memory.techniques import MemoryConfig
from nanogpt_lit.plan.budget import choose_budget, parse_mib
from nanogpt_lit.plan.command import own_rung, plan_rung
from nanogpt_lit.plan.peak_watch import TOLERANCE, expandable_segments
from nanogpt_lit.plan.plan import Footprint
from nanogpt_lit.run.metrics import peaks_mib
from nanogpt_lit.runtime.machine import hardware, peak_flops_of

ROOT = Path(__file__).parents[1]
MIB = 2**20
STEPS = 8
"""The plan's traces settle after 6; the rate is that of the last 4."""
CONFIGS = ("rtx2050.yaml", "rtx2050_medium.yaml", "rtx2050_large.yaml", "rtx2050_xl.yaml")
CAPS = ("3200MiB",)
"""What a 4 GB GPU leaves: the driver, the CUDA context and the desktop have the rest (plan/budget.py)."""
PARTS = ("configs", "ladder", "parity", "tests")
ANSWER = "answer: "
"""How the line begins in which a process of ours says what it measured."""

TINY = (
    "--model.gpt.n_layer=1", "--model.gpt.n_head=1", "--model.gpt.n_embd=16", "--data.block_size=16",
    "--data.tokenizer=byte", f"--data.source={ROOT / 'README.md'}", "--data.val_fraction=0.2",
    "--trainer.accelerator=cpu", "--trainer.accumulate_grad_batches=2",
)  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--configs", nargs="+", choices=CONFIGS, default=CONFIGS, help="only these")
    parser.add_argument("--caps", nargs="+", default=CAPS, metavar="SIZE", help="limits to run them under")
    parser.add_argument("--skip", nargs="+", choices=PARTS, default=(), help="leave these out")
    parser.add_argument("--dry-run", action="store_true", help="tiny, on the CPU: does the script run?")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="the record (docs/gpu/CARD.json)")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # what a process of ours is to run
    options = parser.parse_args(arguments)
    quiet_lightning()
    if options.one is not None:
        print(ANSWER + json.dumps(run_here(**json.loads(options.one))))
        return 0
    if not options.dry_run and not torch.cuda.is_available():
        print("error: torch sees no CUDA GPU here; --dry-run shows that the script runs.", file=sys.stderr)
        return 2
    caps = [parse_mib("--caps", cap) for cap in options.caps]
    record: dict[str, Any] = {
        "hardware": hardware("lightning", "accelerate"),
        "cuda": torch.version.cuda,
        "card_mib": None if options.dry_run else torch.cuda.get_device_properties(0).total_memory // MIB,
        "expandable_segments": expandable_segments(),
        "date": date.today().isoformat(),
        "command": " ".join(["bash scripts/gpu_proof.sh", *arguments]),
        "dry_run": options.dry_run,
    }
    print(record["hardware"])
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        proof = Proof(work, options.dry_run)
        if "configs" not in options.skip:
            record["configs"] = list(proof.configs(options.configs, caps))
        if "ladder" not in options.skip:
            record["ladder"] = list(proof.ladder(options.configs[0]))
        if "parity" not in options.skip:
            record["parity"] = parity(work, options.dry_run)
        if "tests" not in options.skip:
            record["tests"] = gpu_tests(options.dry_run)
    record["holds"] = None if options.dry_run else holds(record)
    name = "dry_run" if options.dry_run else re.sub(r"\W+", "_", torch.cuda.get_device_name().lower())
    out = options.out or (None if options.dry_run else ROOT / "docs" / "gpu" / f"{name}.json")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(out)
    return 0 if options.dry_run or record["holds"] else 1


class Proof:
    """Runs of the product, each beside its plan."""

    def __init__(self, work: Path, dry_run: bool) -> None:
        self.work = work
        self.dry_run = dry_run
        self.gpu = choose_budget("rtx2050" if dry_run else None).gpu
        self._options: dict[str, list[str]] = {}

    def configs(self, names: Sequence[str], caps: Sequence[int]) -> Iterator[dict[str, Any]]:
        print(f"{'':<46}{'allocated MiB':>20}{'reserved MiB':>20}{'tokens/s':>20}{'MFU':>7}")
        for name in names:
            settings = self.settings(name)
            footprint = plan_rung(settings, own_rung(settings), self.gpu)
            for cap_mib in caps[:1] if self.dry_run else caps:
                row = {"config": name, "cap_mib": cap_mib}
                yield self.row(f"{name}, at most {cap_mib:,} MiB", row, settings, footprint, [], cap_mib)

    def ladder(self, name: str) -> Iterator[dict[str, Any]]:
        """With the sequences per micro-batch of the YAML; slower: against the first rung that runs."""
        settings = self.settings(name)
        own = own_rung(settings)
        rungs = [r for r in ladder(own, settings.data.block_size, True) if r.batch_size == own.batch_size]
        rungs.sort(key=lambda rung: rung.memory != MemoryConfig())  # the plain step first: the others' measure
        plain_s = fastest = 0.0
        for rung in rungs[:2] if self.dry_run else rungs:
            footprint = plan_rung(settings, rung, self.gpu)
            plain_s = plain_s or footprint.step_s
            row: dict[str, Any] = {"config": name, "rung": rung.name}
            row["planned_slowdown"] = round(footprint.step_s / plain_s, 3)
            memory = f"--model.memory={json.dumps(asdict(rung.memory))}"
            row = self.row(rung.name, row, settings, footprint, [memory], None)
            if "failed" not in row:
                fastest = fastest or row["tokens_per_s"]
                row["slowdown_to_first_that_ran"] = fastest / row["tokens_per_s"]
            yield row

    def options(self, name: str) -> list[str]:
        """Of fit: a few steps, one validation, a sample of a token, no checkpoint."""
        if name in self._options:
            return self._options[name]
        given = [f"--config={ROOT / 'configs' / name}", *(TINY if self.dry_run else ())]
        accumulate = SettingsCLI(args=given).settings.trainer.accumulate_grad_batches
        self._options[name] = [
            *given, f"--trainer.default_root_dir={self.work / 'runs'}", f"--data.shards_dir={self.work / 'shards'}",
            f"--trainer.max_steps={STEPS}", f"--trainer.log_every_n_steps={STEPS // 2}",
            "--trainer.limit_val_batches=2", f"--trainer.val_check_interval={STEPS * accumulate}",
            "--model.schedule.warmup_steps=2",
            "--trainer.enable_checkpointing=false", "--trainer.logger=false", "--trainer.enable_progress_bar=false",
            "--trainer.callbacks+=nanogpt_lit.loops.lightning.TextSamples", "--trainer.callbacks.tokens=1",
        ]  # fmt: skip
        return self._options[name]

    def settings(self, name: str) -> Any:
        return SettingsCLI(args=self.options(name)).settings

    def row(
        self,
        title: str,
        row: dict[str, Any],
        settings: Any,
        footprint: Footprint,
        more: list[str],
        cap_mib: int | None,
    ) -> dict[str, Any]:
        tokens = settings.data.batch_size * settings.data.block_size * settings.trainer.accumulate_grad_batches
        reserved = footprint.expandable_reserved_mib if expandable_segments() else footprint.reserved_mib
        row |= {
            "planned_allocated_mib": round(footprint.allocated_mib, 1),
            "planned_reserved_mib": round(reserved, 1),
            "planned_host_mib": round(footprint.host_memory_mib),
            "estimated_tokens_per_s": round(tokens / footprint.step_s),
        }
        row |= self.run([*self.options(row["config"]), *more], cap_mib, footprint.host_memory_mib)
        print(f"{title:<46}" + (row.get("failed") or cells(row)), flush=True)
        return row

    def run(self, options: list[str], cap_mib: int | None, host_mib: float) -> dict[str, Any]:
        there_mib = host_memory_mib()
        if not self.dry_run and there_mib is not None and host_mib > there_mib:
            return {"failed": f"not run: {host_mib:,.0f} MiB of host memory are needed and {there_mib:,.0f} are there"}
        if self.dry_run:
            return run_here(options, None)
        one = json.dumps({"options": options, "cap_mib": cap_mib})
        command = [sys.executable, __file__, "--one", one]
        child = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        lines = child.stdout.splitlines()
        if child.returncode == 0 and lines and lines[-1].startswith(ANSWER):
            return json.loads(lines[-1].removeprefix(ANSWER))
        last = (child.stderr.strip().splitlines() or ["without a word"])[-1]
        return {"failed": f"exit code {child.returncode}: {last[:300]}"}


def run_here(options: list[str], cap_mib: int | None) -> dict[str, Any]:
    """One fit; what the GPU says afterwards. cap_mib: what PyTorch may reserve at most"""
    # With its index: set_per_process_memory_fraction refuses a device without one.
    card = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None
    if card is not None and cap_mib is not None:
        total = torch.cuda.get_device_properties(card).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap_mib * MIB / total), card)
    try:
        cli = NanoGPTCLI(args=["fit", *options])
    except UserError as error:
        return {"failed": " ".join(str(error).split())[:200]}
    if cli.model.fallback:
        return {"failed": f"did not fit as planned, and fell back to {cli.model.fallback}"}
    answer: dict[str, Any] = {
        "steps": cli.trainer.global_step,
        "tokens_per_s": cli.lightning_run.run.metrics.tokens_per_s,
    }
    if card is not None and cli.device == "cuda":
        allocated_mib, reserved_mib = peaks_mib(card)
        answer |= {"measured_allocated_mib": allocated_mib, "measured_reserved_mib": reserved_mib, "mfu": mfu(cli)}
    return answer


def mfu(cli: Any) -> float | None:
    """The share of the peak of the device that the last steps reached; None where runtime/gpus.py has no peak."""
    peak = peak_flops_of(cli.trainer.strategy.root_device, str(cli.trainer.precision), 1)
    gpt, tokens_per_s = cli.model.gpt, cli.lightning_run.run.metrics.tokens_per_s
    return None if peak is None else tokens_per_s * gpt.flops_per_token(gpt.config.block_size) / peak


def cells(row: dict[str, Any]) -> str:
    """Measured of planned."""

    def pair(measured: float | None, planned: float) -> str:
        return f"{'-' if measured is None else f'{measured:,.0f}'} of {planned:,.0f}".rjust(20)

    return (
        pair(row.get("measured_allocated_mib"), row["planned_allocated_mib"])
        + pair(row.get("measured_reserved_mib"), row["planned_reserved_mib"])
        + pair(row["tokens_per_s"], row["estimated_tokens_per_s"])
        + (f"{row['mfu']:7.1%}" if row.get("mfu") is not None else "")
    )


def host_memory_mib() -> float | None:
    """Of this machine; None where Python has no way to ask."""
    if not hasattr(os, "sysconf"):
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / MIB


def parity(work: Path, dry_run: bool) -> dict[str, Any]:
    grid = [
        "--on=cpu", "--precision", "16-mixed", "--optimizer", "fused", "--accumulate", "1", "--clip", "on",
        "--dropout", "0.0", "--ragged", "no", "--processes", "1", "--steps=2", f"--data.source={ROOT / 'README.md'}",
    ]  # fmt: skip
    if not dry_run:
        grid = ["--on=cuda", "--precision", "16-mixed", "16-mixed overflow"]
    out = work / "parity"
    command = [sys.executable, "scripts/parity.py", "--config=configs/parity.yaml", *grid, "--skip-memory"]
    command += [f"--trainer.default_root_dir={work / 'parity_run'}", f"--out={out}"]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    report = out / "report.json"
    if not report.is_file():
        return {"identical": False, "failed": (answer.stderr.strip().splitlines() or ["without a word"])[-1]}
    found = json.loads(report.read_text(encoding="utf-8"))
    print(f"parity: {len(found['cases'])} cases, {'all identical' if found['identical'] else 'not all identical'}")
    return {"identical": found["identical"], "compared": found["compared"], "cases": found["cases"]}


def gpu_tests(dry_run: bool) -> dict[str, Any]:
    if importlib.util.find_spec("pytest") is None:
        print("tests: not run, pytest is not installed")
        return {"passed": False, "said": "not run: pytest is not installed"}
    files = [
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "tests").glob("test_*.py"))
        if "pytest.mark.gpu" in path.read_text(encoding="utf-8") and path.name != "test_gpu_proof.py"
    ]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-o",
        "addopts=",
        "-q",
        "-m",
        "gpu",
        *(["--collect-only"] if dry_run else []),
        *files,
    ]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    said = (answer.stdout.strip().splitlines() or ["nothing"])[-1].strip("= ")
    print(f"tests: {said}")
    return {"passed": answer.returncode == 0 and "skipped" not in said, "said": said, "files": files}


def holds(record: dict[str, Any]) -> bool:
    """Whether all that was asked for is as planned. The plain step may need more than the GPU has."""
    rows = [*record.get("configs", []), *(row for row in record.get("ladder", []) if "failed" not in row)]
    as_planned = all(
        "failed" not in row and abs(row["measured_reserved_mib"] / row["planned_reserved_mib"] - 1) <= TOLERANCE
        for row in rows
    )
    return (
        bool(rows or "parity" in record or "tests" in record)
        and as_planned
        and record.get("parity", {}).get("identical", True)
        and record.get("tests", {}).get("passed", True)
    )


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(sys.argv[1:])))
