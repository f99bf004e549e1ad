"""generate --chat: a conversation through a pipe. The reference reads the whole conversation again for every token."""

import io
import json
import sys

import pytest
import torch
import xllamacpp
from chat_templates import TEMPLATES, messages
from small_networks import new_tokenizer, saved
from test_chat_template import chat_of

from nanogpt_lit.__main__ import main
from nanogpt_lit.checkpoint.convert import convert
from nanogpt_lit.data.conversations import Chat, able_to_chat
from nanogpt_lit.data.tokenizer import Conventions
from nanogpt_lit.errors import UserError
from nanogpt_lit.gpt.conversation import Conversation
from nanogpt_lit.gpt.generate import generate
from nanogpt_lit.gpt.gpt2 import GPT, GPTConfig
from nanogpt_lit.gpt.llama import Llama, LlamaConfig

SHAPE = {"block_size": 512, "n_layer": 2, "n_head": 2, "n_embd": 24}
QUESTIONS = ["Hello?", "And 2 + 2?", "Why?"]
LIKELIEST = {"temperature": 0.0, "top_k": None, "top_p": None}


def network_of(kind, tokenizer, **shape):
    torch.manual_seed(1)
    sizes = {**SHAPE, **shape, "vocab_size": tokenizer.vocab_size}
    gpt = GPT(GPTConfig(**sizes)) if kind == "gpt2" else Llama(LlamaConfig(**sizes, n_kv_head=1))
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter.normal_(std=0.3)
    return gpt.eval()


def learn(gpt, chat, talks, steps=60):
    """A few conversations by heart."""
    rows = [chat.encode("".join(turn.context + turn.answer for turn in s)) for t in talks for s in chat.sequences(t)]
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=1e-2)
    for _ in range(steps):
        for row in rows:
            tokens = torch.from_numpy(row.astype("int64"))[None]
            gpt.loss(tokens[:, :-1], tokens[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()


def read_anew(gpt, chat, asked, length):
    """The answers, each of the whole conversation read anew without a cache."""
    said, answers = [], []
    for question in asked:
        said.append({"role": "user", "content": question})
        prompt = torch.from_numpy(chat.encode(chat.render(said, True)).astype("int64"))[None]
        made = []
        for token in generate(
            gpt, prompt, length, temperature=0, use_cache=False, vocab_size=chat.tokenizer.vocab_size
        ):
            if int(token) in chat.ends():
                break
            made.append(int(token))
        answers.append(chat.tokenizer.decode(made))
        said.append({"role": "assistant", "content": answers[-1]})
    return answers


def asked_of(conversation, questions):
    return ["".join(conversation.answer(question)) for question in questions]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("name", ["chatml", "thoughts", "headers"])
def test_an_answer_is_that_of_the_whole_conversation_read_anew(kind, name):
    chat = chat_of(TEMPLATES[name], "byte")
    gpt = network_of(kind, chat.tokenizer)
    conversation = Conversation(gpt, chat.tokenizer, "", 20, 1, **LIKELIEST)
    for _ in range(2):
        assert asked_of(conversation, QUESTIONS) == read_anew(gpt, chat, QUESTIONS, 20)
        conversation.reset()


def test_only_what_is_new_is_read(monkeypatch):
    chat = chat_of(TEMPLATES["chatml"], "byte")
    gpt = network_of("gpt2", chat.tokenizer)
    lengths = []
    hidden = gpt.hidden
    monkeypatch.setattr(gpt, "hidden", lambda tokens, *rest: lengths.append(tokens.size(1)) or hidden(tokens, *rest))
    conversation = Conversation(gpt, chat.tokenizer, "", 10, 1, **LIKELIEST)
    first, _ = asked_of(conversation, QUESTIONS[:2])
    whole, new = (n for n in lengths if n > 1)
    assert whole == len(chat.encode(chat.render(messages(QUESTIONS[0]), True)))
    between = chat.encode(f"<|im_end|>\n<|im_start|>user\n{QUESTIONS[1]}<|im_end|>\n<|im_start|>assistant\n")
    # An answer of bytes that are no UTF-8 is another text when it is read again.
    again = "\N{REPLACEMENT CHARACTER}" in first
    assert new <= len(between) + 1 + 10 * 3 * again


def test_an_answer_that_is_cut_short_leaves_a_conversation_that_goes_on():
    chat = chat_of(TEMPLATES["chatml"], "byte")
    gpt = network_of("llama", chat.tokenizer)
    conversation = Conversation(gpt, chat.tokenizer, "Sing.", 20, 1, **LIKELIEST)
    answer = conversation.answer(QUESTIONS[0])
    next(answer)
    answer.close()
    (follows,) = asked_of(conversation, [QUESTIONS[1]])
    said = [{"role": "system", "content": "Sing."}, *conversation.messages[:3]]
    prompt = torch.from_numpy(chat.encode(chat.render(said, True)).astype("int64"))[None]
    tokens = [int(token) for token in generate(gpt, prompt, 20, temperature=0, use_cache=False)]
    ends = [n for n, token in enumerate(tokens) if token in chat.ends()]
    assert follows == chat.tokenizer.decode(tokens[: ends[0] if ends else None])


def test_what_block_size_cannot_hold_is_forgotten_from_the_beginning_and_a_long_question_refused():
    chat = chat_of(TEMPLATES["chatml"], "byte")
    gpt = network_of("gpt2", chat.tokenizer, block_size=96)
    conversation = Conversation(gpt, chat.tokenizer, "Sing.", 8, 1, **LIKELIEST)
    for n in range(6):
        asked_of(conversation, [f"{n}?"])
        assert conversation.messages[-2]["content"] == f"{n}?"
    assert 2 <= len(conversation.messages) < 8
    with pytest.raises(UserError, match=r"takes \d+ tokens .* reads 96"):
        asked_of(conversation, ["How" * 40])
    assert conversation.messages[-1]["role"] == "assistant"


@pytest.mark.parametrize("name", ["default system", "headers", None])
def test_llama_cpp_renders_the_template_and_answers_as_here(tmp_path, name):
    """None: a network that had no template, and so learned by ours."""
    tokenizer = able_to_chat(new_tokenizer("bpe")) if name is None else chat_of(TEMPLATES[name]).tokenizer
    if name == "headers":  # as Llama 3
        tokenizer.conventions = Conventions(tokenizer.eot_text, "<|eot|>", adds_bos=True)
    chat = Chat(tokenizer)
    gpt = network_of("llama", tokenizer, block_size=256)
    learn(gpt, chat, [messages("Who?", "Me.", "Where?", "In Größe."), messages("Where?", "Here.")])
    convert(saved(tmp_path / "ours.safetensors", gpt, tokenizer), tmp_path / "there.gguf")
    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_gpu_layers = str(tmp_path / "there.gguf"), 256, 0
    settings.n_parallel, settings.warmup, settings.use_jinja, settings.cpuparams.n_threads = 1, False, True, 1
    there = xllamacpp.Server(settings)
    conversation = Conversation(gpt, tokenizer, "", 24, 1, **LIKELIEST)
    for question in ("Who?", "Where?"):
        (here,) = asked_of(conversation, [question])
        said = there.handle_chat_completions(
            {"messages": conversation.messages[:-1], "max_tokens": 24, "temperature": 0, "cache_prompt": False}
        )
        said = said if isinstance(said, dict) else json.loads(said)
        answer = said["choices"][0]["message"]
        assert answer["content"] == here
    assert here.endswith("In Größe.")


def talk(monkeypatch, capsys, lines, *options):
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    code = main(["generate", "--chat", "--temperature", "0", "--device", "cpu", "--max-new-tokens", "12", *options])
    out, err = capsys.readouterr()
    return code, out if code == 0 else err


def test_a_conversation_goes_through_a_pipe(tmp_path, monkeypatch, capsys):
    chat = chat_of(TEMPLATES["chatml"], "byte")
    gpt = network_of("gpt2", chat.tokenizer)
    path = str(saved(tmp_path / "x.safetensors", gpt, chat.tokenizer))
    answers = read_anew(gpt, chat, QUESTIONS, 12)
    lines = "".join(f"{question}\n\n" for question in QUESTIONS)
    assert talk(monkeypatch, capsys, lines, "--ckpt", path) == (0, "".join(f"{answer}\n" for answer in answers))
    expected = "".join(f"{answer}\n" for answer in (answers[0], answers[1], answers[0]))
    lines = f"{QUESTIONS[1]}\n/reset\n{QUESTIONS[0]}"
    assert talk(monkeypatch, capsys, lines, "--ckpt", path, "--prompt", QUESTIONS[0]) == (0, expected)
    code, said = talk(monkeypatch, capsys, "How" * 400, "--ckpt", path)
    assert (code, "ask a shorter one" in said) == (2, True)


def test_at_a_terminal_ctrl_c_cuts_an_answer_short_a_mistake_ends_nothing_and_ctrl_d_the_conversation(
    tmp_path, monkeypatch, capsys
):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    chat = chat_of(TEMPLATES["chatml"], "byte")
    gpt = network_of("gpt2", chat.tokenizer)
    path = str(saved(tmp_path / "x.safetensors", gpt, chat.tokenizer))
    typed = iter(["", "How" * 400, QUESTIONS[0], "/reset", QUESTIONS[1]])
    prompts = []

    def asked(prompt):
        prompts.append(prompt)
        if (line := next(typed, None)) is None:
            raise EOFError
        return line

    answer = Conversation.answer

    def interrupted(self, question):
        yield from answer(self, question)
        if question == QUESTIONS[0]:
            raise KeyboardInterrupt

    monkeypatch.setattr(Conversation, "answer", interrupted)
    monkeypatch.setattr("builtins.input", asked)
    monkeypatch.setattr(sys, "stdin", Terminal())
    assert main(["generate", "--chat", "--temperature=0", "--device=cpu", "--max-new-tokens=12", "--ckpt", path]) == 0
    out, err = capsys.readouterr()
    first, second = (read_anew(gpt, chat, [question], 12)[0] for question in QUESTIONS[:2])
    assert out.partition("short.\n")[2] == f"\n{first}\n{second}\n\n"
    assert "ask a shorter one" in err
    assert prompts == ["> "] * 6


def test_mistakes_are_one_sentence(tmp_path, monkeypatch, capsys):
    tokenizer = new_tokenizer("byte")
    path = str(saved(tmp_path / "x.safetensors", network_of("gpt2", tokenizer), tokenizer))
    code, said = talk(monkeypatch, capsys, "Hello?", "--ckpt", path)
    assert code == 2
    assert "has no chat template: it continues texts, and was not taught to answer" in said
    assert main(["generate", "--ckpt", path, "--system", "Sing."]) == 2
    assert "--system=Sing. is for --chat" in capsys.readouterr().err
    code, said = talk(monkeypatch, capsys, "Hello?", "--ckpt", path, "--num-samples", "2")
    assert (code, "--chat gives one answer" in said) == (2, True)
