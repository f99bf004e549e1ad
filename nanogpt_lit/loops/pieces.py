"""A run in several pieces, each a process that went on where the one before it ended: the settings of each are kept."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

OF_ONE_PIECE = ("ckpt_path", "resume")


def config_file(run_folder: Path) -> str:
    """config.yaml for the first piece of a run, config_2.yaml for the second."""
    kept = config_files(run_folder)
    return f"config_{len(kept) + 1}.yaml" if kept else "config.yaml"


def config_files(run_folder: Path) -> list[Path]:
    """In the order in which they were written."""
    found = list(run_folder.glob("config_*.yaml"))
    numbered = sorted((path for path in found if path.stem[7:].isdigit()), key=lambda path: int(path.stem[7:]))
    first = run_folder / "config.yaml"
    return [first, *numbered] if first.is_file() else numbered


def changed_settings(run_folder: Path, now: str) -> list[str]:
    """What this piece has set differently from the one before it, a line each. now: its configuration, YAML"""
    kept = config_files(run_folder)
    if not kept:
        return []
    before = flat(yaml.safe_load(kept[-1].read_text(encoding="utf-8")) or {})
    after = flat(yaml.safe_load(now) or {})
    return [
        f"{key}: {before[key]} before, {value} from here on"
        for key, value in after.items()
        if key in before and without_nulls(before[key]) != without_nulls(value) and key not in OF_ONE_PIECE
    ]


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
