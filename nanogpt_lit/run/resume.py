"""A run taken down between two steps, and taken up again: the same bits as if it had never stopped."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from nanogpt_lit.checkpoint.state import RunState
from nanogpt_lit.loops.contract import Observer, Training
from nanogpt_lit.run.metrics import StepMetrics
from nanogpt_lit.run.spikes import SpikeGuard
from nanogpt_lit.runtime.process_settings import RandomState, random_state
from nanogpt_lit.runtime.processes import gathered


class Resume(Observer):
    """Goes on with a run where its checkpoint left it, before anybody else looks at it. Empties the state.

    Not under Lightning, whose Trainer reads a checkpoint itself.
    """

    def __init__(self, state: RunState) -> None:
        self._state = state

    def on_train_start(self, training: Training) -> None:
        state, settings = self._state, training.settings
        restore(training, state)
        training.step = state.step
        training.batches = batches_done(state, training.module, settings.accumulate_grad_batches, training.processes)
        training.random = random_state_of(state.random, training.rank, training.device)


def capture(
    training: Training,
    data: Mapping[str, Any],
    metrics: StepMetrics | None = None,
    spikes: SpikeGuard | None = None,
) -> RunState:
    """The state of a run that stands at the end of a step. It holds the run's own tensors, not copies.

    Of several processes all ask together: each has a random state.   data: TokenDataModule.state_dict()
    """
    random = gathered(random_state(training.device))
    return RunState(
        weights=training.module.state_dict(),
        hyper_parameters=dict(getattr(training.module, "hparams", {})),
        data={name: value for name, value in data.items() if name != "batches"},
        optimizer=training.optimizer.state_dict(),
        schedule=training.schedule.state_dict(),
        scaler=None if training.scaler is None else training.scaler.state_dict(),
        random=random,
        step=training.step,
        batches=training.batches,
        processes=len(random),
        accumulate_grad_batches=training.settings.accumulate_grad_batches,
        elastic=dict(getattr(training.module, "fallback", {})),
        spikes={} if spikes is None else spikes.state_dict(),
        **(metrics.state_dict() if metrics is not None else {}),
    )


def restore(training: Training, state: RunState) -> None:
    """Puts a run's state into its training.

    Empties the state of weights and moments: whoever still holds it would hold them a second time.
    Raises UserError when the checkpoint holds another network.
    """
    check_network(training.module, state)
    training.module.load_state_dict(state.weights)
    state.weights.clear()
    chosen = chosen_settings(training.optimizer)
    training.optimizer.load_state_dict(state.optimizer)
    state.optimizer.clear()
    training.schedule.load_state_dict(state.schedule)
    choose_again(training.optimizer, training.schedule, chosen)
    if hasattr(training.module, "fallback"):
        training.module.fallback = dict(state.elastic)  # type: ignore[assignment]  # of a run whose memory has ended (memory/elastic.py)
    if training.scaler is not None and state.scaler is not None:
        training.scaler.load_state_dict(state.scaler)


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


def random_state_of(states: list[RandomState], rank: int, device: torch.device) -> RandomState | None:
    """A process's own; None without a state for every process, or with those of another kind of device."""
    if rank >= len(states) or device.type not in states[rank]:
        return None
    return states[rank]
