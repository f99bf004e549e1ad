"""A folder that appears whole: written aside, then renamed into place, whatever stops the program in between.

FOLDER.partial is being written; FOLDER.old is the previous one between the two renames.
"""

import re
import shutil
from pathlib import Path

from nanogpt_lit.data.shards import MANIFEST
from nanogpt_lit.data.tokenizer import TOKENIZER_JSON, TOKENIZER_RANKS
from nanogpt_lit.errors import UserError
from nanogpt_lit.runtime.durable import partial_of, sync_folder

NAMES = {MANIFEST, TOKENIZER_JSON, TOKENIZER_RANKS}
SHARD_NAME = re.compile(r"(train|val)_\d+\.bin")


def old_folder(folder: Path) -> Path:
    return folder.with_name(folder.name + ".old")


def has_leftovers(folder: Path) -> bool:
    """Whether a process was killed while it wrote this folder, or is writing it."""
    return old_folder(folder).exists() or partial_of(folder).exists()


def recover(folder: Path) -> None:
    """Undo what a killed process left: the previous folder comes back, half-written ones go."""
    old = old_folder(folder)
    if old.exists():
        if folder.exists():
            discard(old)
        else:
            old.replace(folder)
    discard(partial_of(folder))


def check_replaceable(folder: Path) -> None:
    """Raises UserError unless the folder is missing, empty, or holds our files and nothing else."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"data.shards_dir={folder} is a file; name a folder.")
    names = sorted(path.name for path in folder.iterdir())
    foreign = [name for name in names if name not in NAMES and not SHARD_NAME.fullmatch(name)]
    if names and (foreign or MANIFEST not in names):
        raise UserError(
            f"data.shards_dir={folder} holds files that this program did not write ({(foreign or names)[0]}); "
            "name another folder, or empty this one."
        )


def publish(partial: Path, folder: Path) -> None:
    """Put `partial`, whose files are on the disk, in the place of `folder`."""
    sync_folder(partial)
    if folder.exists():
        folder.replace(old_folder(folder))
    partial.replace(folder)
    sync_folder(folder.parent)
    discard(old_folder(folder))


def discard(folder: Path) -> None:
    if folder.exists():
        # Without its manifest first: a deletion cut short must not leave something that looks finished.
        (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
