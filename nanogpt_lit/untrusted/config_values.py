"""Limits of a configuration's values: where it reads and writes, and how large its numbers are.

Files are those of this machine, below the folders that it names. Folders are the user's to choose
(trainer.default_root_dir, data.shards_dir, a logger's save_dir). Names are added to them, and a name that climbs out
again says one place and means another.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import Any

from nanogpt_lit.errors import UserError
from nanogpt_lit.untrusted.yaml_file import load_yaml_file

PATH = re.compile(r"(\w+_)?(config|dir|dirpath|filename|path|root|source|tokenizer)|init_from|teachers")
"""Keys whose values are paths. Lightning opens those with fsspec, which knows dozens of schemes."""
ADDRESS = re.compile(r"\w[\w+.-]+(://|::)")
"""A scheme of at least two characters: C: is a drive."""
NAMES = ("name", "version", "sub_dir", "filename")
"""Keys, of loggers, callbacks and profilers, that are joined to a folder."""
FOLDERS = ("save_dir", "dirpath")
CLIMBS = re.compile(r"[/\\~]|[A-Za-z]:|(.*[/\\])?\.\.([/\\]|$)|.*[\0$%]", re.DOTALL)
"""Absolute here or on Windows, of another drive, upwards, or expanded by Lightning to what the environment says."""
SECTIONS = ("c", "config", "trainer", "model", "data")
"""Options that take a YAML file."""
KEYWORDS = re.compile(r"(best|last|hpc|registry(:.*)?)")


def check_paths(settings: Mapping[str, Any]) -> None:
    """Raises UserError for an address where a path is meant, and a name that leaves its folder.

    settings: of fit, as nested mappings
    """
    for keys, value, _ in values_of(settings):
        if isinstance(value, str) and PATH.fullmatch(keys[-1]):
            _check_path(".".join(keys), value)
    trainer = settings.get("trainer") or {}
    root = trainer.get("default_root_dir") or "."
    for keys, value, beside in values_of(trainer, ("trainer",)):
        if isinstance(value, str) and keys[-1] in NAMES:
            _check_name(".".join(keys), value, Path(next((beside[f] for f in FOLDERS if beside.get(f)), root)))
        if keys[-1] == "class_path" and "dict_kwargs" in keys:
            raise UserError(f"{'.'.join(keys)}={value} stands where no class is made; move it to init_args.")
    word = settings.get("ckpt_path")
    if isinstance(word, str) and KEYWORDS.fullmatch(word):
        raise UserError(
            f"ckpt_path={word} leaves it to Lightning to find a checkpoint, and it may begin anew where it finds none; "
            "name the file."
        )


def check_arguments(arguments: Sequence[str]) -> None:
    """Raises UserError where the command line means a YAML and names none: an address, or a file that is not there."""
    for argument, following in pairwise([*arguments, ""]):
        option, equals, value = argument.partition("=")
        value = value if equals else following
        if option.startswith("-") and option.lstrip("-") in SECTIONS:
            _check_path(option.lstrip("-"), value)
        if option in ("--config", "-c"):
            _check_config(option, value)


def _check_config(option: str, value: str) -> None:
    """Check that a file is named. The parser also takes the YAML itself, which begins with a brace or has a colon."""
    path = Path(value)
    if value == "-" or value.lstrip().startswith("{") or (":" in value and not path.exists()):
        return
    if not path.exists():
        there = sorted(p.as_posix() for folder in {path.parent, Path("configs")} for p in folder.glob("*.y*ml"))
        nearest = get_close_matches(path.as_posix(), there, n=1, cutoff=0.5) or there[:1]
        works = (
            f"; did you mean {nearest[0]}?" if nearest else "; name the YAML of a run, such as configs/quickstart.yaml."
        )
        raise UserError(f"{option}={value} does not exist{works}")
    settings = load_yaml_file(path)
    if not isinstance(settings, dict):
        raise UserError(f"{value} holds no settings; they are written `trainer:`, and below it `max_steps: 1000`.")
    for key, section in settings.items():
        if key in SECTIONS and not isinstance(section, Mapping | str):
            raise UserError(f"{value}: {key} holds no keys; write them below it, indented, or leave {key} out.")


def _check_path(key: str, value: str) -> None:
    if address := ADDRESS.match(value):
        works = "a path without file://" if address[0] == "file://" else "download it first and name the file"
        raise UserError(f"{key}={value} is an address, and only files of this machine are opened; {works} works.")
    try:
        Path(value).expanduser()
    except RuntimeError as error:
        raise UserError(f"{key}={value} names the home of a user that is not here; ./{value} is a file.") from error
    if "\0" in value:
        raise UserError(f"{key}={value!r} holds a NUL, which no path may.")


def _check_name(key: str, name: str, folder: Path) -> None:
    # A link in the way leads elsewhere too.
    if CLIMBS.match(name) or not (folder / name).resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{key}={name!r} leads out of {folder}; a plain name stays in it.")


def values_of(
    settings: Mapping[str, Any], above: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any, Mapping[str, Any]]]:
    """(keys, value, the mapping it stands in) of everything that is no mapping or list itself."""
    for key, value in settings.items():
        keys = (*above, str(key))
        if isinstance(value, Mapping):
            yield from values_of(value, keys)
        elif isinstance(value, list | tuple):
            for item in value:
                if isinstance(item, Mapping):
                    yield from values_of(item, keys)
                else:
                    yield keys, item, settings
        else:
            yield keys, value, settings


# Numbers: finite, of at most 64 bits, and in the range in which they mean something. What checks itself (optimizers,
# schedules, the network) is left to do so; these are the keys that nobody checks, or that end in a division by zero, in
# a loop without end or in an allocation that no machine has.

COUNT = 2**31
"""More than anything here is counted to."""
SIZES = {
    "n_layer": 2**12, "n_head": 2**16, "n_embd": 2**18, "vocab_size": 2**24, "n_kv_head": 2**16, "head_size": 2**16,
    "n_hidden": 2**20,
}  # fmt: skip
"""The largest of a network's sizes."""
RANGES: Mapping[str, tuple[float, float]] = {
    "seed_everything": (0, 2**32 - 1),  # NumPy's
    "data.seed": (0, 2**62),
    "trainer.num_nodes": (1, 2**16),
    "trainer.accumulate_grad_batches": (1, COUNT),
    "trainer.log_every_n_steps": (1, COUNT),
    "trainer.val_check_interval": (1, 2**62),
    "trainer.check_val_every_n_epoch": (1, COUNT),
    "trainer.gradient_clip_val": (0, math.inf),
    **{f"trainer.limit_{of}_batches": (0, 2**62) for of in ("train", "val", "test", "predict")},
    "data.block_size": (-math.inf, 2**24),
    "data.batch_size": (-math.inf, 2**24),
    **{f"model.{section}.{name}": (-math.inf, most) for section in ("gpt", "llama") for name, most in SIZES.items()},
    "model.optim.eps": (0, math.inf),
}


TRAINS_NOTHING = ("trainer.max_epochs", "trainer.limit_train_batches")


def check_numbers(settings: Mapping[str, Any]) -> None:
    """Raises UserError for a number that no run can use. settings: of fit, as nested mappings"""
    for keys, value, _ in values_of(settings):
        if not isinstance(value, int | float) or isinstance(value, bool) or "init_args" in keys:
            continue
        key = ".".join(keys)
        if not math.isfinite(value):
            raise UserError(f"{key}={value} is not a number to train with; a finite one works.")
        if isinstance(value, int) and abs(value) >= 2**63:
            raise UserError(f"{key}={value} is more than 64 bits hold; a smaller number works.")
        least, most = RANGES.get(key, (-math.inf, math.inf))
        if value == 0 and key in TRAINS_NOTHING:
            raise UserError(f"{key}=0 trains nothing; leave it out.")
        if value < least:
            raise UserError(f"{key}={value} must be at least {least:,}.")
        if value > most:
            raise UserError(f"{key}={value} must be at most {most:,}.")


# Files that a folder of somebody else names.

PLAIN = re.compile(r"\w[\w.-]*")


def file_inside(folder: Path, name: str, named_by: str = "") -> Path:
    """The file of that name in the folder. Raises UserError for a name, or a link, that leads out of it."""
    path = plainly_named(folder, name, named_by)
    # The folder itself may be a link, and often is one, to a larger disk.
    if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{path} is a link to {path.resolve()}, out of its folder; put the file itself there.")
    return path


def plainly_named(folder: Path, name: str, named_by: str) -> Path:
    """The file of that name in the folder, or what a link there leads to. Raises UserError for any other name."""
    if not isinstance(name, str) or not PLAIN.fullmatch(name):
        raise UserError(f"{folder / named_by} names {name!r}; a plain file name in that folder works.")
    return folder / name
