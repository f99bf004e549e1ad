"""A trained vocabulary: tiktoken with our ranks against the HF tokenizer that learned them."""

import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from nanogpt_lit.data.bpe import byte_characters, check_pattern, dump_ranks, parse_ranks, train_ranks
from nanogpt_lit.data.tokenizer import EOT, GPT2_PATTERN, BytePairTokenizer
from nanogpt_lit.data.tokenizer_files import tokenizer_from_file
from nanogpt_lit.errors import UserError

AZERBAIJANI = (
    "Azərbaycan dili türk dilləri ailəsinə aiddir. Qədim şəhər İçərişəhər Bakının mərkəzində yerləşir; "
    "oğlan və qız çay içir, ağır yükü dağa çıxarır. İlin fəsilləri: yaz, yay, payız, qış.\n"
)
TRAINING = [AZERBAIJANI, Path(__file__).read_text(encoding="utf-8"), "Здравствуй, мир! 日本語 don't 12 345\n\n\n  x"]
UNSEEN = "Gəncə şəhərində yaşayıram; ürəyim ağrıyır 🙂 naïve\u00a0 {'a': 1}\r\n\t\tелка  " + "aaaa" * 50


def reference(n_ranks: int, texts: list[str]):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=n_ranks, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def test_tiktoken_with_trained_ranks_gives_the_ids_of_hf_tokenizers() -> None:
    ranks = train_ranks(TRAINING, 799)
    tokenizer = BytePairTokenizer("bpe:800", ranks, GPT2_PATTERN, {EOT: 799})
    assert (tokenizer.vocab_size, tokenizer.eot) == (800, 799)
    expected = reference(799, TRAINING)
    for text in [*TRAINING, UNSEEN, AZERBAIJANI.upper()]:
        assert tokenizer.encode(text).tolist() == expected.encode(text).ids
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(AZERBAIJANI)) < len(AZERBAIJANI) / 3  # it did learn the language


def test_training_twice_gives_the_same_vocabulary() -> None:
    assert dump_ranks(train_ranks(TRAINING, 600)) == dump_ranks(train_ranks(iter(TRAINING), 600))


def test_ranks_survive_their_file() -> None:
    ranks = train_ranks(TRAINING, 300)
    assert parse_ranks(dump_ranks(ranks), "file") == ranks


def test_every_byte_has_one_character_as_in_hf_tokenizers() -> None:
    from tokenizers.pre_tokenizers import ByteLevel

    assert sorted(byte_characters().values()) == list(range(256))
    assert set(byte_characters()) == set(ByteLevel.alphabet())


def test_a_text_with_too_few_pairs_says_how_many_there_are() -> None:
    with pytest.raises(ValueError, match=r"bpe:32000: .*; bpe:2\d\d or less works"):
        train_ranks(["only a few words"], 31999)


def test_without_the_extra_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match=r'pip install "nanogpt_lit\[bpe\]"'):
        train_ranks(TRAINING, 300)


# Patterns of byte-pair tokenizers that would lose text, break off, or search without end.


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
