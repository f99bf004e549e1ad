"""One `tune`: from a YAML to another, a picture and a screen."""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]

from nanogpt_lit.cli.settings import SettingsCLI, quiet_lightning
from nanogpt_lit.errors import UserError
from nanogpt_lit.loops.trainer_section import asked_processes
from nanogpt_lit.plan.budget import choose_budget
from nanogpt_lit.plan.command import own_rung, plan_rung
from nanogpt_lit.run.stops import Reason, Stops
from nanogpt_lit.runtime.clock import awake_s
from nanogpt_lit.runtime.durable import write_durably
from nanogpt_lit.runtime.machine import hardware
from nanogpt_lit.tune.report import changes, draw, screen, tuned_yaml
from nanogpt_lit.tune.search import decide, search
from nanogpt_lit.tune.trials import OWN, RECIPES, Candidate, Trials, recipe_of


def run(config: Path, settings_of_fit: Sequence[str], budget_s: float, out: Path) -> int:
    """Returns the exit code. The budget begins when the shards are there."""
    quiet_lightning()
    cli = SettingsCLI(args=[f"--config={config}", *settings_of_fit])
    given = yaml.safe_load(cli.parser.dump(cli.config, skip_default=True))
    processes = asked_processes(vars(cli.settings.trainer))
    if processes is not None and processes > 1:
        raise UserError(f"trainer.devices asks for {processes} processes and tune measures one; --trainer.devices=1.")
    if cli.settings.get("init_from") is not None:
        raise UserError(
            f"init_from={cli.settings.init_from} begins with a trained model, and tune measures runs from the start; "
            "leave it out."
        )
    cli.complete_settings()
    settings = cli.settings
    own = Candidate(
        recipe_of(settings.model) or OWN,
        settings.model.optim["lr"],
        settings.data.batch_size,
        settings.trainer.accumulate_grad_batches,
    )
    with Stops(None, budget_s, awake_s) as stops:
        trials = Trials(settings, own, cli.device, awake_s, stops.between_steps)
        recipes = [own.recipe]
        for name in RECIPES:
            try:
                with torch.device("meta"):
                    trials.build(replace(own, recipe=name), settings.trainer.max_steps)
            except UserError as error:
                print(f"without the recipe {name}: {error}", flush=True)
            else:
                recipes += [name] if name != own.recipe else []
        max_steps, seed = settings.trainer.max_steps, settings.data.seed
        fits = memory_check(settings, own, cli.device)
        found = search(
            trials, own, recipes, max_steps, budget_s, awake_s, fits, seed, lambda line: print(line, flush=True)
        )
    decision = decide(found)
    code = 0 if stops.reason in (None, Reason.MAX_TIME) else stops.reason.exit_code
    if decision is None:
        print("tune was stopped before it had anything to compare; nothing is written.")
        return code
    command = shlex.join(["python", "-m", "nanogpt_lit", "tune", "--config", config.as_posix(), *settings_of_fit])
    changed = changes(settings, found, decision)
    lines = screen(found, decision, changed)
    header = [f"{command} --budget {budget_s:g}s", f"{datetime.now():%Y-%m-%d}, {hardware()}", "", *lines]
    write_durably(out, tuned_yaml(given, changed, header))
    print("\n".join(["", *lines, "", f"written    {out}"]))
    picture = out.with_suffix(".svg")
    print(f"picture    {picture if draw(found, decision, picture) else 'none: pip install -e .[plot]'}")
    print(f"train      python -m nanogpt_lit fit --config {out}")
    return code


def memory_check(settings: Any, own: Candidate, device: str) -> Callable[[Candidate], bool]:
    """Whether a micro-batch fits: on a GPU as planned; a CPU is given none that is larger than the YAML's."""
    if device != "cuda":
        return lambda candidate: candidate.batch_size <= own.batch_size
    budget, rung = choose_budget(), own_rung(settings)

    def fits(candidate: Candidate) -> bool:
        B, accumulate = candidate.batch_size, candidate.accumulate_grad_batches
        tried = replace(rung, batch_size=B, accumulate_grad_batches=accumulate)
        return plan_rung(settings, tried, budget.gpu).reserved_mib <= budget.usable_mib

    return fits
