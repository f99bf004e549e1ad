"""A trained vocabulary: tiktoken with our ranks against the HF tokenizer that learned them."""

import sys
from pathlib import Path

import pytest

from nanogpt_lit.data.bpe import byte_characters, dump_ranks, parse_ranks, train_ranks
from nanogpt_lit.data.tokenizer import EOT, GPT2_PATTERN, BytePairTokenizer

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
