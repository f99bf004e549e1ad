"""All that the doctor looks at, in the order that it tells it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nanogpt_lit.doctor.card import check_card
from nanogpt_lit.doctor.checkpoints import check_checkpoints, checkpoint_files
from nanogpt_lit.doctor.disk import check_disk
from nanogpt_lit.doctor.finding import Finding
from nanogpt_lit.doctor.packages import check_packages
from nanogpt_lit.doctor.processor import check_processor
from nanogpt_lit.doctor.shards import check_shards
from nanogpt_lit.doctor.sleep import check_sleep
from nanogpt_lit.errors import UserError

RUN_SETTINGS = "config.yaml"
"""What fit keeps of its settings in the folder of a run."""


def examine(run: Path | None, config: Path | None) -> Iterator[Finding]:
    """run: a run's folder, or one of several runs   config: a YAML of fit, for the run that it has made or will make

    Raises UserError for a run that is not there, and for a YAML that cannot be read.
    """
    if run is not None and not run.is_dir():
        raise UserError(f"--run={run} is not a folder; fit names its own when it begins and when it ends.")
    settings = read_settings(config) if config is not None else {}
    yield from check_packages()
    yield from check_processor()
    yield from check_card()
    yield from check_sleep()
    root = run or Path(setting(settings, "trainer", "default_root_dir") or "runs")
    sizes = [path.stat().st_size for path in checkpoint_files(root)]
    yield from check_disk(root, max(sizes, default=None))
    if run is None and config is None:
        return
    for folder in shard_folders(root, settings if config is not None else None):
        yield from check_shards(folder)
    yield from check_checkpoints(root)


def shard_folders(root: Path, settings: dict[str, Any] | None) -> list[Path]:
    """Those of the YAML, or else those that the runs in `root` were trained on."""
    if settings is not None:
        return [Path(setting(settings, "data", "shards_dir") or root / "shards")]
    kept = [read_settings(path) for path in sorted(root.rglob(RUN_SETTINGS))]
    return sorted({Path(folder) for settings in kept if (folder := setting(settings, "data", "shards_dir"))})


def read_settings(path: Path) -> dict[str, Any]:
    """As far as they say where a run is. What else is wrong with them, `plan` and `fit` tell. Raises UserError."""
    import yaml  # type: ignore[import-untyped]

    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({' '.join(str(error).split())}).") from error
    return settings if isinstance(settings, dict) else {}


def setting(settings: dict[str, Any], section: str, key: str) -> str | None:
    value = settings.get(section)
    text = value.get(key) if isinstance(value, dict) else None
    return text if isinstance(text, str) else None
