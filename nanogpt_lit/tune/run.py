"""One `tune`: from a YAML to a better one, with the result in words and as a picture."""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]

from nanogpt_lit.cli.settings import SettingsCLI, quiet_lightning
from nanogpt_lit.errors import UserError
from nanogpt_lit.gpt.networks import section_of
from nanogpt_lit.loops.compatibility import keys_of
from nanogpt_lit.loops.trainer_section import asked_processes
from nanogpt_lit.plan.budget import choose_budget
from nanogpt_lit.plan.command import own_rung, plan_rung
from nanogpt_lit.run.overfitting import limited
from nanogpt_lit.run.stops import Reason, Stops
from nanogpt_lit.runtime.clock import awake_s
from nanogpt_lit.runtime.durable import write_durably
from nanogpt_lit.runtime.launch import as_typed
from nanogpt_lit.runtime.machine import hardware
from nanogpt_lit.tune.search import HORIZON, UNITS, Decision, Found, decide, search
from nanogpt_lit.tune.trials import OWN, RECIPES, Candidate, Trials, model_section, recipe_of

COLOURS = ("#33548f", "#e08f3e", "#1e8449")
Changes = dict[str, tuple[Any, Any]]
"""Key as in the YAML to what it was and what it becomes."""


def run(config: Path, settings_of_fit: Sequence[str], budget_s: float, out: Path) -> int:
    """Returns the exit code. The budget begins when the shards are there."""
    quiet_lightning()
    cli = SettingsCLI(args=[f"--config={config}", *settings_of_fit])
    given = yaml.safe_load(cli.parser.dump(cli.config, skip_default=True))
    processes = asked_processes(vars(cli.settings.trainer))
    if processes is not None and processes > 1:
        raise UserError(f"trainer.devices asks for {processes} processes and tune measures one; --trainer.devices=1.")
    for key, does in (
        ("resume", "goes on with a run"),
        ("init_from", "begins with a trained model"),
        ("teachers", "learns from trained models"),
    ):
        if cli.settings.get(key) is not None:
            raise UserError(
                f"{key}={cli.settings[key]} {does}, and tune measures runs that learn from the text alone, from "
                "step 0; leave it out."
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
    command = as_typed(["python", "-m", "nanogpt_lit", "tune", "--config", config.as_posix(), *settings_of_fit])
    changed = changes(settings, found, decision)
    by_rule = limited_changes(settings, trials, found, decision, changed)
    changed |= by_rule
    lines = screen(found, decision, changed, by_rule)
    header = [f"{command} --budget {budget_s:g}s", f"{datetime.now():%Y-%m-%d}, {hardware()}", "", *lines]
    write_durably(out, tuned_yaml(given, changed, header))
    print("\n".join(["", *lines, "", f"written    {out}"]))
    picture = out.with_suffix(".svg")
    drawn = draw(found, decision, picture)
    print("picture   ", picture if drawn else 'none: pip install "nanogpt_lit[plot]"')
    print(f"train      python -m nanogpt_lit fit --config {out}")
    return code


def memory_check(settings: Any, own: Candidate, device: str) -> Callable[[Candidate], bool]:
    """The check that a micro-batch fits: on a GPU as planned; a CPU is given none that is larger than the YAML's."""
    if device != "cuda":
        return lambda candidate: candidate.batch_size <= own.batch_size
    budget, rung = choose_budget(), own_rung(settings)

    def fits(candidate: Candidate) -> bool:
        B, accumulate = candidate.batch_size, candidate.accumulate_grad_batches
        tried = replace(rung, batch_size=B, accumulate_grad_batches=accumulate)
        return plan_rung(settings, tried, budget.gpu).reserved_mib <= budget.usable_mib

    return fits


def changes(settings: Any, found: Found, decision: Decision) -> Changes:
    """The changes to the YAML, with as many steps as take the time of its run; none where its values stay."""
    own, proposed, trainer = found.own, decision.proposed, settings.trainer
    if proposed == own:
        return {}
    model = model_section(settings.model, own, proposed)
    wanted = keys_of("model", model)
    steps = max(1, round(found.run_s / found.step_s(proposed)))
    interval = trainer.val_check_interval
    if isinstance(interval, int):
        validations = max(1, found.max_steps * own.accumulate_grad_batches // interval)
        between = max(1, round(steps / validations))
        steps = validations * between
        wanted["trainer.val_check_interval"] = between * proposed.accumulate_grad_batches
    if isinstance(trainer.limit_val_batches, int) and trainer.limit_val_batches:
        sequences = trainer.limit_val_batches * own.batch_size
        wanted["trainer.limit_val_batches"] = max(1, round(sequences / proposed.batch_size))
    wanted["trainer.max_steps"] = steps
    wanted["trainer.accumulate_grad_batches"] = proposed.accumulate_grad_batches
    wanted["data.batch_size"] = proposed.batch_size
    wanted["model.schedule.warmup_steps"] = round(settings.model.schedule["warmup_steps"] * steps / found.max_steps)
    wanted.pop("model.schedule.total_steps")  # from trainer.max_steps
    section = f"model.{section_of(model)}"
    for name in ("block_size", "document_start", "document_end"):  # from data
        del wanted[f"{section}.{name}"]
    return {key: (settings[key], value) for key, value in wanted.items() if settings[key] != value}


def limited_changes(settings: Any, trials: Trials, found: Found, decision: Decision, changed: Changes) -> Changes:
    """The recipe `limited` where the proposed run reads its text too often, which its short runs do not show."""
    _, steps = changed.get("trainer.max_steps", (None, found.max_steps))
    with torch.device("meta"):
        module = trials.build(decision.proposed, steps)
    windows = trials.data.n_windows
    readings = steps * decision.proposed.sequences / windows
    recipe = limited(module.gpt, readings, steps, windows * trials.data.block_size, module.optim_config)
    return {key: (settings[key], value) for key, value in recipe.items()}


def screen(found: Found, decision: Decision, changed: Changes, by_rule: Changes) -> list[str]:
    """The recommendation, by how much it is better, and how sure that is, in lines for a terminal.

    by_rule: those of the changes that were not measured
    """
    lines = ["Keep your values: nothing that was tried is better for sure."]
    if changed:
        width = max(map(len, changed))
        lines = [f"{'recommended':<{width}}  {'yours':>12}  {'tuned':>12}"]
        lines += [f"{key:<{width}}  {short(old):>12}  {short(new):>12}" for key, (old, new) in changed.items()]
    if by_rule:
        lines.append("")
        lines.append(
            "Your run will read its text so often that it would learn it by heart, which short runs do not show:"
        )
        lines.append(f"{' and '.join(by_rule)} by the rule of the recipe limited (docs/recipes.md), not measured here.")
    lines.append("")
    given_s, challenger = decision.given_s, decision.challenger
    if decision.gains:
        final = [run for run in found.runs if run.round == len(UNITS)]
        seeds = {run.seed for run in final if run.candidate == found.own}  # the last pair may have been cut short
        losses = {
            candidate: statistics.mean(run.loss for run in final if run.candidate == candidate and run.seed in seeds)
            for candidate in (found.own, challenger)
        }
        lines.append(f"validation loss after {given_s:.3g} s: {losses[challenger]:.4f}, yours {losses[found.own]:.4f}")
        each = ", ".join(f"{gain:+.4f}" for gain in decision.gains)
        lines.append(f"better by {statistics.mean(decision.gains):.4f}; by seed, on seeds that chose nothing: {each}")
        lines.append(f"compared: {challenger}")
    lines.append(
        {
            True: "sure: the gain is more than the seeds make (95 %)",
            False: "not sure: the gain is within what the seeds make, so your values stay",
            None: f"not sure: stopped before it was compared over seeds; the best so far is {challenger}",
        }[decision.sure]
    )
    share = min(1.0, given_s / found.run_s)
    if share < 1:
        lines.append(
            f"Measured over {share:.1%} of your run's {found.run_s:,.0f} s; what helps early may help less later."
        )
    if share < 1 and changed:
        lines.append(f"The best rate was {challenger.lr:.2g}. It falls with a run's tokens to the {HORIZON}th power")
        lines.append(
            "(Bjorck et al., arXiv:2409.19913), so a longer run gets a lower one, or yours where that is between."
        )
    diverged = sum(math.isinf(run.loss) for run in found.runs)
    lines.append(f"{len(found.runs)} runs in {found.elapsed_s:,.0f} s, {diverged} of them diverged")
    return lines


def tuned_yaml(given: Mapping[str, Any], changed: Changes, header: Sequence[str]) -> str:
    """The tuned YAML with comments. given: the settings of the YAML and the command line"""
    whole: dict[str, Any] = yaml.safe_load(yaml.safe_dump(dict(given), sort_keys=False)) or {}
    for key, (_, value) in changed.items():
        *sections, name = key.split(".")
        section = whole
        for each in sections:
            section = section.setdefault(each, {})
        section[name] = value
    comments = {key: f"was {short(old)}" for key, (old, _) in changed.items()}
    return "\n".join([*(f"# {line}".rstrip() for line in header), *_lines(whole, comments), ""])


def _lines(section: Mapping[str, Any], comments: Mapping[str, str], prefix: str = "") -> Iterator[str]:
    indent = "  " * prefix.count(".")
    for key, value in section.items():
        if isinstance(value, Mapping) and value:
            yield f"{indent}{key}:"
            yield from _lines(value, comments, f"{prefix}{key}.")
        else:
            line = f"{indent}{key}: {_scalar(value)}"
            comment = comments.get(f"{prefix}{key}")
            yield f"{line:<34}# {comment}" if comment else line


def _scalar(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("...").strip()


def short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else _scalar(value)


def draw(found: Found, decision: Decision, path: Path) -> bool:
    """Draw the picture. Returns False without matplotlib, which is an extra."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    by_rate, by_time = figure.subplots(1, 2)
    recipes = list(dict.fromkeys(run.candidate.recipe for run in found.runs))
    for recipe, colour in zip(recipes, COLOURS, strict=False):
        for round, style in ((1, "o--"), (2, "s-")):
            ranked = [run for run in found.ranking(round) if run.candidate.recipe == recipe]
            points = sorted((run.candidate.lr, run.loss) for run in ranked)
            if points:
                label = f"{recipe}, {ranked[0].given_s:.3g} s"
                by_rate.plot(*zip(*points, strict=True), style, color=colour, label=label, markersize=4)
    for run in found.runs:
        if math.isinf(run.loss):
            by_rate.axvline(run.candidate.lr, color="#c0392b", alpha=0.2)
    by_rate.axvline(found.own.lr, color="#999999", linestyle=":", label="yours")
    by_rate.set(xscale="log", xlabel="learning rate", title="validation loss of short runs; red: diverged")
    final = [run for run in found.runs if run.round == len(UNITS)]
    for run in final:
        is_own = run.candidate == found.own
        window = max(1, len(run.curve) // 50)
        smooth = [sum(run.curve[n : n + window]) / window for n in range(0, len(run.curve) - window + 1, window)]
        seconds = [(n + 1) * window * run.given_s / max(1, run.steps) for n in range(len(smooth))]
        name = "yours" if is_own else str(decision.challenger)
        colour = "#999999" if is_own else "#33548f"
        by_time.plot(
            seconds, smooth, color=colour, alpha=0.6, linewidth=1, label=name if run.seed == final[0].seed else None
        )
        if math.isfinite(run.loss):
            by_time.plot(run.given_s, run.loss, "D", color=colour, markersize=5)
    by_time.set(xlabel="seconds", title="the last comparison: training, and validation (diamonds)")
    for axes in (by_rate, by_time):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:  # a search that was stopped early has no last comparison
            axes.legend(fontsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return True
