"""Kills training runs at random moments, resumes them, and compares each with the run that nobody disturbed.

    python scripts/torture.py --count 100 --jobs 2 --out docs/torture.json
    python scripts/torture.py --count 4 --processes 2
    python scripts/torture.py --count 4 --processes 3 --strategy ModelParallelStrategy
    python scripts/torture.py --count 1 --only 37          # one trial of them again

A trial is one run of a small network on real text, by `fit`, by raw accelerate, or by either after each resume, as a
real process. It is killed, told to stop, or harmed in another way, once or several times; every time it is started
again with --resume=auto, as it was before. At its end the weights, the optimizer, the schedule, the random states, the
position in the data and every curve have to be those of the undisturbed run, bit for bit. On the way nothing that was
saved may be lost, a stop has to end with its exit code and a checkpoint of that very step, and no process may remain.
"""

import argparse
import json
import os
import random
import shlex
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

from torture_process import warm_up
from torture_trial import GOES_ON, KINDS, STEPS, STOPS, Reference, Result, Setup, Trial, left_out, reference

from nanogpt_lit.loops.compatibility import FSDP2
from nanogpt_lit.runtime.machine import hardware

SETUPS = [
    Setup(precision, accumulate, nan_every, recipe)
    for nan_every in (0, 11)
    for recipe in ("nanogpt", "modern")
    for precision, accumulate in (("32-true", 1), ("bf16-mixed", 3))
]
STRATEGIES = ("ddp", FSDP2, "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100, help="trials (100)")
    parser.add_argument("--seed", type=int, default=1, help="of what happens when (1)")
    parser.add_argument("--loop", choices=("fit", "accelerate", "both"), default="both")
    parser.add_argument("--processes", type=int, default=1, help="of each run, joined under gloo (1)")
    parser.add_argument("--strategy", choices=STRATEGIES, default="ddp", help="of several processes (ddp)")
    parser.add_argument("--jobs", type=int, default=1, help="trials at the same time (1)")
    parser.add_argument("--only", type=int, help="the trial of this number alone")
    parser.add_argument("--setups", type=int, default=len(SETUPS), help=f"of {len(SETUPS)}, the first so many")
    parser.add_argument("--out", type=Path, help="also write a record to this file")
    args = parser.parse_args()
    if (remark := left_out()) is not None:
        print(remark)
    started_s = time.monotonic()
    # Not TemporaryDirectory: a forked process would remove it at its end. What a failed trial leaves is there to see.
    root = Path(tempfile.mkdtemp(prefix="torture-"))
    numbers = [args.only] if args.only is not None else list(range(args.count))
    trials = [trial(number, args) for number in numbers]
    warm_up()
    references: dict[Setup, Reference] = {}
    for setup in dict.fromkeys(trial.setup for trial in trials):
        # The first by an interpreter of its own: so the copies are compared with what a user starts. It costs ten
        # seconds, which a handful of trials would notice.
        fresh = not references and args.count >= 10
        references[setup] = reference(setup, root, args.processes, fresh)
    results = run_all(trials, references, root, args.jobs)
    print_table(results)
    failed = [result for result in results if result.failure is not None]
    if args.out is not None:
        command = shlex.join(["python", "scripts/torture.py", *sys.argv[1:]])
        write_record(args.out, command, time.monotonic() - started_s, results)
    if not failed:
        shutil.rmtree(root)
    return 1 if failed else 0


def trial(number: int, args: argparse.Namespace) -> Trial:
    draw = random.Random(f"{args.seed} {number}")
    # Strategies that share tensors out have no Muon, which the modern recipe trains with.
    setups = [replace(s, strategy=args.strategy) for s in SETUPS if args.strategy == "ddp" or s.recipe == "nanogpt"]
    setup = setups[number % min(args.setups, len(setups))]
    # The first disturbances take turns, so that few trials have all of them; the others are drawn.
    disturbances = [KINDS[number % len(KINDS)], *draw.choices(KINDS, k=draw.randint(0, 2))]
    return Trial(number, setup, disturbances, draw, args.loop, args.processes)


def run_all(trials: list[Trial], references: dict[Setup, Reference], root: Path, jobs: int) -> list[Result]:
    """With several jobs, each is a process with its share of the trials."""
    if jobs == 1 or not hasattr(os, "fork"):
        return [run_one(trial, references, root) for trial in trials]
    pids = []
    for job in range(jobs):
        pid = os.fork()
        if pid == 0:
            results = [run_one(trial, references, root) for trial in trials[job::jobs]]
            (root / f"results_{job}.json").write_text(json.dumps([asdict(result) for result in results]))
            os._exit(0)
        pids.append(pid)
    for pid in pids:
        os.waitpid(pid, 0)
    shares = [json.loads((root / f"results_{job}.json").read_text()) for job in range(jobs)]
    return sorted((Result(**fields) for share in shares for fields in share), key=lambda result: result.number)


def run_one(trial: Trial, references: dict[Setup, Reference], root: Path) -> Result:
    result = trial.run(references[trial.setup], root / f"trial_{trial.number}")
    happened = ", ".join(f"{piece['disturbance']} ({piece['exit']})" for piece in result.pieces)
    print(
        f"{trial.number:4}  {'ok' if result.failure is None else 'FAILED: ' + result.failure}  {happened}", flush=True
    )
    return result


def print_table(results: list[Result]) -> None:
    struck, before_the_end, saved, late = counts(results)
    print(f"\n{'disturbance':<24}{'struck':>8}{'before the end':>16}{'saved':>8}{'too late':>10}")
    for kind in KINDS:
        if struck[kind] or late[kind]:
            print(f"{kind:<24}{struck[kind]:8}{before_the_end[kind]:16}{saved[kind] or '':>8}{late[kind]:10}")
    passed = sum(result.failure is None for result in results)
    print(
        f"\n{passed} of {len(results)} runs ended with the bits of the undisturbed one, {struck.total()} disturbances"
    )


def counts(results: list[Result]) -> list[Counter[str]]:
    """By disturbance: how often it struck, how often of these before the run's last step was saved, how often a stop
    ended a step and saved it, and how often it came when the process had ended already."""
    struck, before_the_end, saved, late = counted = [Counter[str]() for _ in range(4)]
    for piece in (piece for result in results for piece in result.pieces):
        if (kind := piece["disturbance"]) in KINDS:
            struck[kind] += piece["struck"]
            before_the_end[kind] += piece["struck"] and (piece["step"] < STEPS or kind in GOES_ON)
            saved[kind] += piece["exit"] == STOPS.get(kind)
            late[kind] += not piece["struck"]
    return counted


def write_record(path: Path, command: str, elapsed_s: float, results: list[Result]) -> None:
    """One line per trial, so that two records can be compared."""
    struck, before_the_end, saved, late = counts(results)
    head = {
        "hardware": hardware("lightning", "accelerate"),
        "command": command,
        "elapsed_s": round(elapsed_s),
        "trials": len(results),
        "passed": sum(result.failure is None for result in results),
        "struck": in_order(struck),
        "before_the_end": in_order(before_the_end),
        "saved_by_a_stop": in_order(saved),
        "too_late": in_order(late),
        "left_out": left_out(),
    }
    lines = ",\n".join("  " + json.dumps(asdict(result)) for result in results)
    text = json.dumps(head, indent=1)[:-2] + ',\n "results": [\n' + lines + "\n ]\n}\n"
    path.write_text(text, encoding="utf-8")


def in_order(counter: Counter[str]) -> dict[str, int]:
    return {kind: counter[kind] for kind in KINDS if counter[kind]}


if __name__ == "__main__":
    sys.exit(main())
