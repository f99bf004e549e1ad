"""`doctor`: its arguments, and what it looks at, in order. It imports torch and PyYAML late: they may be missing."""

import io
import json
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nanogpt_lit.cli.options import parser_of
from nanogpt_lit.doctor import machine
from nanogpt_lit.doctor import run as of_run
from nanogpt_lit.doctor.finding import Finding, failed, unless_it_fails
from nanogpt_lit.errors import NothingToDo, UserError


def doctor(arguments: list[str]) -> int:
    """`doctor [--run FOLDER] [--config FILE]`: one line per check. Returns 1 when something is wrong."""
    parser = parser_of(
        "doctor",
        "Check this machine, or a run, and say what to do. Each line begins with ok, with look (it may cost "
        "time or comfort) or with wrong (it fails, or will). The exit code is 1 if something is wrong.",
    )
    parser.add_argument("--run", type=Path, metavar="FOLDER", help="check its shards and checkpoints too, byte by byte")
    parser.add_argument("--config", type=Path, metavar="FILE", help="the same for the run of a YAML of fit")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    options = parser.parse_args(arguments[1:])

    findings = []
    for finding in examine(options.run, options.config):
        findings.append(finding)
        if not options.json:
            print(finding, flush=True)
    if options.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=1))
    return 1 if any(finding.level == "wrong" for finding in findings) else 0


def examine(run: Path | None, config: Path | None) -> Iterator[Finding]:
    """Examine this machine, and a run if one is named; a check that fails stops none of the others.

    run: a run's folder, or one of several runs   config: a YAML of fit, for the run that it has made or will make
    Raises UserError for a folder or file that is not there.
    """
    if run is not None and not run.is_dir():
        raise UserError(f"--run={run} is not a folder; fit names its own when it begins and when it ends.")
    if config is not None and not config.is_file():
        raise UserError(f"{config} is not a file; --config names a YAML of fit.")
    settings: dict[str, Any] = {}
    if config is not None:
        try:
            settings = read_settings(config)
        except Exception as error:
            yield failed("settings", error)
        else:
            yield from unless_it_fails("settings", lambda: check_settings(config))
        if (source := setting(settings, "data", "source")) is not None:
            yield from unless_it_fails("source", lambda: check_source(source))
    for name in ("packages", "cpu", "gpu", "sleep"):
        yield from unless_it_fails(name, getattr(machine, f"check_{name}"))
    if config is not None:
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
            except Exception as error:
                yield failed("settings", error)
    for folder in sorted(folders):
        yield from unless_it_fails("shards", lambda folder=folder: of_run.check_shards(folder))  # type: ignore[misc]
    yield from unless_it_fails("checkpoint", lambda: of_run.check_checkpoints(root))
    for check in (of_run.check_times, of_run.check_holders):
        yield from unless_it_fails("run", lambda check=check: check(root))  # type: ignore[misc]


def check_settings(config: Path) -> Iterator[Finding]:
    """Let fit look at a YAML as far as it does before it makes anything."""
    yield from (Finding("look", "settings", line.rstrip(".")) for line in remarks_on(config))
    yield Finding("ok", "settings", f"fit takes {config}")


def check_source(source: str) -> Iterator[Finding]:
    """Check whether there is text; that of the hub is not asked for. Raises UserError where there is none."""
    from nanogpt_lit.data.sources import open_source

    open_source(source)
    yield Finding("ok", "source", source)


def shards_of(settings: dict[str, Any], root: Path) -> Path:
    """data.shards_dir, by default beside the runs."""
    return Path(setting(settings, "data", "shards_dir") or root / "shards")


def read_settings(path: Path) -> dict[str, Any]:
    """A YAML, as far as it says where a run is. Raises UserError for one that cannot be read."""
    from nanogpt_lit.untrusted.yaml_file import load_yaml_file  # PyYAML may be what is missing

    settings = load_yaml_file(path)
    return settings if isinstance(settings, dict) else {}


def setting(settings: dict[str, Any], section: str, key: str) -> str | None:
    value = settings.get(section)
    text = value.get(key) if isinstance(value, dict) else None
    return text if isinstance(text, str) else None


def remarks_on(config: Path) -> list[str]:
    """Lines that fit prints about a YAML before it makes anything. Raises UserError as fit does."""
    from nanogpt_lit.cli.settings import SettingsCLI, quiet_lightning

    quiet_lightning()
    said = io.StringIO()
    with redirect_stdout(said):
        cli = SettingsCLI(args=[f"--config={config}", "--init_from=null", "--teachers=null"])  # gigabytes to fetch
        try:
            cli.check_settings()
        except NothingToDo as done:
            print(done)
    return said.getvalue().splitlines()


def page_locked_mib(config: Path) -> float:
    """Host memory that the run of a YAML page-locks, as `plan` says."""
    from nanogpt_lit.cli.settings import SettingsCLI, quiet_lightning
    from nanogpt_lit.plan.budget import choose_budget
    from nanogpt_lit.plan.command import own_rung, plan_rung

    quiet_lightning()
    settings = SettingsCLI(args=[f"--config={config}"]).settings
    return plan_rung(settings, own_rung(settings), choose_budget().gpu).page_locked_mib
