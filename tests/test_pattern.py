"""Patterns of byte-pair tokenizers that would lose text, break off, or search without end."""

import json
import time

import numpy as np
import pytest

from nanogpt_lit.data.bpe import dump_ranks
from nanogpt_lit.data.pattern import check_pattern
from nanogpt_lit.data.tokenizer import EOT, GPT2_PATTERN, BytePairTokenizer, tokenizer_from_file
from nanogpt_lit.errors import UserError

RANKS = {bytes([b]): b for b in range(256)}
CL100K = (  # of tiktoken_ext/openai_public.py
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]"
    r"|\s+(?!\S)|\s"
)


@pytest.mark.parametrize("pattern", [GPT2_PATTERN, CL100K, r"(?s:.)", r"\w+|\W"])
def test_a_pattern_that_takes_all_text_is_welcome_and_comes_back(pattern):
    tokenizer = BytePairTokenizer("x", RANKS, pattern, {EOT: 256})
    text = "Größe 12, it's <|endoftext|>\r\n  \N{PILE OF POO} end"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    stream = tokenizer.encode_stream([("ab", True), ("c", False), ("ü", True)])
    assert np.array_equal(stream, [256, 97, 98, 99, 256, *"ü".encode()])


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("[a-z]+", "leaves out text"),
        ("zzzzqq", "leaves out text"),
        (".+", "leaves out text, such as '\\\\n"),
        ("", "words without a character"),
        ("x*", "words without a character"),
        (r"(?=a)|[\s\S]", "words without a character"),
        ("(", "not a regular expression"),
        (3, "not a regular expression"),
        (r"(a+)+$(?=x)|[\s\S]", "searches without end"),
        (r"((a+)+)+(?!.)x|[\s\S]", "searches without end"),
    ],
)
def test_any_other_is_refused_when_the_tokenizer_is_made(pattern, said, tmp_path):
    (tmp_path / "x.tiktoken").write_text(dump_ranks(RANKS))
    (tmp_path / "x.json").write_text(json.dumps({"pattern": pattern}))
    started_s = time.process_time()
    with pytest.raises(UserError, match=f"tokenizer x .*{said}"):
        tokenizer_from_file(tmp_path / "x.tiktoken")
    assert time.process_time() - started_s < 5


def test_text_that_only_this_text_loses_is_noticed_while_it_is_encoded():
    check_pattern("x", r"[^\u4e01]")
    tokenizer = BytePairTokenizer("x", RANKS, r"[^\u4e01]", {EOT: 256})
    with pytest.raises(UserError, match="leaves out 3 bytes of 5"):
        tokenizer.encode("a\u4e01b")
    with pytest.raises(UserError, match="leaves out 3 bytes of"):
        tokenizer.encode_stream([("a\u4e01b", True)])
