"""Our tokenizers as Hugging Face's tokenizer.json, and the patterns that both cut text into words by.

Needs the package tokenizers only to compare patterns.
"""

import json
from typing import Any

from nanogpt_lit.data.bpe import Merge, UnreachableToken, all_merges_of, as_characters, merges_of
from nanogpt_lit.data.tokenizer import (
    EOT,
    GPT2_PATTERN,
    BytePairTokenizer,
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
)
from nanogpt_lit.errors import UserError

# The patterns by which known tokenizers cut text into words, and Hugging Face's pre-tokenizers as such a pattern.

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2_PATTERN = LLAMA3_PATTERN.replace("{1,3}", "")
"""Each digit alone."""
# SmolLM's tokenizer first takes each digit out, and cuts what lies between as GPT-2. So white space before a digit is
# white space at the end of a text: all of it together, and no space with the digit.
SMOLLM_PATTERN = GPT2_PATTERN.replace(r" ?\p{N}++", r"\p{N}").replace(r"|\s++$", r"|\s++(?=\p{N})|\s++$")

NAMES = {
    GPT2_PATTERN: "gpt-2",
    SMOLLM_PATTERN: "smollm",
    LLAMA3_PATTERN: "llama-bpe",
    QWEN2_PATTERN: "qwen2",
}
"""llama.cpp's name of each (tokenizer.ggml.pre)."""

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
"""GPT-2's pattern, and then bytes."""
BYTES = {**BYTE_LEVEL, "use_regex": False}
DIGITS = {"type": "Digits", "individual_digits": True}


def pre_tokenizer_of(pattern: str) -> dict[str, Any]:
    """The pre_tokenizer of a tokenizer.json that cuts by this pattern."""
    if pattern == GPT2_PATTERN:
        return BYTE_LEVEL
    if pattern == SMOLLM_PATTERN:
        return {"type": "Sequence", "pretokenizers": [DIGITS, BYTE_LEVEL]}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, BYTES]}


def pattern_of(pre_tokenizer: Any) -> str | None:
    """The pattern that cuts text as this pre_tokenizer of a tokenizer.json; None for a way that is not known."""
    match pre_tokenizer:
        case {"type": "Sequence", "pretokenizers": [*before, {"type": "ByteLevel"} as last]}:
            pass
        case _:
            before, last = [], pre_tokenizer
    match last:
        case {"type": "ByteLevel", "add_prefix_space": False}:
            by_gpt2 = last.get("use_regex", True)
        case _:
            return None
    match before:
        case [] if by_gpt2:
            return GPT2_PATTERN
        case [{"type": "Digits", "individual_digits": True}] if by_gpt2:
            return SMOLLM_PATTERN
        case [{"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated" | "Removed", **rest}]:
            return pattern if not by_gpt2 and isinstance(rest.get("invert"), bool) else None
    return None


# A whole tokenizer.

SAMPLE = (
    "It's what they'd've said:  'll 1234567 3.14\n\n\n\tdef f(x):\r\n    return x  \n"
    "Größe, naïve café. Привет, мир! Ελληνικά 中文字符，日本語のテキスト 한국어 "
    "عربى हिन्दी ไทย \u00a0\u2003 🙂👩‍👩‍👧 ½ Ⅷ ١٢٣ İSTANBUL ſ"
    " <b>&amp;</b> CamelCase snake_case __init__ $100 50% a.b.c --option=value   42 \n 7\t8  "
    " cafe\u0301 A\u030a \u212b \uac00\u1100\u1161 IT'S THEY'LL'RE !!\n\n?\r\n  "
)
"""Text that two tokenizers must cut alike: contractions, runs of spaces, numbers, scripts, marks, joined emoji."""


def to_hugging_face(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of tokenizer.json, with the same ids. Raises UserError for a vocabulary or a pattern that it cannot
    express."""
    specials = {EOT: tokenizer.eot}
    pre_tokenizer: dict[str, Any] | None = BYTES
    decoder: dict[str, Any] = BYTES
    merges: list[Merge] = []
    words: set[str] = set()
    nfc = whole_words = False
    bos = None
    match tokenizer:
        case ByteTokenizer():
            vocabulary = {as_characters(bytes([byte])): byte for byte in range(256)}
        case CharTokenizer():
            vocabulary = {character: n for n, character in enumerate(tokenizer.characters)}
            pre_tokenizer, decoder = None, {"type": "Fuse"}
        case BytePairTokenizer():
            specials = dict(tokenizer.specials)
            vocabulary = {as_characters(token): rank for token, rank in tokenizer.ranks.items()}
            try:
                merges = merges_of(tokenizer.ranks)
            except UnreachableToken:
                merges, whole_words = all_merges_of(tokenizer.ranks), True
            pre_tokenizer, decoder, nfc = pre_tokenizer_of(tokenizer.pattern), BYTE_LEVEL, tokenizer.nfc
            if (known := tokenizer.conventions) is not None:
                words, bos = set(known.words), known.bos if known.adds_bos else None
        case _:
            raise UserError(f"the tokenizer {tokenizer.name} is of kind {tokenizer.kind}, which has no tokenizer.json.")
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    written = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": n, "content": text, **flags, "special": text not in words}
            for text, n in sorted(specials.items(), key=lambda s: s[1])
        ],
        "normalizer": {"type": "NFC"} if nfc else None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None if bos is None else before_each_text(bos, specials[bos]),
        "decoder": decoder,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": whole_words,
            "vocab": {**vocabulary, **specials},
            "merges": [[as_characters(left), as_characters(right)] for left, right in merges],
        },
    }
    if isinstance(tokenizer, BytePairTokenizer) and tokenizer.pattern != GPT2_PATTERN:
        check_same_ids(written, tokenizer, f"the tokenizer {tokenizer.name}")
    return written


def before_each_text(special: str, token_id: int) -> dict[str, Any]:
    """The post_processor that puts this special token before a text."""
    first = {"SpecialToken": {"id": special, "type_id": 0}}
    text, second = ({"Sequence": {"id": name, "type_id": n}} for n, name in enumerate("AB"))
    return {
        "type": "TemplateProcessing",
        "single": [first, text],
        "pair": [first, text, second],
        "special_tokens": {special: {"id": special, "ids": [token_id], "tokens": [special]}},
    }


def check_same_ids(described: dict[str, Any], tokenizer: BytePairTokenizer, name: str) -> None:
    """Raises UserError where the two cut the sample, or its special tokens, otherwise: their regular expressions are of
    two libraries."""
    try:
        from tokenizers import Tokenizer as Theirs
    except ImportError as error:
        raise UserError(
            f"{name} has a pattern of its own, which is compared through the package tokenizers: "
            '`pip install "nanogpt_lit[bpe]"`.'
        ) from error
    specials = sorted(tokenizer.specials.keys() - {tokenizer.eot_text})  # end-of-text is plain text in ours
    sample = SAMPLE + "".join(f"x {text} \u0338y{text}" for text in specials)
    try:
        theirs = Theirs.from_str(json.dumps(described)).encode(sample, add_special_tokens=False).ids
    except Exception as error:  # the library raises Exception itself
        raise UserError(f"{name} has a pattern that Hugging Face's tokenizers cannot read: {error}.") from error
    if theirs != tokenizer.encode(sample).tolist():
        raise UserError(
            f"{name} has a pattern that Hugging Face's tokenizers and tiktoken read differently; GPT-2's works."
        )
