"""One `forecast`: from a YAML to what its run will reach, in words and as a picture."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from nanogpt_lit.checkpoint.state import bits_per_byte
from nanogpt_lit.cli.settings import SettingsCLI, quiet_lightning
from nanogpt_lit.data.shards import TokenShards, val_tokens_per_byte
from nanogpt_lit.errors import UserError
from nanogpt_lit.forecast.law import LEAST_RUNS, Forecast, Law, NoLawError, Point, law_of
from nanogpt_lit.forecast.pairs import UNLIKE, loss_of_pairs, unlikeness
from nanogpt_lit.forecast.picture import draw
from nanogpt_lit.forecast.sizes import Sized, SizedRuns, choose, family, nearest
from nanogpt_lit.loops.trainer_section import asked_processes
from nanogpt_lit.run.stops import Reason, Stops, seconds_of
from nanogpt_lit.runtime.clock import awake_s
from nanogpt_lit.tune.short_runs import SPEED_STEPS

READINGS = 4
"""Times that a text teaches about as much as a fresh one: Muennighoff et al. (arXiv:2305.16264)."""
MEASURING = 0.1
"""Share of the budget within which the run's whole steps are measured; of longer ones, a micro-batch."""
VALIDATION = 0.02
"""Largest share of the budget that a validation of the YAML's network would take."""
OFFERED = 5
"""Rows of the table of sizes."""


@dataclass(frozen=True)
class Speed:
    """Seconds of an optimizer step: a part that every step has, and one that grows with its operations."""

    every_step_s: float
    flop_s: float
    val_batches: int
    """Batches of a validation of the runs that are made."""
    val_tokens: int
    """In those batches."""

    def step_s(self, run: Sized) -> float:
        return self.every_step_s + self.flop_s * run.step_tokens * run.flops_per_token

    def seconds(self, run: Sized) -> float:
        """Seconds of a run with one validation, of which a batch takes a third of a step's operations."""
        validation_s = self.val_batches * self.every_step_s + self.flop_s * self.val_tokens * run.flops_per_token
        return run.steps * self.step_s(run) + validation_s / 3


@dataclass(frozen=True)
class Offer:
    """A network for the hours there are, and what it would reach."""

    run: Sized
    forecast: Forecast
    better: float
    """Share of the laws by which it ends lower than the YAML's network does in these hours."""


def run(
    config: Path, settings_of_fit: Sequence[str], budget_s: float, hours: float | None, picture: Path | None
) -> int:
    """Returns the exit code. The budget begins when the shards are there.

    Raises UserError where it can be said beforehand that a forecast cannot know.
    """
    quiet_lightning()
    cli = SettingsCLI(args=[f"--config={config}", *settings_of_fit])
    check_beginning(cli.settings)
    cli.complete_settings()
    settings = cli.settings
    check_kind(settings)
    with Stops(None, budget_s, awake_s) as stops:
        began_s = awake_s()
        runs = SizedRuns(settings, cli.device, awake_s, stops.between_steps)
        own, unique = runs.own, len(TokenShards.open(runs.data.folder, "train"))
        check_readings(own, unique)
        check_text(unlikeness(runs.data.folder, runs.data.vocab_size))
        speed = measured_speed(runs, budget_s)
        chosen = choose(own, speed.seconds, budget_s - (awake_s() - began_s))
        check_budget(own, chosen, speed, budget_s)
        made = trained(runs, chosen, speed, budget_s - (awake_s() - began_s))
    code = 0 if stops.reason in (None, Reason.MAX_TIME) else stops.reason.exit_code
    pairs = loss_of_pairs(runs.data.folder, runs.data.vocab_size)
    try:
        law = law_of([Point(run.parameters, run.tokens, loss) for run, loss in made.items()], pairs)
    except NoLawError as reason:
        print(f"cannot know: {reason}")
        return code
    said, own_hours = law.forecast(own.parameters, own.tokens), hours_of(runs, speed)
    hours = hours or own_hours
    offers = offered(law, own, speed, hours, READINGS * unique)
    tokens_per_byte = val_tokens_per_byte(runs.data.folder, runs.data.tokenizer)
    lines = screen(
        said,
        tokens_per_byte,
        own_hours,
        own.flops / max(run.flops for run in made),
        seconds_of(settings.trainer.max_time),
    )
    print("\n".join(["", *lines, "", *table(offers, own, hours)]))
    path = picture or Path(settings.trainer.default_root_dir) / "forecast.svg"
    drawn = draw(own, law.points, said, [(offer.run.parameters, offer.forecast) for offer in offers], hours, path)
    print("\npicture   ", path if drawn else 'none: pip install "nanogpt_lit[plot]"')
    return code


# What a forecast cannot know.


def check_beginning(settings: Any) -> None:
    """Raises UserError for a run that needs other models, before they are fetched, and for one of several processes."""
    for key, does in (
        ("resume", "goes on with a run"),
        ("init_from", "begins with a trained model"),
        ("teachers", "learns from trained models"),
    ):
        if settings.get(key) is not None:
            raise UserError(
                f"{key}={settings[key]} {does}, and what that brings cannot be known from smaller networks, which "
                "learn from the text alone, from step 0; leave it out."
            )
    processes = asked_processes(vars(settings.trainer))
    if processes is not None and processes > 1:
        raise UserError(
            f"trainer.devices asks for {processes} processes and forecast measures one; --trainer.devices=1."
        )


def check_kind(settings: Any) -> None:
    """Raises UserError for a run of a kind that smaller ones say nothing about."""
    if (optimizer := settings.model.optim["class_path"]) is not None:
        raise UserError(
            f"model.optim.class_path={optimizer}: how its learning rate follows the size of a network cannot be known "
            "here; model.optim.class_path=null is AdamW, of which it is."
        )
    if settings.data.documents == "conversations":
        raise UserError(
            "data.documents=conversations learns answers alone, whose loss cannot be known from a law of text; joined "
            "and separate can be forecast."
        )


def check_readings(own: Sized, unique: int) -> None:
    """Raises UserError for a run that may overfit.   unique: tokens of the training part"""
    if own.tokens <= READINGS * unique:
        return
    steps = int(READINGS * unique / own.step_tokens)
    raise UserError(
        f"trainer.max_steps={own.steps} reads the {unique:,} tokens of the text {own.tokens / unique:.1f} times, and "
        f"how far that overfits cannot be known from shorter runs; {READINGS} times can be forecast: "
        f"--trainer.max_steps={steps}, or more text."
    )


def check_text(unlike: float) -> None:
    """Raises UserError for a text of which another kind is validated on than is trained on."""
    if unlike > UNLIKE:
        raise UserError(
            "data.source: the part that is validated on is unlike the rest: by pairs of tokens each half of it "
            f"foretells the other {unlike:.0%} better than the rest does, and how fast a network learns that cannot be "
            "known from shorter runs. Of few documents it is their ends, and of many some whole ones: split the text "
            "into more files."
        )


def check_budget(own: Sized, chosen: Sequence[Sized], speed: Speed, budget_s: float) -> None:
    """Raises UserError where there are too few runs to fit a law to."""
    if len(chosen) >= LEAST_RUNS:
        return
    wanted_s = budget_s
    while wanted_s < 1000 * budget_s and len(choose(own, speed.seconds, wanted_s)) < LEAST_RUNS:
        wanted_s *= 1.5
    if wanted_s < 1000 * budget_s:
        raise UserError(
            f"--budget={budget_s:g}s is too short to know anything: a step of this network takes "
            f"{speed.step_s(own):.2g} s here, and a law of {LEAST_RUNS} runs needs --budget "
            f"{math.ceil(wanted_s / 60)}min."
        )
    raise UserError(
        f"trainer.max_steps={own.steps} is so short that smaller runs are still warming up, and nothing can be known "
        "from them; train it: that takes no longer than a forecast."
    )


# The runs.


def measured_speed(runs: SizedRuns, budget_s: float) -> Speed:
    """The speed of the YAML's own network and of a small one, which tells apart what every step takes."""
    own, batch_tokens = runs.own, runs.data.batch_size * runs.own.network.block_size
    small = replace(nearest(own, 0.01), batch_size=1, accumulate_grad_batches=1)
    small_s = runs.speeds([small], 0.0)[small]
    small_flops, own_flops = (run.step_tokens * run.flops_per_token for run in (small, own))
    # At most: as if the small step were nothing but operations.
    is_short = SPEED_STEPS * small_s * own_flops / small_flops < MEASURING * budget_s
    together = 1 if is_short else own.accumulate_grad_batches
    measured = replace(own, accumulate_grad_batches=own.accumulate_grad_batches // together)
    own_s = together * runs.speeds([measured], 0.0)[measured]
    flop_s = max(0.0, own_s - small_s) / max(1, own_flops - small_flops)
    pass_s = max(1e-9, flop_s * batch_tokens * own.flops_per_token / 3)
    val_batches = max(1, min(runs.val_batches, int(VALIDATION * budget_s / pass_s)))
    if val_batches < runs.val_batches:
        print(f"validation: the first {val_batches:,} of its {runs.val_batches:,} batches", flush=True)
    return Speed(max(0.0, own_s - flop_s * own_flops), flop_s, val_batches, val_batches * batch_tokens)


def trained(runs: SizedRuns, chosen: Sequence[Sized], speed: Speed, budget_s: float) -> dict[Sized, float]:
    """The losses of the runs that there is time for; infinite where one diverged."""
    expected_s = [speed.seconds(run) for run in chosen]
    print(f"{len(chosen)} runs of {expected_s[0]:.2g} s to {expected_s[-1]:.2g} s", flush=True)
    losses: dict[Sized, float] = {}
    began_s = awake_s()
    for n, run in enumerate(chosen):
        slower = (awake_s() - began_s) / sum(expected_s[:n]) if n else 1.0
        if n and awake_s() - began_s + slower * expected_s[n] > budget_s:
            print(f"  no time for {len(chosen) - n} more", flush=True)
            break
        result = runs.run(run, run.steps, runs.data.seed + n, speed.val_batches)
        if result is None:  # Ctrl-C, or the budget
            break
        losses[run] = result[0]
        print(f"  {run}: {f'{result[0]:.4f}' if math.isfinite(result[0]) else 'diverged'}", flush=True)
    return losses


def hours_of(runs: SizedRuns, speed: Speed) -> float:
    """Hours of the YAML's run, with its validations."""
    own, trainer = runs.own, runs.settings.trainer
    interval = trainer.val_check_interval
    validates = isinstance(interval, int) and trainer.limit_val_batches != 0
    validations = own.steps * own.accumulate_grad_batches // interval if validates else 0
    batches = validations * runs.val_batches / own.accumulate_grad_batches / 3
    return (own.steps + batches) * speed.step_s(own) / 3600


def offered(law: Law, own: Sized, speed: Speed, hours: float, most_tokens: float) -> list[Offer]:
    """Networks of the family, each with the tokens that it reads in these hours, of which `most_tokens` count."""

    def run_of(network: Sized) -> Sized:
        run = replace(network, batch_size=own.batch_size, accumulate_grad_batches=own.accumulate_grad_batches)
        steps = int(min(3600 * hours / speed.step_s(run), most_tokens / run.step_tokens))
        return replace(run, steps=max(1, steps))

    smallest = min(point.parameters for point in law.points)
    found = [run_of(network) for network in (*family(own.network), own) if network.parameters >= smallest]
    found = sorted(set(found), key=lambda run: run.parameters)
    yours = law.losses(own.parameters, run_of(own).tokens)
    return [
        Offer(
            run,
            law.forecast(run.parameters, run.tokens),
            float(np.mean(law.losses(run.parameters, run.tokens) < yours)),
        )
        for run in found
    ]


# What it says.


def screen(
    said: Forecast, tokens_per_byte: float | None, hours: float, larger: float, max_time_s: float | None
) -> list[str]:
    """The forecast in lines for a terminal.   larger: times the work of the largest run that was made"""
    rows = [("validation loss", said.loss, said.low, said.high)]
    if tokens_per_byte is not None:
        low, loss, high = (bits_per_byte(value, tokens_per_byte) for value in (said.low, said.loss, said.high))
        rows.append(("bits per byte", loss, low, high))
    lines = [f"{'':<15}  {'forecast':>9}  9 times in 10"]
    lines += [f"{name:<15}  {loss:>9.4f}  {low:.4f} to {high:.4f}" for name, loss, low, high in rows]
    lines += [f"{'hours':<15}  {hours:>9.3g}  as its steps take now", ""]
    lines.append(f"The run is {larger:,.0f} times the work of the largest that was made.")
    if max_time_s is not None and max_time_s < 3600 * hours:
        lines.append("trainer.max_time ends it earlier, at a loss that cannot be known: its schedule is not over then.")
    return lines


def table(offers: Sequence[Offer], own: Sized, hours: float) -> list[str]:
    """Networks around the best for the hours there are."""
    best = min(offers, key=lambda offer: offer.forecast.loss)
    shown = {round(n): None for n in np.linspace(0, len(offers) - 1, OFFERED)}
    rows = [offers[n] for n in shown]
    rows += [offer for offer in offers if offer not in rows and (offer is best or offer.run.network == own.network)]
    lines = [f"In {hours:.3g} hours:", f"{'layers x channels':>17}  {'weights':>13}  {'tokens':>15}  validation loss"]
    for offer in sorted(rows, key=lambda offer: offer.run.parameters):
        network, said = offer.run.network, offer.forecast
        mark = "  yours" if network == own.network else ""
        lines.append(
            f"{f'{network.n_layer} x {network.n_embd}':>17}  {offer.run.parameters:>13,}  {offer.run.tokens:>15,}  "
            f"{said.loss:.4f}, from {said.low:.4f} to {said.high:.4f}{'  best' if offer is best else ''}{mark}"
        )
    network = best.run.network
    if network == own.network:
        return [*lines, "best: yours"]
    lines.append(f"best: {network.n_layer} layers of {network.n_embd} channels for {best.run.steps:,} steps")
    lines.append(f"By {best.better:.0%} of the laws that fit it ends lower than yours.")
    return lines
