"""The meta.pkl beside nanoGPT's tokens: which characters they are, where they are characters.

It is a pickle, and loading one can run code. This reads its instructions, follows those that make a dictionary of
numbers and characters, and refuses all others.
"""

from pathlib import Path

from nanogpt_lit.data.tokenizer import CharTokenizer
from nanogpt_lit.errors import UserError
from nanogpt_lit.untrusted.config_paths import file_inside
from nanogpt_lit.untrusted.pickled import plain_pickle

META = "meta.pkl"
LARGEST = 2**26
"""Bytes: more than all characters of Unicode take."""


def characters_of(folder: Path) -> CharTokenizer | None:
    """The tokenizer of meta.pkl; None without one. Raises UserError for one that describes no characters."""
    path = file_inside(folder, META)
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST)
        character_of = plain_pickle(content)["itos"]
        characters = [character_of[token] for token in range(len(character_of))]
    except Exception as error:  # what pickletools raises for a damaged file is not one family
        raise UserError(
            f"{path} does not say which character each token is ({type(error).__name__}: {str(error)[:99]}); nanoGPT's "
            "data/shakespeare_char/prepare.py writes it, and without it data.tokenizer counts."
        ) from error
    if not all(isinstance(c, str) and len(c) == 1 for c in characters) or characters != sorted(set(characters)):
        raise UserError(
            f"{path} numbers its characters otherwise than nanoGPT, which sorts them; prepare the text itself with "
            "data.source and data.tokenizer: char."
        )
    return CharTokenizer(characters)
