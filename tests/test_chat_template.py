"""The chat template: where it goes with a tokenizer."""

import pytest
from small_networks import TEXT, new_tokenizer

from nanogpt_lit.cli.fine_tuning import option_of
from nanogpt_lit.data.tokenizer import CHAT_TEMPLATE
from nanogpt_lit.data.tokenizer_files import (
    read_tokenizer_files,
    tokenizer_from_file,
    tokenizer_from_files,
    with_chat_template,
    with_special_tokens,
)
from nanogpt_lit.errors import UserError

TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\r\n{% endfor %}"


@pytest.mark.parametrize("kind", ["gpt2", "byte", "char", "bpe", "pattern"])
def test_it_goes_along_with_the_tokenizer_whose_ids_stay(tmp_path, kind):
    tokenizer = new_tokenizer(kind)
    talking = with_chat_template(tokenizer, TEMPLATE)
    assert tokenizer.chat_template is None  # of which there may be one for the whole process
    assert (talking.name, talking.vocab_size, talking.eot) == (tokenizer.name, tokenizer.vocab_size, tokenizer.eot)
    assert talking.encode(TEXT).tolist() == tokenizer.encode(TEXT).tolist()
    assert talking.files()[CHAT_TEMPLATE] == TEMPLATE
    assert talking.sha256 != tokenizer.sha256
    for name, content in talking.files().items():
        (tmp_path / name).write_bytes(content.encode())
    again = tokenizer_from_files(read_tokenizer_files(tmp_path))
    assert (again.chat_template, again.sha256) == (TEMPLATE, talking.sha256)
    if kind != "char":
        grown = with_special_tokens(talking, ["<|bot|>"])
        assert grown.chat_template == TEMPLATE
        assert grown.vocab_size == tokenizer.vocab_size + 1
        assert tokenizer_from_file(tmp_path / option_of(talking, tmp_path)).sha256 == talking.sha256


def test_one_that_is_no_text_is_refused(tmp_path):
    with pytest.raises(UserError, match="the tokenizer byte has a chat template that is no text"):
        with_chat_template(new_tokenizer("byte"), ["of several"])
