"""A byte-pair tokenizer's pattern, by which text is cut into words: tried on text of every kind before it is used.

tiktoken leaves out what no word matches, without a word, and breaks off where one is empty.
"""

import regex  # type: ignore[import-untyped]

from nanogpt_lit.errors import UserError

SAMPLE = (
    "".join(map(chr, range(128)))
    + " It's 1984, isn't it?  \r\n\t\tnaïve  ZÜRICH Δοκιμή тест 试验 テスト 한국어 العربية हिन्दी 👩‍👩‍👧"
    + " e\u0301\u00a0\u200b\U0001f600 !!!??? 123456789 \n\n\n  end"
    + "a" * 1000
    + " " * 1000
    + "\n" * 1000
    + "end"
)
LONGEST_SEARCH_S = 0.5
"""Seconds of CPU time. GPT-2's pattern takes a thousandth."""


def check_pattern(name: str, pattern: str) -> None:
    """Raises UserError for a pattern that leaves out text, has empty words, or searches without end.

    name: of the tokenizer
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
