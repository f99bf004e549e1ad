"""Lightning, accelerate and plain PyTorch on the same module: are they the same bits?

    python -m nanogpt_lit parity --config configs/quickstart.yaml
    python -m nanogpt_lit parity --config configs/parity.yaml --all --precision bf16-mixed --steps 20
    python -m nanogpt_lit parity --config configs/parity.yaml --explain
    python -m nanogpt_lit parity --config configs/parity.yaml --on cuda --precision 16-mixed

Runs a grid of cases in each of the three loops, on the CPU or on a CUDA GPU, and compares the loss of every
micro-batch, the gradient norm, learning rate and loss scale of every step, the validation losses, and at the end every
parameter, the states of optimizer, schedule and scaler, and the random state: bit for bit. Cases of two processes train
under DistributedDataParallel or FSDP2, in processes that it starts itself. The network, its optimizer, the text and the
tokenizer are the YAML's, made small where they are large; every option of fit works here too, and what it sets stays.

Prints a row for each case and what each loop costs, and leaves report.json, curves.svg and TensorBoard runs in a folder
parity_N beside the runs of fit. The exit code is 0 only when every case is identical, 1 when one differs, 2 for a
mistake in the options.
"""

import argparse
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace

from nanogpt_lit.cli.options import OptionParser, program
from nanogpt_lit.cli.settings import SettingsCLI, quiet_lightning
from nanogpt_lit.data.datamodule import TokenDataModule
from nanogpt_lit.errors import UserError
from nanogpt_lit.gpt.networks import described, section_of
from nanogpt_lit.loops.contract import LoopSettings
from nanogpt_lit.optim.schedule import ScheduleConfig
from nanogpt_lit.parity.grid import (
    AXES,
    FRAMEWORKS,
    MEANINGS,
    Outcome,
    Point,
    case_of,
    compare_loops,
    compare_together,
    every_combination,
    every_pair,
    peak_growth_mib,
    warm_up,
)
from nanogpt_lit.parity.known_differences import KNOWN_DIFFERENCES, effects_together
from nanogpt_lit.parity.report import markdown_table, summary, write
from nanogpt_lit.parity.runs import Case, loaders_to_deal_out, quiet
from nanogpt_lit.run.resume import next_folder
from nanogpt_lit.run.terminal import relative_to_here
from nanogpt_lit.runtime.machine import hardware

OF_A_LAUNCHER = ("WORLD_SIZE", "ACCELERATE_MIXED_PRECISION", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS")


def compare(arguments: list[str]) -> int:
    """`parity`; arguments begin with the command. Returns the exit code."""
    parser = OptionParser(
        f"{program()} parity",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for axis, values in AXES.items():
        parser.add_argument(f"--{axis}", nargs="+", type=type(values[0]), choices=values, help=MEANINGS[axis])
    parser.add_argument("--all", action="store_true", help="every combination, not only enough to have every pair")
    parser.add_argument("--explain", action="store_true", help="bring each known difference back: what does it change?")
    parser.add_argument(
        "--on", choices=["cpu", "cuda"], default="cpu", help="where: cuda has cases of one process (cpu)"
    )
    parser.add_argument("--steps", type=at_least_one, default=8, help="optimizer steps of each run (8)")
    parser.add_argument("--full-size", action="store_true", help="keep the YAML's network and batches, however large")
    parser.add_argument("--skip-memory", action="store_true", help="do not start processes to measure their memory")
    parser.add_argument("--out", type=Path, help="the folder to write (trainer.default_root_dir/parity_N)")
    options, of_the_yaml = parser.parse_known_args(arguments[1:])
    chosen = {axis: tuple(getattr(options, axis)) for axis in AXES if getattr(options, axis) is not None}
    if options.explain and (chosen or options.all):
        parser.error(f"--explain brings cases of its own; leave out --{next(iter(chosen), 'all')}.")
    if options.on == "cuda":
        if not torch.cuda.is_available():
            parser.error("--on=cuda needs a CUDA GPU, and torch sees none; cpu needs none.")
        if options.explain or set(chosen.get("processes", ())) - {"1"}:
            parser.error("--on=cuda compares cases of one process; leave out --explain, and 2 from --processes.")
        chosen["processes"] = ("1",)
    for variable in OF_A_LAUNCHER:
        if variable in os.environ:
            parser.error(
                f"{variable}={os.environ[variable]} is set, as by torchrun or accelerate launch, and would decide over "
                "the grid; start it with python alone: it starts its processes itself."
            )

    quiet_lightning()
    quiet()
    cli = SettingsCLI(args=of_the_yaml)
    size = None if options.full_size else Size(cli.settings, options_given(of_the_yaml))
    if size is not None:
        # A network this small is not faster on more, and on a busy machine they wait for each other many times longer.
        torch.set_num_threads(1)
    base, clip, data = from_yaml(cli, options.steps, size)
    # Or a loop would differ from itself: a GPU adds up in no fixed order.
    base = replace(base, device=options.on, settings=replace(base.settings, deterministic=options.on == "cuda" or None))
    report: dict[str, Any] = {"hardware": hardware("lightning", "accelerate"), "compared": what_is_compared(base, data)}
    outcomes: list[tuple[Point, Outcome]] = []
    if options.explain:
        report["explained"] = explain(base, data)
        succeeded = all(row["seen"] != "no difference" for row in report["explained"])
    else:
        points = (every_combination if options.all else every_pair)(AXES | chosen)
        cases = [case_of(point, base, clip) for point in points]
        for case in cases:
            loaders_to_deal_out(case, data)  # what is too little text for a case is said before the first
        outcomes = list(zip(points, compare_all(points, cases, data), strict=True))
        report |= summary(
            outcomes, None if options.skip_memory or options.on == "cuda" else peak_growth_mib(cases[0], data)
        )
        succeeded = report["identical"]

    out = options.out or next_folder(Path(cli.settings.trainer.default_root_dir), "parity")
    write(out, report, outcomes)
    print(f"{relative_to_here(out / 'report.json')}\n{report['hardware']}; {report['compared']}")
    return 0 if succeeded else 1


def at_least_one(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} should be a whole number, at least 1.")
    return int(text)


def what_is_compared(base: Case, data: TokenDataModule) -> str:
    gpt = base.gpt
    return (
        f"{base.settings.max_steps} steps of {data.batch_size} x {data.block_size} tokens per micro-batch, "
        f"{gpt.n_layer} layers of {gpt.n_embd} channels, vocabulary {gpt.vocab_size:,} ({data.tokenizer.name})"
    )


def compare_all(points: list[Point], cases: list[Case], data: TokenDataModule) -> list[Outcome]:
    """Prints a row for each case as it is done; those of several processes come last and are done together."""
    widths = {axis: max(len(axis), *(len(str(point[axis])) for point in points)) for axis in AXES}
    heads = [f"{axis:<{width}}" for axis, width in widths.items()]
    print("  ".join([*heads, "skipped", f"{FRAMEWORKS[0]:<28}", FRAMEWORKS[1]]), flush=True)

    def show(k: int, outcome: Outcome) -> None:
        cells = [f"{points[k][axis]!s:<{width}}" for axis, width in widths.items()]
        verdicts = [str(outcome.differences[name] or "identical") for name in FRAMEWORKS]
        print("  ".join([*cells, f"{outcome.skipped_steps:>7}", f"{verdicts[0]:<28}", verdicts[1]]), flush=True)

    outcomes: dict[int, Outcome] = {}
    of_one = [k for k, case in enumerate(cases) if case.processes == 1]
    if of_one:
        warm_up(cases[of_one[0]], data)
    for turn, k in enumerate(of_one):
        outcomes[k] = compare_loops(cases[k], data, turn)
        show(k, outcomes[k])
    for processes in sorted({case.processes for case in cases} - {1}):
        together = [k for k, case in enumerate(cases) if case.processes == processes]
        for k, outcome in zip(together, compare_together(processes, [cases[k] for k in together], data), strict=True):
            outcomes[k] = outcome
            show(k, outcome)
    return [outcomes[k] for k in range(len(cases))]


def explain(base: Case, data: TokenDataModule) -> list[dict[str, Any]]:
    """Prints, as a table in Markdown, what changes when a known difference is brought back."""
    seen = effects_together(2, base, data)
    rows = []
    for known in KNOWN_DIFFERENCES:
        effect = seen[known.name] if known.name in seen else known.effect(base, data)
        named = {"difference": known.name, "what_happens": known.what_happens, "loop": known.loop}
        rows.append(named | {"seen": known.describe(effect)} | asdict(effect))
    heads = ["known difference", "what happens", "in", "first difference from plain PyTorch"]
    print(markdown_table(heads, [[row["difference"], row["what_happens"], row["loop"], row["seen"]] for row in rows]))
    return rows


# The case that the grid varies: the YAML's network, optimizer, text and tokenizer, made small where they are large.

# Largest values that are compared by default: float16 runs at a few billion operations a second on a CPU.
CAPS = {"n_layer": 2, "n_embd": 64, "data.block_size": 32, "data.batch_size": 2}
LARGE_VOCABULARY = 8192  # from here on the head is nearly all of the work
CAPS_OF_A_LARGE_VOCABULARY = {"n_embd": 32, "data.block_size": 16}


def options_given(arguments: Iterable[str]) -> set[str]:
    """The keys that the command line sets."""
    return {argument[2:].partition("=")[0] for argument in arguments if argument.startswith("--")}


class Size:
    """Lower what is too large in the settings and not given on the command line. The text and its tokenizer stay."""

    def __init__(self, settings: Namespace, given: set[str]) -> None:
        self.settings = settings
        self.given = given
        self.changed: dict[str, int] = {}
        """Values of the YAML that were lowered, by key."""

    def cap(self, caps: Mapping[str, int]) -> None:
        """caps: largest values, by key; of the network's sizes, by their names"""
        section = f"model.{section_of(self.settings.model)}"
        for key, largest in caps.items():
            self._lower(key if "." in key else f"{section}.{key}", largest)
        heads, channels = self.settings[f"{section}.n_head"], self.settings[f"{section}.n_embd"]
        if heads > 1 and channels % heads:
            self._lower(f"{section}.n_head", max(n for n in range(1, heads) if channels % n == 0))
        self.settings[f"{section}.block_size"] = self.settings["data.block_size"]

    def _lower(self, key: str, largest: int) -> None:
        # Also given by a whole section, as in --data '{...}'.
        given = any(key == option or key.startswith(f"{option}.") for option in self.given)
        if self.settings[key] > largest and not given:
            self.changed.setdefault(key, self.settings[key])
            self.settings[key] = largest

    def __str__(self) -> str:
        return ", ".join(
            f"{key.rpartition('.')[2]} {before} -> {self.settings[key]}" for key, before in self.changed.items()
        )


def from_yaml(cli: SettingsCLI, steps: int, size: Size | None) -> tuple[Case, float, TokenDataModule]:
    """The case that the grid varies, the limit of clipping, and the data. size: makes it small"""
    if size is not None:
        size.cap(CAPS)
    if (teachers := cli.settings.get("teachers")) is not None:
        raise UserError(f"teachers={teachers} are not compared, and every loop has their loss alike; leave them out.")
    cli.settings.trainer.precision = "32-true"  # the grid chooses
    cli.settings.model.compile = False  # the loops are compared, and each case would be compiled anew
    cli.complete_settings()
    if size is not None:
        model = cli.settings.model
        if model[section_of(model)].vocab_size > LARGE_VOCABULARY:
            size.cap(CAPS_OF_A_LARGE_VOCABULARY)
        if size.changed:
            print(f"small for the comparison: {size} (--full-size, or an option of fit, keeps the YAML's)")
    module, data = cli.build()
    data.setup()
    schedule = asdict(module.schedule_config) | {"total_steps": steps}
    schedule["warmup_steps"] = min(schedule["warmup_steps"], steps // 4)
    settings = LoopSettings(steps, val_check_interval=2, limit_val_batches=2, seed=cli.seed or 0)
    configs = (*described(module.gpt.config), "optim", "schedule")
    case = Case(
        settings,
        module.gpt.config,
        module.optim_config,
        ScheduleConfig(**schedule),
        module_options={name: value for name, value in module.hparams.items() if name not in configs},
    )
    return case, cli.settings.trainer.gradient_clip_val or 1.0, data
