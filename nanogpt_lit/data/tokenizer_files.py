"""Tokenizers by what data.tokenizer names, from their files, and with special tokens or a chat template added."""

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from nanogpt_lit.data.bpe import missing_bytes, parse_ranks
from nanogpt_lit.data.shards import read_manifest, ready_format
from nanogpt_lit.data.tokenizer import (
    CHAT_TEMPLATE,
    EOT,
    GPT2_PATTERN,
    TOKENIZER_FILES,
    TOKENIZER_JSON,
    TOKENIZER_RANKS,
    BytePairTokenizer,
    ByteTokenizer,
    CharTokenizer,
    Conventions,
    Tokenizer,
    files_sha256,
    gpt2_tokenizer,
    without_surrogates,
)
from nanogpt_lit.errors import UserError, in_brief
from nanogpt_lit.untrusted.config_values import file_inside

WHAT_WORKS = "gpt2, byte, char, bpe:N (bpe:32000 trains one on the source) or the path of a .tiktoken file"
META = "meta.pkl"
LARGEST = 2**26
"""Bytes: more than all characters of Unicode take."""


def parse_tokenizer(value: str) -> tuple[Literal["gpt2", "byte", "char", "bpe", "file"], str]:
    """Split `data.tokenizer` into (kind, the part after the colon or the path). Raises UserError early."""
    match value.partition(":"):
        case ("gpt2" | "byte" | "char") as kind, "", "":
            return kind, ""
        case "bpe", ":", size:
            if not size.isdecimal() or int(size) < 258:
                raise UserError(
                    f"data.tokenizer={value}: the vocabulary is a number from 258 (256 bytes, end-of-text and one "
                    "merge); bpe:32000 works."
                )
            return "bpe", size
    if not value.endswith(".tiktoken"):
        raise UserError(f"data.tokenizer={value} is not a tokenizer; what works: {WHAT_WORKS}.")
    if not Path(value).expanduser().is_file():
        raise UserError(f"data.tokenizer={value}: there is no such file; what works: {WHAT_WORKS}.")
    return "file", value


def tokenizer_from_file(path: Path) -> Tokenizer:
    """A user's `.tiktoken` file; the pattern, specials and chat_template of FILE.json beside it, else GPT-2's ways.

    Raises UserError when either is not what it should be.
    """
    path = path.expanduser()
    try:
        ranks_text = path.read_text(encoding="utf-8")
        beside = path.with_suffix(".json")
        described = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"data.tokenizer={path} cannot be read: {error}.") from error
    if not isinstance(described, dict):
        raise UserError(f"{beside} must hold an object with `pattern` and `specials`.")
    name = f"data.tokenizer={path}"
    ranks = parse_ranks(ranks_text, name)
    tokenizer: Tokenizer
    if "ranks_sha256" in described:  # as `files()` wrote the two
        tokenizer = _tokenizer_from_files({TOKENIZER_JSON: json.dumps(described), TOKENIZER_RANKS: ranks_text})
    elif missing := missing_bytes(ranks):
        raise UserError(f"{name} lacks the byte {missing[0][0]:#04x}; byte pairs need all 256 of them.")
    else:
        specials = described.get("specials", {EOT: max(ranks.values()) + 1})
        pattern = described.get("pattern", GPT2_PATTERN)
        tokenizer = BytePairTokenizer(described.get("name", path.stem), ranks, pattern, specials)
    return with_chat_template(tokenizer, described.get("chat_template"))


def tokenizer_from_files(files: Mapping[str, str]) -> Tokenizer:
    """The tokenizer that `files()` described. Raises UserError when a file is missing or altered."""
    return with_chat_template(_tokenizer_from_files(files), files.get(CHAT_TEMPLATE))


def _tokenizer_from_files(files: Mapping[str, str]) -> Tokenizer:
    try:
        described = json.loads(files[TOKENIZER_JSON])
    except (KeyError, ValueError, RecursionError) as error:
        raise UserError(f"{TOKENIZER_JSON} is missing or no JSON ({error}); prepare the data again.") from error
    try:
        match described["kind"]:
            case "byte":
                return ByteTokenizer()
            case "char":
                characters = described["characters"]
                if not isinstance(characters, str):
                    raise TypeError(f"characters, as one text, and hold {characters!r:.40}")
                return CharTokenizer(characters)
            case "gpt2":
                return gpt2_tokenizer()
            case "bpe":
                return byte_pairs_of_files(described, files[TOKENIZER_RANKS])
            case kind:
                raise UserError(f"{TOKENIZER_JSON} describes a tokenizer of kind {kind!r}, which this version lacks.")
    except (KeyError, TypeError) as error:
        raise UserError(f"the tokenizer's files lack {error}; prepare the data again.") from error


def byte_pairs_of_files(described: Mapping[str, Any], ranks_text: str) -> BytePairTokenizer:
    """Raises KeyError or TypeError for what the description lacks, and UserError for ranks that are not those."""
    if hashlib.sha256(ranks_text.encode()).hexdigest() != described["ranks_sha256"]:
        raise UserError(f"{TOKENIZER_RANKS} is not the one that {TOKENIZER_JSON} describes.")
    specials, conventions = described["specials"], described.get("conventions")
    if not isinstance(specials, Mapping):
        raise TypeError(f"special tokens with their ids, and hold {specials!r:.40}")
    return BytePairTokenizer(
        described["name"],
        parse_ranks(ranks_text, TOKENIZER_RANKS),
        described["pattern"],
        specials,
        eot=next((text for text, n in specials.items() if n == described["eot"]), EOT),
        nfc=bool(described.get("nfc", False)),
        conventions=None if conventions is None else Conventions(**conventions),
    )


def read_tokenizer_files(folder: Path, manifest: Mapping[str, Any] | None = None) -> dict[str, str]:
    """The tokenizer files in a folder of prepared shards, compared with its manifest where one is given.

    Raises UserError without a tokenizer.json there, and for other files than those of the manifest.
    """
    try:
        paths = {name: file_inside(folder, name) for name in TOKENIZER_FILES}
        files = {name: _read_exactly(path) for name, path in paths.items() if name == TOKENIZER_JSON or path.is_file()}
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{folder} holds no readable {TOKENIZER_JSON}: {error}.") from error
    if manifest is not None and files_sha256(files) != manifest.get("tokenizer", {}).get("sha256"):
        raise UserError(f"the tokenizer in {folder} is not the one its shards were made with; prepare the data again.")
    return files


def _read_exactly(path: Path) -> str:
    return path.read_bytes().decode()  # bytes: no translation of line ends, which would change the hash


# Special tokens and the chat template.


def check_special_tokens(texts: Sequence[str], tokenizer: str) -> None:
    """Raises UserError for what cannot be a special token, and for a tokenizer that takes none.

    tokenizer: as data.tokenizer names it
    """
    for text in texts:
        if not text or text == EOT or len(text.split()) != 1 or text != text.strip() or texts.count(text) > 1:
            raise UserError(
                f"data.special_tokens has {text!r}; each is written once, without white space, and is not {EOT}, which "
                "every tokenizer has: ['<|user|>', '<|assistant|>'] works."
            )
    if texts and tokenizer == "char":
        raise UserError(
            "data.special_tokens does not go with data.tokenizer=char, whose tokens are single characters; gpt2, byte, "
            "bpe:N and .tiktoken files take them."
        )


def with_special_tokens(tokenizer: Tokenizer, texts: Sequence[str]) -> Tokenizer:
    """The tokenizer with these special tokens, the new ones behind its vocabulary.

    Raises UserError for a char tokenizer.
    """
    if isinstance(tokenizer, CharTokenizer):
        check_special_tokens(texts, tokenizer.kind)
        return tokenizer
    pairs = _as_byte_pairs(tokenizer)
    new = [text for text in texts if text not in pairs.specials]
    if not new:
        return tokenizer
    behind = {text: pairs.vocab_size + n for n, text in enumerate(new)}
    grown = BytePairTokenizer(
        f"{pairs.name}+{len(new)}",
        pairs.ranks,
        pairs.pattern,
        {**pairs.specials, **behind},
        eot=pairs.eot_text,
        nfc=pairs.nfc,
        conventions=pairs.conventions,
    )
    return with_chat_template(grown, tokenizer.chat_template)


def with_chat_template(tokenizer: Tokenizer, template: str | None) -> Tokenizer:
    """The tokenizer with this chat template. Raises UserError for one that is no text."""
    if template == tokenizer.chat_template:
        return tokenizer
    if not isinstance(template, str):
        raise UserError(f"the tokenizer {tokenizer.name} has a chat template that is no text: {template!r:.40}.")
    with_it = copy.copy(tokenizer) if isinstance(tokenizer, CharTokenizer) else _as_byte_pairs(tokenizer)
    with_it.chat_template = without_surrogates(template)
    return with_it


def _as_byte_pairs(tokenizer: Tokenizer) -> BytePairTokenizer:
    """A new tokenizer with the same ids; `gpt2` and `byte` are names of those that have nothing besides."""
    if isinstance(tokenizer, BytePairTokenizer):
        if tokenizer.kind == BytePairTokenizer.kind:
            return copy.copy(tokenizer)
        return BytePairTokenizer(tokenizer.name, tokenizer.ranks, tokenizer.pattern, tokenizer.specials)
    return BytePairTokenizer(tokenizer.name, {bytes([b]): b for b in range(256)}, GPT2_PATTERN, {EOT: tokenizer.eot})


# nanoGPT's meta.pkl, and the tokenizer of a folder of shards.


def characters_of(folder: Path) -> CharTokenizer | None:
    """The tokenizer of the meta.pkl beside nanoGPT's tokens; None for a folder without one.

    It is a pickle, and loading one can run code: `plain_pickle` refuses one that names any. Raises UserError for one
    that describes no characters.
    """
    path = file_inside(folder, META)
    if ready_format(folder) != "nanogpt" or not path.is_file():
        return None

    from nanogpt_lit.untrusted.imports import plain_pickle  # for this one file of another program

    try:
        with path.open("rb") as file:
            character_of = plain_pickle(file.read(LARGEST))["itos"]
        characters = [character_of[token] for token in range(len(character_of))]
    except Exception as error:  # what the reader raises for a damaged file is not one family
        raise UserError(
            f"{path} does not say which character each token is ({in_brief(error)}); nanoGPT's "
            "data/shakespeare_char/prepare.py writes it, and without it data.tokenizer counts."
        ) from error
    if not all(isinstance(c, str) and len(c) == 1 for c in characters) or characters != sorted(set(characters)):
        raise UserError(
            f"{path} numbers its characters otherwise than nanoGPT, which sorts them; prepare the text itself with "
            "data.source and data.tokenizer: char."
        )
    return CharTokenizer(characters)


def tokenizer_of_shards(folder: Path, named: str) -> Tokenizer:
    """The tokenizer that a folder of shards was made with. named: data.tokenizer, which counts for foreign shards

    Raises UserError where the two contradict each other, or the folder's files do.
    """
    if ready_format(folder) not in ("nanogpt", "llm.c"):
        return tokenizer_from_files(read_tokenizer_files(folder, read_manifest(folder)))
    kind, argument = parse_tokenizer(named)
    if (characters := characters_of(folder)) is not None:
        if kind in ("char", "gpt2"):  # the default too
            return characters
        raise UserError(
            f"data.tokenizer={named} is not what data.source={folder} was made with: its {META} lists "
            f"{len(characters.characters)} characters; data.tokenizer: char works."
        )
    if kind == "gpt2":
        return gpt2_tokenizer()
    if kind == "byte":
        return ByteTokenizer()
    if kind == "file":
        return tokenizer_from_file(Path(argument))
    raise UserError(
        f"data.tokenizer={named} is made from text, but data.source={folder} holds tokens; name the tokenizer they "
        "were made with: gpt2, byte or a .tiktoken file."
    )
