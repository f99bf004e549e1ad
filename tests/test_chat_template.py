"""The chat template: rendered as by transformers, from a stranger, and gone along with its tokenizer."""

import json

import pytest
from chat_templates import CONVERSATIONS, SPECIALS, TEMPLATES, messages
from small_networks import TEXT, new_tokenizer
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from nanogpt_lit.cli.beginning import option_of
from nanogpt_lit.data.conversations import Chat, able_to_chat
from nanogpt_lit.data.tokenizer import CHAT_TEMPLATE, EOT
from nanogpt_lit.data.tokenizer_files import (
    read_tokenizer_files,
    tokenizer_from_file,
    tokenizer_from_files,
    with_chat_template,
    with_special_tokens,
)
from nanogpt_lit.data.tokenizer_json_writer import to_hugging_face
from nanogpt_lit.errors import UserError
from nanogpt_lit.untrusted.jinja_template import JinjaTemplate

TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\r\n{% endfor %}"


def chat_of(template, kind="bpe"):
    return Chat(with_chat_template(with_special_tokens(new_tokenizer(kind), SPECIALS), template))


def theirs(chat):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(to_hugging_face(chat.tokenizer))), bos_token=EOT, eos_token=EOT
    )
    tokenizer.chat_template = chat.tokenizer.chat_template
    return tokenizer


# As transformers


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_conversation_is_the_text_and_the_tokens_that_transformers_makes_of_it(name):
    chat = chat_of(TEMPLATES[name])
    tokenizer = theirs(chat)
    for conversation in CONVERSATIONS.values():
        for add_generation_prompt in (False, True):
            if name == "alternating" and conversation[0]["role"] == "system":
                with pytest.raises(UserError, match="no role system"):
                    chat.render(conversation)
                continue
            options = {"add_generation_prompt": add_generation_prompt}
            text = chat.render(conversation, **options)
            assert text == tokenizer.apply_chat_template(conversation, tokenize=False, **options)
            ids = tokenizer.apply_chat_template(conversation, return_dict=False, **options)
            assert chat.encode(text).tolist() == ids


def test_the_default_is_chatml_with_two_tokens_more():
    for kind in ("gpt2", "byte", "bpe"):
        tokenizer = able_to_chat(new_tokenizer(kind))
        assert tokenizer.vocab_size == new_tokenizer(kind).vocab_size + 2
        chat, reference = Chat(tokenizer), chat_of(TEMPLATES["chatml"], kind)
        for conversation in CONVERSATIONS.values():
            for prompt in (False, True):
                assert chat.render(conversation, prompt) == reference.render(conversation, prompt)
    own = with_chat_template(new_tokenizer("byte"), TEMPLATE)
    assert able_to_chat(own) is own


# What is an answer


def test_turns_are_the_text_cut_at_its_answers_each_with_the_token_that_ends_it():
    chat = chat_of(TEMPLATES["chatml"])
    for conversation in CONVERSATIONS.values():
        said = [message["content"] for message in conversation if message["role"] == "assistant"]
        sequences = chat.sequences(conversation)
        assert len(sequences) == bool(said)
        turns = [turn for sequence in sequences for turn in sequence]
        assert [turn.answer for turn in turns] == [f"{answer}<|im_end|>" for answer in said]
        whole = chat.render(conversation[: 2 * len(said) + (conversation[0]["role"] == "system")])
        assert "".join(turn.context + turn.answer for turn in turns) == whole.rstrip() * bool(said)


@pytest.mark.parametrize(
    ("name", "answers", "ends"),
    [
        ("headers", ["4<|eot|>", "6<|eot|>"], "<|eot|>"),
        ("alternating", [f" 4{EOT}", f" 6{EOT}"], EOT),
        ("roles", [" 4\n", " 6\n"], None),
    ],
)
def test_the_special_token_that_ends_an_answer_is_learned_and_ends_it(name, answers, ends):
    chat = chat_of(TEMPLATES[name])
    (sequence,) = chat.sequences(messages("2 + 2?", "4", "3 + 3?", "6"))
    assert [turn.answer for turn in sequence] == answers
    assert chat.ends() == {chat.tokenizer.eot, *(chat.encode(ends).tolist() if ends else [])}


def test_a_template_that_rewrites_earlier_answers_gives_a_sequence_for_each():
    chat = chat_of(TEMPLATES["thoughts"])
    conversation = messages("2 + 2?", "4", "3 + 3?", "6")
    conversation[1]["thought"] = conversation[3]["thought"] = "a sum"
    (first,), (second,) = chat.sequences(conversation)
    assert first.answer == "<think>\na sum\n</think>\n\n4<|im_end|>"
    assert second.answer == "<think>\na sum\n</think>\n\n6<|im_end|>"
    assert second.context == chat.render(conversation[:3], add_generation_prompt=True)
    assert "a sum" not in second.context


def test_a_template_whose_answer_does_not_follow_its_prompt_is_one_sentence():
    chat = chat_of(TEMPLATES["chatml"] + "{% if add_generation_prompt %}<think>{% endif %}")
    with pytest.raises(UserError, match=r"cannot be told from the rest: the prompt ends in .*<think>"):
        chat.sequences(messages("2 + 2?", "4"))


# From a stranger

DOUBLED = "{{% set ns = namespace(x='a') %}}{{% for i in range(60) %}}{}{{% endfor %}}"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{% if %}", "cannot be read as Jinja"),
        ("{{ ''.__class__.__mro__ }}", "'__class__' of 'str' object is unsafe"),
        ("{{ self.__init__.__globals__ }}", "unsafe"),
        ("{{ dict.mro() }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{{ lipsum(9) }}", "'lipsum' is undefined"),
        ("{{ messages[0]['content'].no.more }}", "has no attribute 'no'"),
        ("{{ raise_exception('not so') }}", "fails: not so"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "does not end within"),
        ("{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}", "does not end"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ 'a' * 10**9 }}", "more than 16,777,216 characters"),
        ("{{ 'a'.ljust(10**9) }}", "more than 16,777,216 characters"),
        ("{{ 9 ** 999999999 }}", "more than 16,777,216 characters"),
        (DOUBLED.format("{% set ns.x = ns.x ~ ns.x %}"), "more than"),
        (DOUBLED.format("{% set ns.x = ns.x + ns.x %}"), "more than"),
        (DOUBLED.format("{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}"), "more than"),
    ],
)
def test_a_template_that_is_wrong_or_means_harm_ends_in_one_sentence(source, said):
    with pytest.raises(UserError, match=r"^T (fails: |cannot)") as error:
        JinjaTemplate(source, "T").render(messages=messages("Hi"))
    assert said in str(error.value)


def test_its_budget_is_of_one_conversation():
    template = JinjaTemplate("{% for i in range(900) %}{% for j in range(600) %}{% endfor %}{% endfor %}x", "T")
    assert [template.render() for _ in range(2)] == ["x", "x"]


# With its tokenizer


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


def test_one_that_is_no_text_is_refused():
    with pytest.raises(UserError, match="the tokenizer byte has a chat template that is no text"):
        with_chat_template(new_tokenizer("byte"), ["of several"])
