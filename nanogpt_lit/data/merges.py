"""Byte pairs as others write them: ranks here, a list of merges in the files of Hugging Face and in GGUF."""

from collections.abc import Mapping

from nanogpt_lit.data.bpe import Ranks, byte_characters
from nanogpt_lit.errors import UserError

Merge = tuple[bytes, bytes]


def merges_of(ranks: Ranks) -> list[Merge]:
    """The two parts that each token of several bytes is merged from, in the order of ranks.

    Raises UserError for a token that no two others make: merges cannot reach it.
    """
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) == 1:
            continue
        parts = _merged_below(token, rank, ranks)
        if len(parts) != 2:
            raise UserError(
                f"the token {token!r} of the tokenizer is not made of two other tokens, so a list of merges cannot "
                "reach it, and files of Hugging Face and llama.cpp hold such a list; a vocabulary that was learned by "
                "merging (data.tokenizer=bpe:N) works."
            )
        merges.append((parts[0], parts[1]))
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


_CHARACTER_OF = {byte: character for character, byte in byte_characters().items()}
_BYTE_OF = byte_characters()


def as_characters(token: bytes) -> str:
    """The token as byte-level vocabularies write it: one printable character for each byte."""
    return "".join(_CHARACTER_OF[byte] for byte in token)


def as_bytes(characters: str) -> bytes:
    """Raises KeyError for a character that stands for no byte."""
    return bytes(_BYTE_OF[character] for character in characters)


def ranks_of(vocabulary: Mapping[str, int], merges: list[tuple[str, str]], name: str) -> Ranks:
    """The ranks of a byte-level vocabulary. Raises UserError, beginning with `name`, for one that ranks cannot express:
    merges in another order than the ids of what they make."""
    try:
        ranks = {as_bytes(token): token_id for token, token_id in vocabulary.items()}
        listed = [(as_bytes(left), as_bytes(right)) for left, right in merges]
    except KeyError as error:
        raise UserError(
            f"{name} has the character {error} in a token, which stands for no byte; byte-level vocabularies, as "
            "GPT-2's, can be read."
        ) from error
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise UserError(f"{name} lacks the byte {missing[0]:#04x}; vocabularies with all 256 bytes can be read.")
    if merges_of(ranks) != listed:
        raise UserError(
            f"{name} has its merges in another order than the ids of what they make, which tiktoken's ranks cannot "
            "express; vocabularies numbered as they were learned, as GPT-2's, can be read."
        )
    return ranks
