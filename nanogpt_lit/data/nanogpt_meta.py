"""The meta.pkl beside nanoGPT's tokens: which characters they are, where they are characters.

It is a pickle, and loading one can run code. This reads its instructions, follows those that make a dictionary of
numbers and characters, and refuses all others.
"""

import pickletools
from pathlib import Path
from typing import Any

from nanogpt_lit.data.tokenizer import CharTokenizer
from nanogpt_lit.errors import UserError
from nanogpt_lit.untrusted.config_paths import file_inside

META = "meta.pkl"
LARGEST = 2**26
"""Bytes: more than all characters of Unicode take."""
MARK = object()


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


def plain_pickle(content: bytes) -> Any:
    """What a pickle of dictionaries, numbers and text holds. Raises ValueError for any other instruction in it."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    for instruction, argument, _ in pickletools.genops(content):
        match instruction.name:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                stack.append(MARK)
            case "EMPTY_DICT":
                stack.append({})
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINUNICODE" | "SHORT_BINUNICODE":
                stack.append(argument)
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINPUT" | "LONG_BINPUT":
                memo[int(argument or 0)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[int(argument or 0)])
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                stack[-1][key] = value
            case "SETITEMS":
                start = max(i for i, item in enumerate(stack) if item is MARK)
                items = stack[start + 1 :]
                del stack[start:]
                stack[-1].update(zip(items[::2], items[1::2], strict=True))
            case "STOP":
                return stack.pop()
            case name:
                raise ValueError(f"it holds {name}, which more than numbers and text need")
    raise ValueError("it is cut short")
