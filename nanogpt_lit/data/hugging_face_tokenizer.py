"""Our tokenizers as Hugging Face's tokenizer.json, and back. Needs the package tokenizers only to compare patterns."""

import json
from pathlib import Path
from typing import Any

from nanogpt_lit.data.bpe import Ranks, as_characters, merges_of, ranks_of
from nanogpt_lit.data.tokenizer import (
    EOT,
    GPT2_PATTERN,
    BytePairTokenizer,
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    gpt2_tokenizer,
)
from nanogpt_lit.errors import UserError

TOKENIZER, VOCABULARY, MERGES = "tokenizer.json", "vocab.json", "merges.txt"

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
NO_REGEX = {**BYTE_LEVEL, "use_regex": False}

SAMPLE = (
    "It's what they'd've said:  'll 1234567 3.14\n\n\n\tdef f(x):\r\n    return x  \n"
    "Größe, naïve café. Привет, мир! Ελληνικά 中文字符，日本語のテキスト 한국어 "
    "عربى हिन्दी ไทย \u00a0\u2003 🙂👩‍👩‍👧 ½ Ⅷ ١٢٣ İSTANBUL ſ"
    " <b>&amp;</b> CamelCase snake_case __init__ $100 50% a.b.c --option=value   "
)
"""Text that two tokenizers must cut alike: contractions, runs of spaces, numbers, scripts, marks, joined emoji."""


def to_hugging_face(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of tokenizer.json, with the same ids. Raises UserError for a vocabulary or a pattern that it cannot
    express."""
    specials = {EOT: tokenizer.eot}
    pre_tokenizer: dict[str, Any] | None = NO_REGEX
    decoder: dict[str, Any] = NO_REGEX
    merges: list[list[str]] = []
    match tokenizer:
        case ByteTokenizer():
            vocabulary = {as_characters(bytes([byte])): byte for byte in range(256)}
        case CharTokenizer():
            vocabulary = {character: n for n, character in enumerate(tokenizer.characters)}
            pre_tokenizer, decoder = None, {"type": "Fuse"}
        case BytePairTokenizer():
            specials = dict(tokenizer.specials)
            vocabulary = {as_characters(token): rank for token, rank in tokenizer.ranks.items()}
            merges = [[as_characters(left), as_characters(right)] for left, right in merges_of(tokenizer.ranks)]
            pre_tokenizer, decoder = pre_tokenizer_of(tokenizer.pattern), BYTE_LEVEL
        case _:
            raise UserError(f"the tokenizer {tokenizer.name} is of kind {tokenizer.kind}, which has no tokenizer.json.")
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    written = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": n, "content": text, **flags} for text, n in sorted(specials.items(), key=lambda s: s[1])
        ],
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {**vocabulary, **specials},
            "merges": merges,
        },
    }
    if isinstance(tokenizer, BytePairTokenizer) and tokenizer.pattern != GPT2_PATTERN:
        check_same_ids(written, tokenizer, f"the tokenizer {tokenizer.name}")
    return written


def pre_tokenizer_of(pattern: str) -> dict[str, Any]:
    if pattern == GPT2_PATTERN:
        return BYTE_LEVEL
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, NO_REGEX]}


def check_same_ids(described: dict[str, Any], tokenizer: Tokenizer, name: str) -> None:
    """Raises UserError where the two cut the sample otherwise: their regular expressions are of two libraries."""
    try:
        from tokenizers import Tokenizer as Theirs
    except ImportError as error:
        raise UserError(
            f"{name} has a pattern of its own, which is compared through the package tokenizers: "
            '`pip install "nanogpt_lit[bpe]"`.'
        ) from error
    try:
        theirs = Theirs.from_str(json.dumps(described)).encode(SAMPLE, add_special_tokens=False).ids
    except Exception as error:  # the library raises Exception itself
        raise UserError(f"{name} has a pattern that Hugging Face's tokenizers cannot read: {error}.") from error
    if theirs != tokenizer.encode(SAMPLE).tolist():
        raise UserError(
            f"{name} has a pattern that Hugging Face's tokenizers and tiktoken read differently; GPT-2's works."
        )


def from_hugging_face(folder: Path) -> Tokenizer | None:
    """The tokenizer of tokenizer.json, or of vocab.json and merges.txt; None for a folder without either.

    Raises UserError, naming the file, for one that is damaged or cuts text in a way that ours cannot.
    """
    if (path := folder / TOKENIZER).is_file():
        described = read_json(path)
        try:
            return tokenizer_of(described, path)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{path} is not as tokenizers writes it ({type(error).__name__}: {error}).") from error
    if not (folder / VOCABULARY).is_file() or not (folder / MERGES).is_file():
        return None
    try:
        lines = (folder / MERGES).read_text(encoding="utf-8").split("\n")
        vocabulary = dict(read_json(folder / VOCABULARY))
        eot = vocabulary.pop(EOT)
        merges = [
            (left, right) for left, right in (line.split(" ") for line in lines if line and line[0:8] != "#version")
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder / VOCABULARY} and {MERGES} are not as GPT-2's: tokens to ids with {EOT}, and two tokens a line "
            f"({type(error).__name__})."
        ) from error
    return byte_pairs(folder.name, vocabulary, merges, GPT2_PATTERN, {EOT: eot}, folder / MERGES)


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON: {' '.join(str(error).split())[:100]}.") from error


def tokenizer_of(described: dict[str, Any], path: Path) -> Tokenizer:
    model = described["model"]
    if model.get("type", "BPE") != "BPE":
        raise UserError(f"{path} is a {model['type']} tokenizer; byte-level BPE, as GPT-2's, can be read.")
    added = {token["content"]: token for token in described.get("added_tokens") or []}
    specials = {text: token["id"] for text, token in added.items() if token["special"]}
    vocabulary = {text: n for text, n in model["vocab"].items() if text not in added}
    if ours := one_of_ours(described, vocabulary, specials):
        return ours
    if words := sorted(added.keys() - specials.keys()):
        raise UserError(f"{path} adds the word {words[0]!r} to its vocabulary; special tokens alone can be added.")
    if described.get("normalizer") is not None:
        raise UserError(f"{path} changes text before it is cut ({described['normalizer']['type']}); ours does not.")
    if added_around(described.get("post_processor")):
        raise UserError(f"{path} adds tokens around a text ({described['post_processor']['type']}); ours does not.")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges"):
        if model.get(key):
            raise UserError(f"{path} has {key}={model[key]!r} in its model; byte-level BPE without it can be read.")
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    if EOT not in specials:
        if len(specials) != 1:
            raise UserError(f"{path} has no special token {EOT}; documents are separated by it.")
        specials = {EOT: next(iter(specials.values()))}
    tokenizer = byte_pairs(
        path.parent.name,
        vocabulary,
        merges,
        pattern_of(described["pre_tokenizer"], path),
        specials,
        path,
    )
    if isinstance(tokenizer, BytePairTokenizer) and tokenizer.pattern != GPT2_PATTERN:
        check_same_ids(described, tokenizer, str(path))
    return tokenizer


def added_around(post_processor: Any) -> bool:
    """True where other tokens are added than the end-of-text that begins each document here too."""
    match post_processor:
        case None | {"type": "ByteLevel"}:  # which moves offsets alone
            return False
        case {"type": "TemplateProcessing", "single": [*before, {"Sequence": {"id": "A"}}]}:
            return before not in ([], [{"SpecialToken": {"id": EOT, "type_id": 0}}])
    return True


def one_of_ours(described: dict[str, Any], vocabulary: dict[str, int], specials: dict[str, int]) -> Tokenizer | None:
    """The byte or char tokenizer, where the file is what we write for it."""
    if described["model"]["merges"] or set(specials) != {EOT}:
        return None
    characters = [text for text in vocabulary if len(text) == 1]
    candidates: list[Tokenizer] = [ByteTokenizer(), CharTokenizer(characters)]
    same = (ours for ours in candidates if tokenizing_part(to_hugging_face(ours)) == tokenizing_part(described))
    return next(same, None)


def tokenizing_part(described: dict[str, Any]) -> Any:
    model = described["model"]
    return described.get("pre_tokenizer"), described.get("normalizer"), model["vocab"], model["merges"]


def pattern_of(pre_tokenizer: Any, path: Path) -> str:
    """The pattern that cuts text into words. Raises UserError for ways that are not one pattern and then bytes."""
    match pre_tokenizer:
        case {"type": "ByteLevel", "add_prefix_space": False, **rest} if rest.get("use_regex", True):
            return GPT2_PATTERN
        case {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": str(pattern)},
                    "behavior": "Isolated" | "Removed",
                    "invert": bool(),
                },
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        }:
            return pattern
    raise UserError(
        f"{path} cuts text into words in another way than by one pattern and bytes; GPT-2's way can be read."
    )


def byte_pairs(
    name: str,
    vocabulary: dict[str, int],
    merges: list[tuple[str, str]],
    pattern: str,
    specials: dict[str, int],
    path: Path,
) -> Tokenizer:
    ranks: Ranks = ranks_of(vocabulary, merges, str(path))
    gpt2 = gpt2_tokenizer() if len(ranks) == 50256 else None
    if gpt2 is not None and (ranks, pattern, specials) == (gpt2.ranks, gpt2.pattern, gpt2.specials):
        return gpt2
    return BytePairTokenizer(name, ranks, pattern, specials)
