"""The tokenizer of a Hugging Face folder as one of ours, where ours gives the same ids."""

import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from nanogpt_lit.data.bpe import Ranks, ranks_of
from nanogpt_lit.data.tokenizer import (
    EOT,
    GPT2_PATTERN,
    BytePairTokenizer,
    ByteTokenizer,
    CharTokenizer,
    Conventions,
    Tokenizer,
    gpt2_tokenizer,
)
from nanogpt_lit.data.tokenizer_files import with_chat_template
from nanogpt_lit.data.tokenizer_json_writer import check_same_ids, pattern_of, to_hugging_face
from nanogpt_lit.errors import UserError, in_brief

TOKENIZER, CONFIG, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
VOCABULARY, MERGES = "vocab.json", "merges.txt"


def from_hugging_face(folder: Path) -> Tokenizer | None:
    """The tokenizer of tokenizer.json, or of vocab.json and merges.txt; None for a folder without either.

    Raises UserError, naming the file, for one that is damaged or cuts text in a way that ours cannot.
    """
    if (path := folder / TOKENIZER).is_file():
        described = read_json(path)
        config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
        try:
            return with_chat_template(tokenizer_of(described, config, path), chat_template_of(folder, config))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{path} is not as tokenizers writes it ({in_brief(error)}).") from error
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
    ranks = ranks_of(vocabulary, merges, str(folder / MERGES))
    return known_or(BytePairTokenizer(folder.name, ranks, GPT2_PATTERN, {EOT: eot}))


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON: {' '.join(str(error).split())[:100]}.") from error


def chat_template_of(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The folder's chat template, from its own file or from tokenizer_config.json; of several, the one by default."""
    if (path := folder / TEMPLATE).is_file():
        try:
            return path.read_bytes().decode()
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read as text: {' '.join(str(error).split())[:100]}.") from error
    template = config.get("chat_template")
    if isinstance(template, list):
        return {one["name"]: one["template"] for one in template}.get("default")
    return template


def tokenizer_of(described: dict[str, Any], config: Mapping[str, Any], path: Path) -> Tokenizer:
    """config: of tokenizer_config.json"""
    model = described["model"]
    if model.get("type", "BPE") != "BPE":
        raise UserError(f"{path} is a {model['type']} tokenizer; byte-level BPE, as GPT-2's, can be read.")
    added = {token["content"]: token for token in described.get("added_tokens") or []}
    specials = {text: token["id"] for text, token in added.items()}
    vocabulary = {text: n for text, n in model["vocab"].items() if text not in added}
    if ours := one_of_ours(described, vocabulary, specials):
        return ours
    normalizer = described.get("normalizer")
    if normalizer not in (None, {"type": "NFC"}):
        raise UserError(
            f"{path} changes text before it is cut ({normalizer['type']}); NFC alone can be read, as Qwen's has it."
        )
    check_added(added, path)
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(key):
            raise UserError(f"{path} has {key}={model[key]!r} in its model; byte-level BPE without it can be read.")
    pattern = pattern_of(described["pre_tokenizer"])
    if pattern is None:
        raise UserError(
            f"{path} cuts text into words in another way than by one pattern and bytes; GPT-2's way can be read, and "
            "SmolLM's, Llama 3's and Qwen's."
        )
    words = [text for text, token in added.items() if not token["special"]]
    conventions = conventions_of(described.get("post_processor"), config, words, path)
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    tokenizer = byte_pairs(
        path.parent.name,
        ranks_of(vocabulary, merges, str(path), whole_words=bool(model.get("ignore_merges"))),
        pattern,
        specials,
        conventions,
        str(path),
        nfc=normalizer is not None,
    )
    if pattern != GPT2_PATTERN:
        check_same_ids(described, tokenizer, str(path))
    return known_or(tokenizer)


def check_added(added: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Raises UserError for added tokens that take more than their own characters, or of which one begins another."""
    for text, token in added.items():
        if flags := [flag for flag in ("lstrip", "rstrip", "single_word") if token.get(flag)]:
            raise UserError(
                f"{path} has {flags[0]} for its token {text!r}; tokens that stand for themselves can be read."
            )
    texts = sorted(added)
    for text, following in pairwise(texts):
        if following.startswith(text):
            raise UserError(f"{path} adds {text!r} and {following!r}, which begin alike; ours could read either.")


def conventions_of(post_processor: Any, config: Mapping[str, Any], words: list[str], path: Path) -> Conventions:
    """The folder's use of its special tokens. Raises UserError where it adds others than one before a text."""
    bos, eos = (as_text(config.get(name)) for name in ("bos_token", "eos_token"))
    steps = post_processor["processors"] if (post_processor or {}).get("type") == "Sequence" else [post_processor]
    adds_bos = False
    for step in steps:
        match step:
            case None | {"type": "ByteLevel"}:  # which moves offsets alone
                pass
            case {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A"}}]}:
                pass
            case {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": str(first)}}, {"Sequence": {"id": "A"}}],
            }:
                bos, adds_bos = first, True
            case _:
                raise UserError(
                    f"{path} adds tokens around a text ({step['type']}); one before it, such as <|begin_of_text|>, can "
                    "be read."
                )
    return Conventions(bos, eos, adds_bos, words)


def as_text(token: Any) -> str | None:
    """A special token of tokenizer_config.json, which is written as its text or as an object."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def byte_pairs(
    name: str,
    ranks: Ranks,
    pattern: str,
    specials: Mapping[str, int],
    conventions: Conventions,
    source: str,
    nfc: bool = False,
) -> BytePairTokenizer:
    """A tokenizer of elsewhere, with the special token that is to begin a document here.

    That is end-of-text where there is one. SmolLM2's and Qwen's have it beside the tokens of their chats. Llama 3
    begins each text with <|begin_of_text|>, and others end it with a token. Raises UserError where nothing tells.
    """
    chosen = [EOT, conventions.bos if conventions.adds_bos else None, conventions.eos, conventions.bos]
    chosen += specials if len(specials) == 1 else []
    eot = next((text for text in chosen if text in specials), None)
    if eot is None:
        raise UserError(f"{source} has no special token {EOT} and names none that ends a text; documents need one.")
    as_here = {conventions.bos, conventions.eos} <= {None, eot} and not conventions.words
    return BytePairTokenizer(
        name, ranks, pattern, specials, eot=eot, nfc=nfc, conventions=None if as_here else conventions
    )


def known_or(tokenizer: BytePairTokenizer) -> Tokenizer:
    """GPT-2's own tokenizer in the place of its like."""
    gpt2 = gpt2_tokenizer() if len(tokenizer.ranks) == 50256 else None
    parts = [(t.ranks, t.pattern, t.specials) for t in (gpt2, tokenizer) if t is not None]
    return gpt2 if gpt2 is not None and parts[0] == parts[1] else tokenizer


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
