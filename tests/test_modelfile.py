"""The Modelfile's chat template. The reference is the model's own; a Go template is read here by way of Jinja."""

import re
from pathlib import Path

import pytest
from chat_templates import CONVERSATIONS, TEMPLATES, messages
from jinja2 import Environment
from small_networks import new_tokenizer
from test_chat_template import chat_of

from nanogpt_lit.checkpoint.gguf_format import go_template, modelfile_of
from nanogpt_lit.data.conversations import Chat, able_to_chat
from nanogpt_lit.data.tokenizer import BytePairTokenizer, Conventions
from nanogpt_lit.data.tokenizer_files import with_chat_template
from nanogpt_lit.gpt.gpt2 import GPTConfig

GO = {
    r"{{ if .System }}": "{% if System %}",
    r"{{ .System }}": "{{ System }}",
    r"{{ range $i, $_ := .Messages }}": "{% for message in Messages %}",
    r'{{ if eq .Role "user" }}': "{% if message.role == 'user' %}",
    r'{{ else if eq .Role "assistant" }}': "{% elif message.role == 'assistant' %}",
    r"{{ .Content }}": "{{ message.content }}",
    r"{{ if eq (len (slice $.Messages $i)) 1 }}": "{% if loop.last %}",
    r"{{ else }}": "{% else %}",
}


def rendered(template, conversation):
    """As Go's text/template would, and as Ollama calls it."""
    open_blocks = []
    parts = []
    for part in re.split(r"({{.*?}})", template):
        if part.startswith("{{ range"):
            open_blocks.append("{% endfor %}")
        elif part.startswith("{{ if"):
            open_blocks.append("{% endif %}")
        parts.append(open_blocks.pop() if part == "{{ end }}" else GO.get(part, part))
    said = [message["content"] for message in conversation if message["role"] == "system"]
    template = Environment(keep_trailing_newline=True).from_string("".join(parts))
    return template.render(System="\n\n".join(said), Messages=conversation)


@pytest.mark.parametrize("name", TEMPLATES)
def test_ollamas_prompt_is_that_of_the_models_own_template(name):
    chat = chat_of(TEMPLATES[name])
    template = go_template(chat)
    for conversation in CONVERSATIONS.values():
        if conversation[-1]["role"] == "assistant":
            conversation = conversation[:-1]
        if name == "alternating" and conversation[0]["role"] == "system":
            continue
        # Ollama hands on what is said as it is; some templates strip it.
        conversation = [{**message, "content": message["content"].strip()} for message in conversation]
        assert rendered(template, conversation) == chat.render(conversation, add_generation_prompt=True)


def test_what_llama_cpp_puts_before_a_text_is_not_there_twice():
    tokenizer = chat_of(TEMPLATES["headers"]).tokenizer
    bos = BytePairTokenizer(
        "x", tokenizer.ranks, tokenizer.pattern, tokenizer.specials,
        conventions=Conventions(tokenizer.eot_text, "<|eot|>", adds_bos=True),
    )  # fmt: skip
    chat = Chat(with_chat_template(bos, TEMPLATES["headers"]))
    prompt = chat.render(messages("Hi"), add_generation_prompt=True)
    assert bos.eot_text + rendered(go_template(chat), messages("Hi")) == prompt


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages|length }}" + TEMPLATES["chatml"],
        "{{ '{{' }}" + TEMPLATES["chatml"],
        "{{ raise_exception('no') }}",
        "{{ messages[-1].content|upper }}",
        "{% if %}",
        "{% for m in messages %}{{ m.role[0] }}{% endfor %}" + TEMPLATES["chatml"],
    ],
)
def test_a_template_that_is_more_than_its_surroundings_is_left_to_ollama(template):
    assert "TEMPLATE" not in modelfile_of(
        Path("x.gguf"), GPTConfig(8), with_chat_template(new_tokenizer("bpe"), template)
    )


def test_a_model_without_a_template_goes_on_with_the_prompt_and_one_with_stops_where_an_answer_ends():
    assert modelfile_of(Path("runs/x.gguf"), GPTConfig(64), new_tokenizer("bpe")).splitlines() == [
        "FROM ./x.gguf",
        'TEMPLATE """{{ .Prompt }}"""',
        "PARAMETER num_ctx 64",
        "PARAMETER temperature 0.8",
        'PARAMETER stop "<|endoftext|>"',
    ]
    written = modelfile_of(Path("x.gguf"), GPTConfig(64), able_to_chat(new_tokenizer("bpe")))
    assert written.endswith('PARAMETER stop "<|endoftext|>"\nPARAMETER stop "<|im_end|>"\n')
    assert "<|im_start|>user\n{{ .Content }}" not in written  # what precedes a question ends what precedes it
