"""val/bits_per_byte, against `eval`, which adds up the loss and the bytes of every token."""

import math

import numpy as np
import pytest
from small_networks import TEXT, new_tokenizer, trained

from nanogpt_lit.checkpoint.state import bits_per_byte
from nanogpt_lit.data.prepare import PrepareConfig, prepare
from nanogpt_lit.data.shards import TokenShards, val_tokens_per_byte
from nanogpt_lit.data.tokenizer import gpt2_tokenizer
from nanogpt_lit.data.tokenizer_files import read_tokenizer_files, tokenizer_from_files
from nanogpt_lit.evaluate.likelihood import Scorer


@pytest.mark.parametrize("tokenizer", ["gpt2", "byte", "char"])
def test_of_our_shards_it_is_what_their_tokens_decode_to(tmp_path, tokenizer):
    text = tmp_path / "text.jsonl"
    text.write_text("".join(f'{{"text": "{line} {n}"}}\n' for n in range(60) for line in ("Größe", "Привет", "世界")))
    prepare(PrepareConfig(str(text), tokenizer, val_fraction=0.2), tmp_path / "shards", show_progress=False)
    shards = TokenShards.open(tmp_path / "shards", "val")
    made = tokenizer_from_files(read_tokenizer_files(tmp_path / "shards"))
    ids = [token for token in shards.read(0, len(shards)).tolist() if token != made.eot]
    assert len(ids) < len(shards)
    assert val_tokens_per_byte(tmp_path / "shards", made) == len(ids) / len(made.decode_bytes(ids))


def test_of_nanogpts_shards_their_tokens_are_decoded(tmp_path):
    tokenizer = gpt2_tokenizer()
    ids = tokenizer.encode_stream([(TEXT, True), (TEXT, True)])
    for split in ("train", "val"):
        ids.astype(np.uint16).tofile(tmp_path / f"{split}.bin")
    assert val_tokens_per_byte(tmp_path, tokenizer) == (len(ids) - 2) / (2 * len(TEXT.encode()))
    np.full(9, tokenizer.eot, dtype=np.uint16).tofile(tmp_path / "val.bin")
    assert val_tokens_per_byte(tmp_path, tokenizer) is None


def test_it_is_what_eval_measures_where_ends_of_text_are_rare():
    tokenizer = new_tokenizer("bpe")
    gpt = trained(tokenizer, steps=20)
    stream = tokenizer.encode_stream([(TEXT, True)])
    found = Scorer(gpt, tokenizer).text_loss([stream])
    assert bits_per_byte(found.loss, (len(stream) - 1) / len(TEXT.encode())) == pytest.approx(found.bits_per_byte)


def test_a_uniform_network_of_bytes_needs_the_logarithm_of_its_vocabulary():
    assert bits_per_byte(math.log(257), 1.0) == pytest.approx(math.log2(257))
