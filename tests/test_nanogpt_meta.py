"""nanoGPT's folders of characters: train.bin, val.bin, and which characters they are."""

import os
import pickle

import numpy as np
import pytest

from nanogpt_lit.data.datamodule import TokenDataModule
from nanogpt_lit.data.tokenizer_files import characters_of
from nanogpt_lit.errors import UserError
from nanogpt_lit.untrusted.imports import plain_pickle

TEXT = "To be, or not to be: that is the question.\n" * 40


@pytest.fixture
def folder(tmp_path):
    """As data/shakespeare_char/prepare.py there writes it."""
    characters = sorted(set(TEXT))
    stoi = {c: i for i, c in enumerate(characters)}
    for split in ("train", "val"):
        np.array([stoi[c] for c in TEXT], dtype=np.uint16).tofile(tmp_path / f"{split}.bin")
    meta = {"vocab_size": len(characters), "itos": dict(enumerate(characters)), "stoi": stoi}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    return tmp_path


@pytest.mark.parametrize("tokenizer", ["char", "gpt2"])
def test_the_characters_are_the_tokenizer(folder, tokenizer, tmp_path, capsys):
    data = TokenDataModule(str(folder), tokenizer, shards_dir=str(tmp_path / "shards"), block_size=8)
    data.prepare_data()
    data.setup()
    assert data.vocab_size == len(set(TEXT)) + 1
    assert data.tokenizer.decode(data._windows["train"].shards.read(0, 40)) == TEXT[:40]
    assert "meta.pkl" in capsys.readouterr().out


def test_another_tokenizer_is_refused(folder):
    with pytest.raises(UserError, match=r"data.tokenizer=byte .*meta\.pkl"):
        TokenDataModule(str(folder), "byte", block_size=8).prepare_data()


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_every_protocol_that_nanogpt_ran_with_is_read(protocol):
    meta = {
        "vocab_size": 300,
        "itos": {i: chr(i + 32) for i in range(300)},
        "stoi": {chr(i + 32): i for i in range(300)},
    }
    assert plain_pickle(pickle.dumps(meta, protocol)) == meta


class Bomb:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_no_code_in_it_runs(folder, tmp_path):
    (folder / "meta.pkl").write_bytes(pickle.dumps({"itos": Bomb(tmp_path / "mark")}))
    with pytest.raises(UserError, match=r"it names \w+\.mkdir, which numbers and text do not need"):
        characters_of(folder)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"\x80\x04", b"not a pickle", b"\x80\x04}r\xff\xff\xff\x7f.", pickle.dumps({"itos": {0: "b", 1: "a"}}),
     pickle.dumps({"itos": {0: "ab"}}), pickle.dumps({"itos": {1: "a"}}), pickle.dumps({"vocab_size": 3}),
     pickle.dumps([1]), b"\x80\x04s.", b"\x80\x04u."],
)  # fmt: skip
def test_a_damaged_one_is_one_sentence(folder, content):
    (folder / "meta.pkl").write_bytes(content)
    with pytest.raises(UserError, match=r"meta\.pkl (does not say|numbers)"):
        characters_of(folder)
