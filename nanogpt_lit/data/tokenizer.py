"""Text to tokens and back: bytes, characters, or byte pairs by tiktoken.

A tokenizer is also a few small text files (`files`), which lie beside the shards and inside every checkpoint, so that
tokens are never decoded with another one than they were made with.
"""

import hashlib
import json
import re
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from typing import Any, ClassVar

import numpy as np
import tiktoken

from nanogpt_lit.data.bpe import Ranks, check_pattern, dump_ranks, gpt2_ranks, missing_bytes
from nanogpt_lit.data.shard_file import token_dtype
from nanogpt_lit.errors import UserError

EOT = "<|endoftext|>"
"""End-of-text as it is written when tokens are decoded. In a document these characters are plain text; other special
tokens are read there as what they stand for."""

# How GPT-2 cuts text into words before merging, in the possessive form that tiktoken uses (no backtracking).
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

TOKENIZER_JSON = "tokenizer.json"
TOKENIZER_RANKS = "tokenizer.tiktoken"
CHAT_TEMPLATE = "chat_template.jinja"
TOKENIZER_FILES = (TOKENIZER_JSON, TOKENIZER_RANKS, CHAT_TEMPLATE)
"""All that a tokenizer may have."""

UNKNOWN = "\N{REPLACEMENT CHARACTER}".encode()  # what an id beyond the tokenizer decodes to (padded vocabularies)

ID_LIMIT = 1 << 24
"""Far beyond any vocabulary: a table of all ids is held, and a file must not be able to ask for all memory."""


class Tokenizer(ABC):
    """Encodes text to ids below `vocab_size`. `eot`, the end-of-text id, is part of the vocabulary."""

    kind: ClassVar[str]
    eot_text: str = EOT
    """End-of-text as it is written when tokens are decoded."""
    conventions: "Conventions | None" = None
    """Conventions of the program that the tokenizer comes from."""
    chat_template: str | None = None
    """Jinja template that writes a conversation as one text; `with_chat_template` sets it."""

    def __init__(self, name: str, token_bytes: Sequence[bytes], eot: int) -> None:
        self.name = name
        self.vocab_size = len(token_bytes)
        self.eot = eot
        self.dtype = token_dtype(self.vocab_size)
        self._token_bytes = token_bytes

    def encode(self, text: str) -> np.ndarray:
        """Ids of the text, in the shards' dtype. An end-of-text that is written in it is plain text."""
        try:
            return self._encode(text)
        except UnicodeEncodeError:  # lone surrogates, as a prompt from a terminal may hold
            return self._encode(without_surrogates(text))

    @abstractmethod
    def _encode(self, text: str) -> np.ndarray: ...

    def encode_stream(self, pieces: Sequence[tuple[str, bool]]) -> np.ndarray:
        """Ids of (text, whether it starts a document) one after another, `eot` before every start."""
        eot = np.array([self.eot], dtype=self.dtype)
        parts: list[np.ndarray] = []
        for text, starts_document in pieces:
            parts += [eot, self.encode(text)] if starts_document else [self.encode(text)]
        return np.concatenate(parts)

    def decode(self, tokens: Iterable[int]) -> str:
        """The text; bytes that are no UTF-8 and ids beyond the vocabulary become U+FFFD."""
        return self.decode_bytes(tokens).decode("utf-8", errors="replace")

    def decode_bytes(self, tokens: Iterable[int]) -> bytes:
        """The bytes; a character may be cut at either end, so streams decode these incrementally."""
        table, size = self._token_bytes, self.vocab_size
        return b"".join(table[t] if 0 <= t < size else UNKNOWN for t in map(int, tokens))

    def byte_lengths(self) -> np.ndarray:
        """(vocab_size,) int64: how many bytes of UTF-8 each id decodes to."""
        return np.array([len(token) for token in self._token_bytes], dtype=np.int64)

    @property
    def ends(self) -> set[int]:
        """The ids that end a text: end-of-text, and what other programs take for the end of one or of an answer."""
        eos = None if self.conventions is None else self.conventions.eos
        return {self.eot} if eos is None else {self.eot, self.id_of(eos)}

    def id_of(self, special: str) -> int:
        """The id of a special token. Raises KeyError for a text that is none."""
        return {self.eot_text: self.eot}[special]

    def files(self) -> dict[str, str]:
        """File name to text; `tokenizer_from_files` turns it back into this tokenizer."""
        files = {TOKENIZER_JSON: json.dumps(self._description(), indent=1) + "\n"}
        return files if self.chat_template is None else {**files, CHAT_TEMPLATE: self.chat_template}

    def _description(self) -> dict[str, Any]:
        return {"kind": self.kind, "name": self.name, "vocab_size": self.vocab_size, "eot": self.eot}

    @property
    def sha256(self) -> str:
        return files_sha256(self.files())


class ByteTokenizer(Tokenizer):
    """The 256 bytes of UTF-8, then end-of-text."""

    kind = "byte"

    def __init__(self) -> None:
        super().__init__("byte", [*(bytes([b]) for b in range(256)), EOT.encode()], eot=256)

    def _encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(self.dtype)


class CharTokenizer(Tokenizer):
    """The characters of a text in the order of their code points, then end-of-text."""

    kind = "char"

    def __init__(self, characters: Iterable[str]) -> None:
        self.characters = "".join(sorted(set(characters)))
        super().__init__("char", [*(c.encode() for c in self.characters), EOT.encode()], eot=len(self.characters))
        codes = [ord(c) for c in self.characters]
        self._id_of = np.full(max(codes, default=0) + 2, -1, dtype=np.int32)  # by code point; last: no character
        self._id_of[codes] = np.arange(len(codes))

    @classmethod
    def of(cls, texts: Iterable[str]) -> "CharTokenizer":
        """The characters of these texts."""
        seen = np.zeros(0x110000, dtype=bool)
        for text in texts:
            seen[np.frombuffer(text.encode("utf-32-le"), dtype="<u4")] = True
        return cls(map(chr, np.flatnonzero(seen)))

    def _encode(self, text: str) -> np.ndarray:
        codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
        ids = self._id_of[np.minimum(codes, len(self._id_of) - 1)]
        if ids.size and ids.min() < 0:
            unknown = chr(codes[ids.argmin()])
            raise UserError(
                f"the character {unknown!r} (U+{ord(unknown):04X}) is not among the {len(self.characters)} that this "
                "char tokenizer was made from; leave it out, or train with data.tokenizer: byte, which knows every one."
            )
        return ids.astype(self.dtype)

    def _description(self) -> dict[str, Any]:
        return {**super()._description(), "characters": self.characters}


@dataclass(frozen=True)
class Conventions:
    """Conventions of other programs for the special tokens of a tokenizer of theirs; exports hand them on."""

    bos: str | None
    """Begins a text there."""

    eos: str | None
    """Ends a text there, or the answer of a chat."""

    adds_bos: bool
    """`bos` is put before a text without being asked for."""

    words: Sequence[str] = ()
    """Shown there where special tokens are left out, such as <think>."""

    def check(self, name: str, specials: Mapping[str, int]) -> None:
        """Raises UserError, naming the tokenizer, for what is not one of its special tokens."""
        named = [text for text in (self.bos, self.eos, *self.words) if text is not None]
        for text in named:
            if text not in specials:
                raise UserError(f"the tokenizer {name} has no special token {text!r}, which it is said to use.")


class BytePairTokenizer(Tokenizer):
    """Byte pairs, encoded by tiktoken, which releases the interpreter lock: threads encode in parallel.

    eot: the special token that begins a document here   nfc: whether text is composed first (Unicode's form NFC)
    """

    kind = "bpe"

    def __init__(
        self,
        name: str,
        ranks: Ranks,
        pattern: str,
        specials: Mapping[str, int],
        *,
        eot: str = EOT,
        nfc: bool = False,
        conventions: Conventions | None = None,
    ) -> None:
        if not isinstance(specials, Mapping) or eot not in specials:
            raise UserError(f"the tokenizer {name} has no special token {eot}; documents are separated by it.")
        ids = [*ranks.values(), *specials.values()]
        if not all(isinstance(text, str) and text for text in specials):
            raise UserError(f"the tokenizer {name} has a special token without a text.")
        for token_id in ids:
            if type(token_id) is not int or not 0 <= token_id < ID_LIMIT:
                raise UserError(f"the tokenizer {name} has the token id {token_id!r}; 0 to {ID_LIMIT - 1:,} work.")
        if len(set(ids)) != len(ids):
            raise UserError(f"the tokenizer {name} gives a special token the id of another token.")
        token_bytes = [UNKNOWN] * (max(ids) + 1)
        for token, rank in ranks.items():
            token_bytes[rank] = token
        for token_text, rank in specials.items():
            token_bytes[rank] = token_text.encode()
        super().__init__(name, token_bytes, specials[eot])
        self.ranks, self.pattern, self.specials = ranks, pattern, dict(specials)
        self.eot_text, self.nfc, self.conventions = eot, nfc, conventions
        if conventions is not None:
            conventions.check(name, specials)
        self._special_texts = re.compile(f"({'|'.join(map(re.escape, sorted(specials, key=len, reverse=True)))})")
        # tiktoken breaks off at a byte without an id.
        self._missing = {byte: self.vocab_size + n for n, byte in enumerate(missing_bytes(ranks))}
        self._lengths: np.ndarray | None = None
        if pattern != GPT2_PATTERN:  # which is known to leave nothing out
            check_pattern(name, pattern)
            self._lengths = np.array([len(token) for token in token_bytes])
        try:
            self._encoding = tiktoken.Encoding(
                name, pat_str=pattern, mergeable_ranks={**ranks, **self._missing}, special_tokens=dict(specials)
            )
        except (ValueError, TypeError) as error:
            raise UserError(f"the tokenizer {name} has a pattern that is not a regular expression: {error}") from error

    def _encode(self, text: str) -> np.ndarray:
        return self._checked(text, set(self.specials) - {self.eot_text})

    def id_of(self, special: str) -> int:
        return self.specials[special]

    def encode_stream(self, pieces: Sequence[tuple[str, bool]]) -> np.ndarray:
        # One call for many short documents spares a wait for the interpreter lock after each of them. Where a
        # document itself says <|endoftext|>, tiktoken could not tell the two apart.
        eot = self.eot_text
        if any(eot in text for text, _ in pieces):
            return super().encode_stream(pieces)
        joined = "".join(eot + text if starts_document else text for text, starts_document in pieces)
        return self._checked(joined, set(self.specials))

    def _checked(self, text: str, specials: set[str]) -> np.ndarray:
        """tiktoken's ids. Raises UserError where the pattern gives up on the text or leaves some of it out, and for a
        byte that is no token.

        specials: those that are read as what they stand for; the others are plain text
        """
        if self.nfc:
            text = self._composed(text)
        try:
            ids = self._encoding.encode_to_numpy(text, allowed_special=specials, disallowed_special=())
        except UnicodeEncodeError:
            raise
        except ValueError as error:
            raise UserError(f"the pattern of the tokenizer {self.name} gives up on this text: {error}") from error
        if self._missing and ids.size and ids.max() >= self.vocab_size:
            byte = list(self._missing)[ids.max() - self.vocab_size]
            raise UserError(
                f"the tokenizer {self.name} has no token for the byte {byte[0]:#04x}, which no text had that "
                f"it was made from; leave {ascii(byte.decode()) if byte.isascii() else 'characters with it'} out."
            )
        if self._lengths is not None:
            there, encoded = len(text.encode()), int(self._lengths[ids].sum())
            if encoded != there:
                raise UserError(
                    f"the pattern of the tokenizer {self.name} leaves out {there - encoded:,} bytes of {there:,} of a "
                    "piece of this text; every character has to belong to a word."
                )
        return ids.astype(self.dtype)

    def _composed(self, text: str) -> str:
        """The text in NFC, each stretch between special tokens for itself."""
        if unicodedata.is_normalized("NFC", text):
            return text
        stretches = self._special_texts.split(text)  # every second one is a special token
        return "".join(part if n % 2 else unicodedata.normalize("NFC", part) for n, part in enumerate(stretches))

    @cached_property
    def _ranks_text(self) -> str:
        return dump_ranks(self.ranks)

    def files(self) -> dict[str, str]:
        return {**super().files(), TOKENIZER_RANKS: self._ranks_text}

    def _description(self) -> dict[str, Any]:
        return {
            **super()._description(),
            "pattern": self.pattern,
            "specials": self.specials,
            "ranks_sha256": hashlib.sha256(self._ranks_text.encode()).hexdigest(),
            **({"nfc": True} if self.nfc else {}),
            **({"conventions": asdict(self.conventions)} if self.conventions is not None else {}),
        }


class GPT2Tokenizer(BytePairTokenizer):
    """GPT-2's tokenizer. Its file holds the name alone: the ranks are rebuilt from the package, by their hash."""

    kind = "gpt2"
    files, _description = Tokenizer.files, Tokenizer._description

    def __init__(self) -> None:
        super().__init__("gpt2", gpt2_ranks(), GPT2_PATTERN, {EOT: 50256})


@cache
def gpt2_tokenizer() -> GPT2Tokenizer:
    """The one of this process: tiktoken takes a moment to build it."""
    return GPT2Tokenizer()


def files_sha256(files: Mapping[str, str]) -> str:
    """One hash over the names and texts of a tokenizer's files."""
    return hashlib.sha256(json.dumps(dict(sorted(files.items()))).encode()).hexdigest()


def without_surrogates(text: str) -> str:
    """The text with surrogate pairs joined and lone ones replaced by U+FFFD, so that UTF-8 can hold it."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
