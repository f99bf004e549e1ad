"""A run taken down between two steps, and taken up again: the same bits as if it had never stopped."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from nanogpt_lit.checkpoint.run_file import load_run
from nanogpt_lit.checkpoint.state import RunState
from nanogpt_lit.checkpoint.tensor_file import HEADER_DIGEST, TensorFile
from nanogpt_lit.errors import UserError
from nanogpt_lit.loops.contract import Parts
from nanogpt_lit.runtime.process_settings import RandomState, random_state, set_random_state
from nanogpt_lit.runtime.processes import are_several, broadcast, gathered, rank


def capture(
    parts: Parts,
    *,
    step: int,
    batches: int,
    accumulate_grad_batches: int,
    random: list[RandomState],
    data: Mapping[str, Any],
    tokens: int = 0,
    trained_s: float = 0.0,
    validations: Mapping[str, Any] | None = None,
    spikes: Mapping[str, Any] | None = None,
) -> RunState:
    """The state of a run that stands at the end of a step. It holds the run's own tensors, not copies.

    batches: micro-batches of this process so far   random: of all processes   data: TokenDataModule.state_dict()
    """
    return RunState(
        weights=parts.module.state_dict(),
        hyper_parameters=dict(getattr(parts.module, "hparams", {})),
        data={name: value for name, value in data.items() if name != "batches"},
        optimizer=parts.optimizer.state_dict(),
        schedule=parts.schedule.state_dict(),
        scaler=None if parts.scaler is None else parts.scaler.state_dict(),
        random=random,
        step=step,
        batches=batches,
        processes=len(random),
        accumulate_grad_batches=accumulate_grad_batches,
        tokens=tokens,
        trained_s=trained_s,
        validations=validations or {"latest": None, "best": None},
        elastic=dict(getattr(parts.module, "fallback", {})),
        spikes=spikes or {},
    )


def load_together(path: Path | None) -> RunState | None:
    """The checkpoint that the first process goes on from, for all of them: their machines may have no disk in common.

    Who has the same file reads it, the others are sent it. path: the first one's counts; None starts anew
    Raises UserError, on all of them, where the first one cannot read it.
    """
    if not are_several():
        return None if path is None else load_run(path)
    named, digest = broadcast((path is not None, digest_of(path)))
    if not named:
        return None
    state, error = None, None
    if path is not None and (rank() == 0 or digest_of(path) == digest):
        try:
            state = load_run(path)
        except (UserError, OSError) as problem:
            error = str(problem)
    if (error := broadcast(error)) is not None:
        raise UserError(error)
    if not all(gathered(state is not None)):
        sent = broadcast(state if rank() == 0 else None)
        state = state if state is not None else sent
    return state


def digest_of(path: Path | None) -> str | None:
    """Of a checkpoint's header, which holds those of its tensors; None for a file that cannot be read."""
    try:
        return None if path is None else TensorFile(path).metadata[HEADER_DIGEST]
    except (ValueError, OSError):
        return None


def restore(parts: Parts, state: RunState) -> None:
    """Puts a run's state into its parts; the random state follows just before the first batch.

    Empties the state of weights and moments: whoever still holds it would hold them a second time.
    Raises UserError when the checkpoint holds another network.
    """
    check_network(parts.module, state)
    parts.module.load_state_dict(state.weights)
    state.weights.clear()
    chosen = chosen_settings(parts.optimizer)
    parts.optimizer.load_state_dict(state.optimizer)
    state.optimizer.clear()
    parts.schedule.load_state_dict(state.schedule)
    choose_again(parts.optimizer, parts.schedule, chosen)
    if parts.scaler is not None and state.scaler is not None:
        parts.scaler.load_state_dict(state.scaler)


SETTINGS = ("initial_lr", "betas", "eps", "weight_decay", "momentum")
"""What an optimizer keeps beside its state, and the user may have set anew."""


def chosen_settings(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Of each group, before a checkpoint is read into the optimizer and brings its own."""
    return [{name: group[name] for name in SETTINGS if name in group} for group in optimizer.param_groups]


def choose_again(optimizer: Optimizer, schedule: LRScheduler, chosen: list[dict[str, Any]]) -> None:
    """The user's settings win over the checkpoint's. Where they agree, nothing changes by a bit."""
    for group, settings in zip(optimizer.param_groups, chosen, strict=True):
        group.update(settings)
    if isinstance(schedule, LambdaLR):
        schedule.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
        factors = [of_step(schedule.last_epoch) for of_step in schedule.lr_lambdas]
        for group, base, factor in zip(optimizer.param_groups, schedule.base_lrs, factors, strict=True):
            group["lr"] = base * factor
        schedule._last_lr = [group["lr"] for group in optimizer.param_groups]


def check_network(module: nn.Module, state: RunState) -> None:
    """Raises UserError when the checkpoint holds another network, in the words of a LightningModule's own hook."""
    if hasattr(module, "on_load_checkpoint"):
        module.on_load_checkpoint({"hyper_parameters": state.hyper_parameters})  # type: ignore[operator]


def batches_done(state: RunState, module: nn.Module, accumulate_grad_batches: int, processes: int) -> int:
    """Micro-batches that each process is to take as done. Raises UserError where the samples or masks would differ."""
    dropout = max((part.p for part in module.modules() if isinstance(part, nn.Dropout)), default=0.0)
    return state.batches_on(processes, accumulate_grad_batches, dropout)


def random_states(device: torch.device) -> list[RandomState]:
    """Of all processes, by rank. Each of them has to ask."""
    return gathered(random_state(device))


def restore_random_state(states: list[RandomState], rank: int, device: torch.device) -> None:
    """After seed_dropout, which every start calls: a resumed run must not draw its first masks again.

    Without a state for every process, or from another kind of device, the seed stands.
    """
    if rank >= len(states) or device.type not in states[rank]:
        return
    set_random_state(states[rank], device)
