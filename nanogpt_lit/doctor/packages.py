"""Whether Python and the packages are those that this project asks for: its own metadata says which."""

import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from nanogpt_lit.doctor.finding import Finding

SHOWN = ("torch", "lightning", "accelerate")
"""The others get a line only when something is wrong with them."""
REASONS = {
    "lightning": " (before 2.6.6 a checkpoint could run code: CVE-2026-58659)",
    "torch": " (before 2.10 a checkpoint could corrupt its reader's memory: CVE-2026-24747)",
}
MALWARE = {"lightning": ("2.6.2", "2.6.3")}
"""GHSA-w37p-236h-pfx3: stole credentials as soon as it was imported."""


def check_packages() -> Iterator[Finding]:
    yield python()
    try:
        needed = [Requirement(line) for line in requires("nanogpt_lit") or []]
    except PackageNotFoundError:
        yield Finding("wrong", "packages", "nanogpt_lit is not installed: pip install -c constraints.txt -e .")
        return
    for requirement in needed:
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield from package(requirement)


def python() -> Finding:
    found, asked = platform.python_version(), SpecifierSet(metadata("nanogpt_lit")["Requires-Python"] or "")
    if not asked.contains(found, prereleases=True):
        return Finding("wrong", "python", f"{found} is not {asked}: make the virtual environment with another Python")
    return Finding("ok", "python", f"{found}, {platform.system()} {platform.machine()}")


def package(requirement: Requirement) -> Iterator[Finding]:
    name, asked = requirement.name, requirement.specifier
    try:
        found = version(name)
    except PackageNotFoundError:
        yield Finding("wrong", name, f'is not installed: pip install "{name}{asked}"')
        return
    if found in MALWARE.get(name, ()) or has_payload(name):
        yield Finding(
            "wrong",
            name,
            f"{found} is malware that steals credentials when it is imported (GHSA-w37p-236h-pfx3): "
            f"pip uninstall {name}, then change every password, token and key that this machine could read",
        )
    elif not asked.contains(found, prereleases=True):
        yield Finding("wrong", name, f'{found} is not {asked}{REASONS.get(name, "")}: pip install "{name}{asked}"')
    elif name in SHOWN:
        yield Finding("ok", name, found)


def has_payload(name: str) -> bool:
    """Whether the folder is there that the malware came in. Looks for it without importing anything."""
    spec = find_spec(name) if name in MALWARE else None
    return spec is not None and spec.origin is not None and (Path(spec.origin).parent / "_runtime").is_dir()
