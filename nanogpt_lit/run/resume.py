"""A run in several processes, each of which goes on where the one before it ended, to the same bits.

The state of a run is taken down between two steps and taken up again; its folder keeps the settings of every process.
"""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from nanogpt_lit.checkpoint.shards import sweep_shards
from nanogpt_lit.checkpoint.state import RunState, UnreadRun
from nanogpt_lit.errors import UserError
from nanogpt_lit.loops.contract import Observer, Training
from nanogpt_lit.memory.techniques import OLD_NAMES
from nanogpt_lit.optim.schedule import ScheduleConfig, warmup_decay
from nanogpt_lit.run.guards import SpikeGuard
from nanogpt_lit.run.metrics import StepMetrics
from nanogpt_lit.run.stops import STOP_FILE
from nanogpt_lit.runtime.durable import PARTIAL, sweep, write_durably
from nanogpt_lit.runtime.process_settings import RandomState, random_state
from nanogpt_lit.runtime.processes import gathered
from nanogpt_lit.untrusted.yaml_file import load_yaml_file


class Resume(Observer):
    """Observer that goes on where a checkpoint left off, before any other looks at the training. Empties the state.

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
    chosen = chosen_settings(training.optimizer)
    if isinstance(state, UnreadRun):
        from nanogpt_lit.checkpoint.sharded_network import load_into  # late, for few runs are sharded

        load_into(state, training.module, training.optimizer)
    else:
        training.module.load_state_dict(state.weights)
        state.weights.clear()
        training.optimizer.load_state_dict(state.optimizer)
        state.optimizer.clear()
    training.schedule.load_state_dict(state.schedule)
    choose_again(training.optimizer, training.schedule, chosen)
    if hasattr(training.module, "fallback"):
        training.module.fallback = dict(state.elastic)  # type: ignore[assignment]  # of a run whose memory has ended (memory/elastic.py)
    if training.scaler is not None and state.scaler is not None:
        training.scaler.load_state_dict(state.scaler)


SETTINGS = ("initial_lr", "betas", "eps", "weight_decay", "momentum")
"""Settings that an optimizer keeps beside its state, and that the user may have set anew."""


def chosen_settings(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The settings of each group, before a checkpoint is read into the optimizer and brings its own."""
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
    """Check the network by a LightningModule's own hook. Raises UserError when the checkpoint holds another."""
    if hasattr(module, "on_load_checkpoint"):
        module.on_load_checkpoint({"hyper_parameters": state.hyper_parameters})  # type: ignore[operator]


def batches_done(state: RunState, module: nn.Module, accumulate_grad_batches: int, processes: int) -> int:
    """Micro-batches that each process is to take as done. Raises UserError where the samples or masks would differ."""
    dropout = max((part.p for part in module.modules() if isinstance(part, nn.Dropout)), default=0.0)
    return state.batches_on(processes, accumulate_grad_batches, dropout)


def random_state_of(states: list[RandomState], rank: int, device: torch.device) -> RandomState | None:
    """The random state of one process; None without one for every process, or with those of another kind of device."""
    if rank >= len(states) or device.type not in states[rank]:
        return None
    return states[rank]


# The run's folder.

OF_ONE_PROCESS = ("ckpt_path", "resume")


def keep_config(run_folder: Path, config: str) -> None:
    """Write the configuration of a process, YAML: config.yaml of a run's first, config_2.yaml of the second."""
    write_durably(run_folder / config_file(run_folder), config)


def config_file(run_folder: Path) -> str:
    highest = max((number_of(path) for path in run_folder.glob("config*.yaml")), default=0)
    return f"config_{highest + 1}.yaml" if highest else "config.yaml"


def number_of(config: Path) -> int:
    """1 of config.yaml, n of config_n.yaml, 0 of another file."""
    number = config.stem.removeprefix("config_")
    return 1 if config.stem == "config" else int(number) if number.isdecimal() else 0


def latest_config(run_folder: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """The configuration of the process before this one, and a sentence for each newer one that cannot be read.

    None where there is none: it is only read to say what has changed.
    """
    remarks = []
    for path in sorted(run_folder.glob("config*.yaml"), key=number_of, reverse=True):
        if not number_of(path):
            continue
        try:
            kept = load_yaml_file(path)
        except UserError as error:
            remarks.append(f"{str(error).rstrip('.')}; it is passed over.")
            continue
        if isinstance(kept, dict):
            return kept, remarks
        remarks.append(f"{path} holds no settings, and is passed over.")
    return None, remarks


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Lines on what a process has set differently from the one before it."""
    was, is_now = flat(before), flat(now)
    return [
        f"{key}: {was[key]} before, {value} from here on"
        for key, value in is_now.items()
        if key in was and meaning(was[key]) != meaning(value) and key not in OF_ONE_PROCESS
    ]


def rate_change(before: Mapping[str, Any], now: Mapping[str, Any], step: int) -> str | None:
    """Describe what another trainer.max_steps does to the learning rate from `step` on; None where it is the same."""
    try:
        (was, old_steps), (rate, steps) = (planned_rate(settings, step) for settings in (before, now))
        end = planned_rate(now, steps - 1)[0]
    except (KeyError, TypeError, ValueError):  # settings of another version
        return None
    if steps == old_steps:
        return None
    return (
        f"the learning rate now decays over {steps:,} steps, not {old_steps:,}: from step {step:,} on it is {rate:.3g} "
        f"where it would have been {was:.3g}, and it ends at {end:.3g}"
    )


def planned_rate(settings: Mapping[str, Any], step: int) -> tuple[float, int]:
    """The learning rate after `step` steps, and the steps of the run."""
    model, steps = settings["model"], settings["trainer"]["max_steps"]
    schedule = ScheduleConfig(**{**model["schedule"], "total_steps": steps})
    return model["optim"]["lr"] * warmup_decay(step, schedule), steps


def tidied(run_folder: Path, checkpoints: Path) -> list[str]:
    """Removes what writes that were cut short left in `checkpoints`. Returns a sentence for each thing in the way."""
    sweep(checkpoints)
    sweep_shards(checkpoints)
    strays = [f"{path} is a folder, and is passed over" for path in sorted(checkpoints.glob(f"*{PARTIAL}"))]
    if (run_folder / STOP_FILE).is_dir():
        strays.append(f"{run_folder / STOP_FILE} is a folder, and is passed over: a file of that name stops the run")
    return strays


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def meaning(value: Any) -> Any:
    """Normalise a value: a null key of a callback is as good as one left out, an old name as the new one."""
    if isinstance(value, Mapping):
        return {key: meaning(its) for key, its in value.items() if its is not None}
    if isinstance(value, list):
        return [meaning(its) for its in value]
    return OLD_NAMES.get(value, value) if isinstance(value, str) else value


def claim_folder(root: Path, name: str) -> Path:
    """Make root/name_N, of the next N, for this process alone: two that start at the same moment get two folders."""
    root.mkdir(parents=True, exist_ok=True)
    while True:
        folder = next_folder(root, name)
        with suppress(FileExistsError):
            folder.mkdir()
            return folder


def next_folder(root: Path, name: str) -> Path:
    """root/name_N with the first N that is free and above all that are there, as Lightning numbers its versions."""
    taken = [path.name.removeprefix(f"{name}_") for path in root.glob(f"{name}_*") if path.is_dir()]
    return root / f"{name}_{max((int(n) for n in taken if n.isdigit()), default=-1) + 1}"
