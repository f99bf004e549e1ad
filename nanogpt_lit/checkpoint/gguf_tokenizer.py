"""Tokenizers in a GGUF file: llama.cpp's byte-level one, with a name in the place of a pattern."""

from typing import Any

from nanogpt_lit.checkpoint.gguf_file import GGUFFile
from nanogpt_lit.data.bpe import (
    Merge,
    UnreachableToken,
    all_merges_of,
    as_bytes,
    as_characters,
    merges_of,
    ranks_of,
)
from nanogpt_lit.data.tokenizer import (
    BytePairTokenizer,
    ByteTokenizer,
    CharTokenizer,
    Conventions,
    Tokenizer,
)
from nanogpt_lit.data.tokenizer_files import with_chat_template
from nanogpt_lit.data.tokenizer_json_reader import byte_pairs, known_or
from nanogpt_lit.data.tokenizer_json_writer import LLAMA3_PATTERN, NAMES, QWEN2_PATTERN
from nanogpt_lit.errors import UserError, in_brief

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5
"""llama.cpp's types of tokens. User-defined ones are shown where special ones are left out."""
SPECIAL = (UNKNOWN, CONTROL, USER_DEFINED)
PATTERNS = {name: pattern for pattern, name in NAMES.items()}
KEY = "tokenizer.ggml."
CHAT_TEMPLATE = "tokenizer.chat_template"


def add_tokenizer(writer: Any, tokenizer: Tokenizer, rows: int) -> None:
    """Write the tokenizer through a gguf.GGUFWriter.

    rows: of the embedding; those beyond the tokenizer are padding
    Raises UserError for one that cuts text in a way that llama.cpp has no name for.
    """
    texts, kinds = token_list(tokenizer, rows)
    ends = tokenizer.conventions or Conventions(tokenizer.eot_text, tokenizer.eot_text, adds_bos=True)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name_of(tokenizer))
    writer.add_token_list(texts)
    writer.add_token_types(kinds)
    writer.add_token_merges(lines_of(merges_for(tokenizer)))
    if ends.bos is not None:
        writer.add_bos_token_id(tokenizer.id_of(ends.bos))
    if ends.eos is not None:
        writer.add_eos_token_id(tokenizer.id_of(ends.eos))
    writer.add_pad_token_id(tokenizer.eot)
    # As `generate` here: end-of-text begins a document.
    writer.add_add_bos_token(ends.adds_bos)
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)


def token_list(tokenizer: Tokenizer, rows: int) -> tuple[list[str], list[int]]:
    """Text and type of each of the first `rows` ids."""
    texts, kinds = [f"[PAD{n}]" for n in range(rows)], [UNUSED] * rows
    for n, token in tokens_of(tokenizer):
        texts[n], kinds[n] = as_characters(token), NORMAL
    specials = tokenizer.specials if isinstance(tokenizer, BytePairTokenizer) else {tokenizer.eot_text: tokenizer.eot}
    words = tokenizer.conventions.words if tokenizer.conventions is not None else ()
    for text, n in specials.items():
        texts[n], kinds[n] = text, USER_DEFINED if text in words else CONTROL
    return texts, kinds


def tokens_of(tokenizer: Tokenizer) -> list[tuple[int, bytes]]:
    """Ids and bytes of all that is no special token."""
    match tokenizer:
        case BytePairTokenizer():
            return [(rank, token) for token, rank in tokenizer.ranks.items()]
        case CharTokenizer():
            return [(n, character.encode()) for n, character in enumerate(tokenizer.characters)]
    return [(byte, bytes([byte])) for byte in range(256)]


def name_of(tokenizer: Tokenizer) -> str:
    """llama.cpp's name for the pattern. Raises UserError for one that has none."""
    if not isinstance(tokenizer, BytePairTokenizer):
        return "gpt-2"
    if tokenizer.pattern not in NAMES:
        raise UserError(
            f"the tokenizer {tokenizer.name} cuts text by a pattern of its own, and a GGUF file names one of "
            f"llama.cpp's, of which convert knows {', '.join(PATTERNS)}; --to hf carries the pattern."
        )
    return NAMES[tokenizer.pattern]


def merges_for(tokenizer: Tokenizer) -> list[Merge]:
    """The merges for llama.cpp. Raises UserError for a token that they cannot reach.

    A character of several bytes is merged from them, from the left. That what is merged on the way is no token does
    not matter there: only what is left at the end is looked up.
    """
    pairs: list[Merge] = []
    match tokenizer:
        case BytePairTokenizer():
            try:
                pairs = merges_of(tokenizer.ranks)
            except UnreachableToken:
                if tokenizer.pattern != LLAMA3_PATTERN:  # with which llama.cpp takes whole words first, as tiktoken
                    raise
                pairs = all_merges_of(tokenizer.ranks)
        case CharTokenizer():
            several = (character.encode() for character in tokenizer.characters)
            pairs = list(dict.fromkeys((c[:n], c[n : n + 1]) for c in several for n in range(1, len(c))))
    # llama.cpp refuses a file without merges. This one never applies: it begins with what is two characters.
    return pairs or [(b"aa", b"aa")]


def remarks(tokenizer: Tokenizer) -> list[str]:
    """Remarks on where llama.cpp's tokenizer differs from ours."""
    if tokenizer.kind == "char":
        return ["A character that the text did not have is left out by its tokenizer there, and refused here."]
    if isinstance(tokenizer, BytePairTokenizer) and tokenizer.nfc:
        return ["Letters and accents that are written apart are joined (NFC) by the tokenizer here, and not there."]
    return []


def tokenizer_of(file: GGUFFile) -> Tokenizer:
    """The file's tokenizer. Raises UserError, naming the file, for one that ours cannot be."""
    metadata, path = file.metadata, file.path
    if (model := metadata.get(f"{KEY}model")) != "gpt2":
        raise UserError(
            f"{path} has a tokenizer of type {model!r}; byte-level BPE can be read, which llama.cpp calls gpt2."
        )
    if (name := metadata.get(f"{KEY}pre")) not in PATTERNS:
        raise UserError(
            f"{path} cuts text into words in llama.cpp's way {name!r}, of which convert knows {', '.join(PATTERNS)}."
        )
    try:
        texts, kinds = list(metadata[f"{KEY}tokens"]), [int(kind) for kind in metadata[f"{KEY}token_type"]]
        merges = [(left, right) for left, right in (merge.split(" ") for merge in metadata[f"{KEY}merges"])]
        numbered = list(enumerate(zip(texts, kinds, strict=True)))
        if not all(isinstance(text, str) for text in texts):
            raise TypeError("tokens that are no texts")
        ends = {}
        for end in ("bos", "eos"):
            n = metadata.get(f"{KEY}{end}_token_id")
            ends[end] = texts[n] if n is not None and n >= 0 and kinds[n] in SPECIAL else None
        adds_bos = bool(metadata.get(f"{KEY}add_bos_token", PATTERNS[name] == LLAMA3_PATTERN))
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise UserError(f"{path} has a tokenizer that is not as llama.cpp writes it ({in_brief(error)}).") from error
    tokenizer: Tokenizer | None = one_of_ours(texts, kinds, merges)
    if tokenizer is None:
        words = [text for text, kind in zip(texts, kinds, strict=True) if kind == USER_DEFINED]
        pairs = byte_pairs(
            path.stem,
            ranks_of(
                {text: n for n, (text, kind) in numbered if kind == NORMAL},
                merges,
                str(path),
                whole_words=PATTERNS[name] == LLAMA3_PATTERN,
            ),
            PATTERNS[name],
            {text: n for n, (text, kind) in numbered if kind in SPECIAL},
            Conventions(ends["bos"], ends["eos"], adds_bos and ends["bos"] is not None, words),
            str(path),
            nfc=PATTERNS[name] == QWEN2_PATTERN,  # which Qwen's own tokenizer does, and llama.cpp does not
        )
        tokenizer = known_or(pairs)
    return with_chat_template(tokenizer, metadata.get(CHAT_TEMPLATE))


def one_of_ours(texts: list[str], kinds: list[int], merges: list[tuple[str, str]]) -> Tokenizer | None:
    """The byte or char tokenizer, where the file has what we write for it."""
    candidates: list[Tokenizer] = [ByteTokenizer()]
    try:
        tokens = [as_bytes(text).decode() for text, kind in zip(texts, kinds, strict=True) if kind == NORMAL]
    except (KeyError, UnicodeDecodeError):
        tokens = []
    if all(len(token) == 1 for token in tokens):
        candidates.append(CharTokenizer(tokens))
    for ours in candidates:
        if ours.vocab_size <= len(texts) and token_list(ours, len(texts)) == (texts, kinds):
            return ours if lines_of(merges_for(ours)) == [" ".join(merge) for merge in merges] else None
    return None


def lines_of(merges: list[Merge]) -> list[str]:
    """Two tokens a line, as byte-level vocabularies write them."""
    return [f"{as_characters(left)} {as_characters(right)}" for left, right in merges]
