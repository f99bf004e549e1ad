"""The doctor's examination: a finding a line, of this machine and of a run."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nanogpt_lit.errors import UserError
from nanogpt_lit.untrusted.yaml_file import load_yaml_file


@dataclass(frozen=True)
class Finding:
    level: Literal["ok", "look", "wrong"]
    """Nothing to do; something that may cost time, or comfort; something that fails, or will."""
    check: str
    """What was looked at, in a word."""
    text: str
    """What is so, and unless it is ok, what to do."""

    def __str__(self) -> str:
        line = f"{self.level:<6} {self.check:<11} {self.text}"
        # Names of files and settings may come from elsewhere, with characters in them that a terminal would obey.
        return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line)


def examine(
    run: Path | None, config: Path | None, page_locked_mib: Callable[[Path], float] | None = None
) -> Iterator[Finding]:
    """Examine this machine, and a run if one is named; a check that fails stops none of the others.

    run: a run's folder, or one of several runs   config: a YAML of fit, for the run that it has made or will make
    page_locked_mib: plans the run of a YAML
    Raises UserError for a folder or file that is not there.
    """
    from nanogpt_lit.doctor import machine
    from nanogpt_lit.doctor import run as of_run

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
    for name in ("packages", "cpu", "gpu", "sleep"):
        yield from unless_it_fails(name, getattr(machine, f"check_{name}"))
    if config is not None and page_locked_mib is not None:
        yield from unless_it_fails("memory", lambda: machine.check_page_locks(lambda: page_locked_mib(config)))
    root = run or Path(setting(settings, "trainer", "default_root_dir") or "runs")
    yield from unless_it_fails("disk", lambda: of_run.check_disk(root, of_run.largest_checkpoint(root)))
    if run is None and config is None:
        return
    folders = {shards_of(settings, root)}
    if config is None:
        folders = set()
        for path in sorted(root.rglob("config*.yaml")):  # what fit keeps of its settings in the folder of a run
            try:
                folders.add(shards_of(read_settings(path), path.parent.parent))
            except UserError as error:
                text = f"{str(error).rstrip('.')}: fit passes it over when it resumes"
                yield Finding("look", "settings", text)
    for folder in sorted(folders):
        yield from unless_it_fails("shards", lambda folder=folder: of_run.check_shards(folder))  # type: ignore[misc]
    yield from unless_it_fails("checkpoint", lambda: of_run.check_checkpoints(root))
    yield from unless_it_fails("run", lambda: of_run.check_strays(root))


def unless_it_fails(name: str, check: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """The findings of a check; one that breaks is a finding itself."""
    try:
        yield from check()
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        yield Finding("wrong", name, f"could not be looked at ({type(error).__name__}: {reason})")


def shards_of(settings: dict[str, Any], root: Path) -> Path:
    """data.shards_dir, by default beside the runs."""
    return Path(setting(settings, "data", "shards_dir") or root / "shards")


def read_settings(path: Path) -> dict[str, Any]:
    """A YAML, as far as it says where a run is. Raises UserError for one that cannot be read."""
    settings = load_yaml_file(path)
    return settings if isinstance(settings, dict) else {}


def setting(settings: dict[str, Any], section: str, key: str) -> str | None:
    value = settings.get(section)
    text = value.get(key) if isinstance(value, dict) else None
    return text if isinstance(text, str) else None
