"""A run in several pieces, each a process that went on where the one before it ended: the settings of each are kept."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from nanogpt_lit.errors import UserError
from nanogpt_lit.optim.schedule import ScheduleConfig, warmup_decay
from nanogpt_lit.run.stops import STOP_FILE
from nanogpt_lit.runtime.durable import PARTIAL, sweep, write_durably
from nanogpt_lit.untrusted.yaml_file import load_yaml_file

OF_ONE_PIECE = ("ckpt_path", "resume")


def keep_config(run_folder: Path, config: str) -> None:
    """Writes the configuration of a piece, YAML: config.yaml for the first of a run, config_2.yaml for the second."""
    write_durably(run_folder / config_file(run_folder), config)


def config_file(run_folder: Path) -> str:
    highest = max((number_of(path) for path in run_folder.glob("config*.yaml")), default=0)
    return f"config_{highest + 1}.yaml" if highest else "config.yaml"


def number_of(config: Path) -> int:
    """1 of config.yaml, n of config_n.yaml, 0 of another file."""
    number = config.stem.removeprefix("config_")
    return 1 if config.stem == "config" else int(number) if number.isdecimal() else 0


def latest_config(run_folder: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """The configuration of the piece before this one, and a sentence for each newer one that cannot be read.

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
    """What a piece has set differently from the one before it, a line each."""
    was, is_now = flat(before), flat(now)
    return [
        f"{key}: {was[key]} before, {value} from here on"
        for key, value in is_now.items()
        if key in was and without_nulls(was[key]) != without_nulls(value) and key not in OF_ONE_PIECE
    ]


def rate_change(before: Mapping[str, Any], now: Mapping[str, Any], step: int) -> str | None:
    """What another trainer.max_steps does to the learning rate from `step` on; None where it is the same."""
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


def without_nulls(value: Any) -> Any:
    """A key of a callback or a logger that is null means the same as one left out, and the parser writes either."""
    if isinstance(value, Mapping):
        return {key: without_nulls(its) for key, its in value.items() if its is not None}
    return [without_nulls(its) for its in value] if isinstance(value, list) else value


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
