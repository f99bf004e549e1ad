"""Files of torch.save: read where they are whole, and hold nothing that could run."""

import pickletools
import zipfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any, BinaryIO

import torch

from nanogpt_lit.errors import UserError


def read_torch_file(source: Path | BinaryIO) -> Any:
    """Its content, on the CPU. What the readers of zip and of pickle raise for any other file is not one family.

    weights_only: the file may come from elsewhere, and an ordinary pickle can run code.
    """
    with source.open("rb") if isinstance(source, Path) else nullcontext(source) as file:
        # torch wrote a checksum of every part, and does not look at it when it reads.
        if (part := zipfile.ZipFile(file).testzip()) is not None:
            raise RuntimeError(f"{part} differs from its checksum")
        file.seek(0)
        # The open file and not its name, by which torch would choose another reader.
        return torch.load(file, map_location="cpu", weights_only=True)


def is_zip(path: Path) -> bool:
    """Whether it is a zip archive, as files of torch.save are, whole or damaged."""
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # raised for some damage
        return True


def words_of(path: Path) -> set[str]:
    """The texts in a file's pickle, such as the keys of its dictionaries; none where there is no pickle.

    Builds nothing. Raises UserError, naming the file, for one that is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            name = next((name for name in archive.namelist() if name.endswith("data.pkl")), None)
            if name is None:
                return set()
            return {word for _, word, _ in pickletools.genops(archive.read(name)) if isinstance(word, str)}
    except Exception as error:  # what the readers of zip and of pickle raise is not one family
        raise UserError(f"{path} is a damaged file of torch.save ({type(error).__name__}).") from error
