"""Imports that a stranger's file may ask for: of a configuration the classes that are allowed by their names, before
anything is imported; of a pickle none.

A YAML comes from a friend, a forum, a repository. `class_path: some_module.SomeClass` imports some_module, which runs
it, whatever the class then turns out to be. So a configuration names Lightning's classes and ours, and any other only
when the command line says `--trust PACKAGE`: a YAML cannot say that.
"""

import io
import pickle
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from jsonargparse import set_parsing_settings

from nanogpt_lit.errors import UserError

TRUST = "--trust"

ALLOWED = (
    "nanogpt_lit",
    # The rooms of Lightning that hold what a Trainer takes, not all of it: lightning.pytorch.demos downloads, for one.
    "lightning.fabric.accelerators",
    "lightning.fabric.plugins",
    "lightning.fabric.strategies",
    "lightning.pytorch.accelerators",
    "lightning.pytorch.callbacks",
    "lightning.pytorch.loggers",
    "lightning.pytorch.plugins",
    "lightning.pytorch.profilers",
    "lightning.pytorch.strategies",
    # What the arguments of those are made of.
    "torch.distributed.algorithms.ddp_comm_hooks",
    "torch.distributed.fsdp.CPUOffload",
    "torch.distributed.fsdp.MixedPrecision",
    "torch.distributed.fsdp.api.CPUOffload",
    "torch.distributed.fsdp.api.MixedPrecision",
    "torch.bfloat16",
    "torch.dtype",
    "torch.float16",
    "torch.float32",
    "torch.optim",
)

_trusted: set[str] = set()  # by the parser that was made last: jsonargparse's settings are the process's


def split_trusted(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """(packages that the command line trusts, the other arguments). Raises UserError for what is no package."""
    packages, others = [], []
    rest = iter(arguments)
    for argument in rest:
        option, equals, package = argument.partition("=")
        if option != TRUST:
            others.append(argument)
            continue
        package = package if equals else next(rest, "")
        if not package or not all(part.isidentifier() for part in package.split(".")):
            raise UserError(f"{TRUST} takes a package, such as {TRUST} my_package, and not {package!r}.")
        if package.partition(".")[0] == "jsonargparse":  # it refuses this too: a value could then change the rules
            raise UserError(f"{TRUST} {package} would let a configuration trust whatever it likes; name your package.")
        packages.append(package)
    return packages, others


def limit_imports(trusted: Sequence[str]) -> None:
    """Let configurations import only what is allowed or trusted, and read no URL, from here on."""
    set_parsing_settings(
        import_path_denylist=["*", *_trusted],
        import_path_allowlist=[*ALLOWED, *trusted],
        # A class_path where any value is welcome is a value, and no class.
        instantiate_subclass_spec_in_any=False,
        # Lightning turns it on: --config memory://..., s3://...
        config_read_mode_fsspec_enabled=False,
        config_read_mode_urls_enabled=False,
    )
    _trusted.clear()
    _trusted.update(package for package in trusted if package not in ALLOWED)


def refusal(path: str, key: str | None) -> str:
    """path: of the class that is refused   key: that names it"""
    module = path.rpartition(".")[0]
    return (
        f"{key or 'the configuration'} names {path}, and a configuration may name only classes of Lightning and of "
        f"nanogpt_lit, for naming one runs its code; if you trust {module}, add {TRUST} {module} to the command."
    )


def imported_class(path: str, key: str) -> type:
    """Import a class by its path. key: the setting that names it

    Raises UserError for a path that names no class, and for one whose module would have to be imported and is not
    trusted.
    """
    module, _, name = path.rpartition(".")
    allowed = any(f"{path}.".startswith(f"{package}.") for package in (*ALLOWED, *_trusted))
    if not allowed and module not in sys.modules:
        raise UserError(refusal(path, key))
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{key}={path} cannot be imported ({error}).") from error
    if not isinstance(found, type):
        raise UserError(f"{key}={path} is no class.")
    return found


# Pickles of other programs, by Python's own reader, to which no name in them means anything.


# The reader that is written in Python: to the one in C, a number in the file may name more memory than there is.
_Reader: Any = pickle._Unpickler


def plain_pickle(content: bytes) -> Any:
    """Read a pickle of dictionaries, lists, numbers and text. Raises UnpicklingError for one that names anything."""
    return _Plain(io.BytesIO(content)).load()


def pickled_tree(content: bytes) -> Any:
    """Read a pickle with objects in it, each of which is Made. Errors of a damaged one are not one family."""
    return _Tree(io.BytesIO(content)).load()


class Made:
    """Stand-in for what a class or a function would have made, or for itself."""

    name: str
    """The name of the class or the function."""
    arguments: tuple[Any, ...] = ()
    state: Any = None
    """The state that would have been put into it afterwards: mostly a dictionary of its fields."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Plain(_Reader):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module}.{name}, which numbers and text do not need")


class _Tree(_Reader):
    def find_class(self, module: str, name: str) -> Any:
        return type("Made", (Made,), {"name": name})
