"""All that the doctor looks at, in the order that it tells it."""

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from nanogpt_lit.doctor.card import check_card
from nanogpt_lit.doctor.checkpoints import check_checkpoints, check_strays, largest_checkpoint
from nanogpt_lit.doctor.disk import check_disk
from nanogpt_lit.doctor.finding import Finding
from nanogpt_lit.doctor.packages import check_packages
from nanogpt_lit.doctor.processor import check_processor
from nanogpt_lit.doctor.shards import check_shards
from nanogpt_lit.doctor.sleep import check_sleep
from nanogpt_lit.errors import UserError
from nanogpt_lit.untrusted.yaml_file import load_yaml_file

RUN_SETTINGS = "config*.yaml"
"""What fit keeps of its settings in the folder of a run."""
NUMBERED = re.compile(r"config(_\d+)?")


def examine(run: Path | None, config: Path | None) -> Iterator[Finding]:
    """run: a run's folder, or one of several runs   config: a YAML of fit, for the run that it has made or will make

    Raises UserError for one that is not there. Nothing that is found stops the examination.
    """
    if run is not None and not run.is_dir():
        raise UserError(f"--run={run} is not a folder; fit names its own when it begins and when it ends.")
    if config is not None and not config.is_file():
        raise UserError(f"{config} is not a file; --config names a YAML of fit.")
    settings: dict[str, Any] = {}
    if config is not None:
        try:
            settings = read_settings(config)
        except UserError as error:
            yield Finding("wrong", "settings", str(error).rstrip("."))
    yield from unless_it_fails("packages", check_packages)
    yield from unless_it_fails("processor", check_processor)
    yield from unless_it_fails("card", check_card)
    yield from unless_it_fails("sleep", check_sleep)
    root = run or Path(setting(settings, "trainer", "default_root_dir") or "runs")
    yield from unless_it_fails("disk", lambda: check_disk(root, largest_checkpoint(root)))
    if run is None and config is None:
        return
    folders = [shards_of(settings, root)]
    if config is None:
        kept, unreadable = kept_settings(root)
        yield from unreadable
        folders = sorted({shards_of(settings, folder.parent) for folder, settings in kept})
    for folder in folders:
        yield from unless_it_fails("shards", lambda folder=folder: check_shards(folder))  # type: ignore[misc]
    yield from unless_it_fails("checkpoint", lambda: check_checkpoints(root))
    yield from unless_it_fails("run", lambda: check_strays(root))


def unless_it_fails(name: str, check: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """Its findings; a check that breaks is one itself, and the next ones follow."""
    try:
        yield from check()
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        yield Finding("wrong", name, f"could not be looked at ({type(error).__name__}: {reason})")


def kept_settings(root: Path) -> tuple[list[tuple[Path, dict[str, Any]]], list[Finding]]:
    """The folders of runs in `root`, each with what it was trained with, and those whose settings cannot be read."""
    kept, unreadable = [], []
    for path in sorted(root.rglob(RUN_SETTINGS)):
        try:
            settings = read_settings(path)
        except UserError as error:
            told = f"{str(error).rstrip('.')}: fit passes it over when it resumes"
            unreadable.append(Finding("look", "settings", told))
            continue
        if NUMBERED.fullmatch(path.stem):
            kept.append((path.parent, settings))
    return kept, unreadable


def shards_of(settings: dict[str, Any], root: Path) -> Path:
    """data.shards_dir, by default beside the runs."""
    return Path(setting(settings, "data", "shards_dir") or root / "shards")


def read_settings(path: Path) -> dict[str, Any]:
    """As far as they say where a run is. What else is wrong with them, `plan` and `fit` tell. Raises UserError."""
    settings = load_yaml_file(path)
    return settings if isinstance(settings, dict) else {}


def setting(settings: dict[str, Any], section: str, key: str) -> str | None:
    value = settings.get(section)
    text = value.get(key) if isinstance(value, dict) else None
    return text if isinstance(text, str) else None
