"""Files that a folder of shards names: a folder may come from elsewhere, and must not make us read outside of it."""

import re
from pathlib import Path

from nanogpt_lit.errors import UserError

PLAIN = re.compile(r"\w[\w.-]*")


def file_inside(folder: Path, name: str, named_by: str = "") -> Path:
    """The file of that name in the folder. Raises UserError for a name, or a link, that leads out of it."""
    if not isinstance(name, str) or not PLAIN.fullmatch(name):
        raise UserError(f"{folder / named_by} names {name!r}; a plain file name in that folder works.")
    path = folder / name
    # The folder itself may be a link, and often is one, to a larger disk.
    if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{path} is a link to {path.resolve()}, out of its folder; put the file itself there.")
    return path
