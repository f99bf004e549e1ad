"""The words that samples begin with where a run names none: how its own text begins."""

import numpy as np
import pytest

from nanogpt_lit.data.shards import first_words
from nanogpt_lit.data.tokenizer import ByteTokenizer, gpt2_tokenizer


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), gpt2_tokenizer()], ids=lambda tokenizer: tokenizer.name)
@pytest.mark.parametrize(
    ("documents", "expected"),
    [
        (["Bakı Azərbaycanın paytaxtıdır, və böyük şəhərdir."], "Bakı Azərbaycanın"),
        (["\n\n  def main():\n    print(answer)\n"], "def main():"),
        (['"""\nBasic subprocess implementation for POSIX'], '"""\nBasic subprocess'),
        (["short", "and another document"], "short"),
        (["x" * 60], "x" * 24),
        (["世界" * 30], "世界" * 12),
        (["twenty-four letters have no word behind"], "twenty-four letters have"),
        ([" \n ", "the next document"], ""),
    ],
)
def test_a_sample_begins_with_whole_words_of_the_first_document_of_the_validation_part(
    documents, expected, tokenizer, tmp_path
):
    ids = tokenizer.encode_stream([(text, True) for text in documents])
    for name, tokens in (("train", ids[::-1]), ("val", ids)):
        tokens.astype(np.uint16).tofile(tmp_path / f"{name}.bin")
    assert first_words(tmp_path, tokenizer) == expected


def test_shards_that_begin_inside_a_document_begin_the_sample_there(tmp_path):
    for name in ("train", "val"):
        ByteTokenizer().encode("or not to be\nthat is").astype(np.uint16).tofile(tmp_path / f"{name}.bin")
    assert first_words(tmp_path, ByteTokenizer()) == "or not to be\nthat is"
