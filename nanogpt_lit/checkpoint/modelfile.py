"""The Modelfile of `ollama create NAME -f Modelfile`: the prompt as it is, or the chat template in Go's language.

Ollama renders no Jinja. What a template writes is found by trying it: with nearly all of them, the texts before the
first question, after each question and after each answer are the same in every conversation, and are all that there is.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from nanogpt_lit.data.chat import ANSWERS, Chat, Message
from nanogpt_lit.data.tokenizer import Tokenizer
from nanogpt_lit.errors import UserError
from nanogpt_lit.gpt.network import NetworkConfig

QUESTION, ANSWER, SYSTEM = (f"\N{SNOWMAN}{letter}" for letter in "qas")
"""Messages with which a template is tried; no template has them in its own text."""


def modelfile_of(target: Path, config: NetworkConfig, tokenizer: Tokenizer) -> str:
    """The file's text. A template that is more than its surroundings is left to what Ollama knows of the GGUF's own."""
    template: str | None = "{{ .Prompt }}"
    ends = tokenizer.ends
    if tokenizer.chat_template is not None:
        try:
            chat = Chat(tokenizer)
            template, ends = go_template(chat), chat.ends()
        except UserError:  # it is no Jinja
            template = None
    return "".join(
        [
            f"FROM ./{target.name}\n",
            "" if template is None else f'TEMPLATE """{template}"""\n',
            f"PARAMETER num_ctx {config.block_size}\n",
            "PARAMETER temperature 0.8\n",
            *(f'PARAMETER stop "{tokenizer.decode([token])}"\n' for token in sorted(ends)),
        ]
    )


@dataclass(frozen=True)
class Surroundings:
    """The text that a template writes before the first question, after each question but the last, after that, and
    after each answer."""

    before: str
    question: str
    last: str
    answer: str

    def prompt(self, turns: int) -> str:
        """The prompt for an answer to so many questions."""
        asked = f"{QUESTION}{self.question}{ANSWER}{self.answer}" * (turns - 1)
        return f"{self.before}{asked}{QUESTION}{self.last}"


def go_template(chat: Chat) -> str | None:
    """The chat template as Ollama takes it; None where the surroundings are not all of it, or cannot be written."""
    found, begun = (surroundings(chat, begin) for begin in ([], [{"role": "system", "content": SYSTEM}]))
    if found is None:
        return None
    begin = without_bos(found.before, chat.tokenizer)
    if begun is not None:
        if replace(begun, before=found.before) != found:
            return None
        head, is_written, rest = without_bos(begun.before, chat.tokenizer).partition(SYSTEM)
        if is_written:
            begin = f"{{{{ if .System }}}}{head}{{{{ .System }}}}{rest}{{{{ else }}}}{begin}{{{{ end }}}}"
    texts = (found.before, begun.before if begun else "", found.question, found.last, found.answer)
    if any(mark in text for text in texts for mark in ("{{", "}}", '"""')):
        return None
    return (
        f"{begin}{{{{ range $i, $_ := .Messages }}}}"
        '{{ if eq .Role "user" }}{{ .Content }}'
        f"{{{{ if eq (len (slice $.Messages $i)) 1 }}}}{found.last}{{{{ else }}}}{found.question}{{{{ end }}}}"
        f'{{{{ else if eq .Role "assistant" }}}}{{{{ .Content }}}}{found.answer}{{{{ end }}}}'
        "{{ end }}"
    )


def surroundings(chat: Chat, begin: list[Message]) -> Surroundings | None:
    """The surroundings, or None where they differ between conversations or the template takes none that begins so."""
    turn = [{"role": "user", "content": QUESTION}, {"role": ANSWERS, "content": ANSWER}]
    try:
        prompts = [chat.render([*begin, *turn * n, turn[0]], add_generation_prompt=True) for n in range(4)]
    except UserError:
        return None
    before, _, last = prompts[0].partition(QUESTION)
    question, _, following = prompts[1].removeprefix(before + QUESTION).partition(ANSWER)
    found = Surroundings(before, question, last, following.partition(QUESTION)[0])
    return found if [found.prompt(n + 1) for n in range(4)] == prompts else None


def without_bos(text: str, tokenizer: Tokenizer) -> str:
    """The text without the token that llama.cpp puts before it anyway."""
    conventions = tokenizer.conventions
    return text.removeprefix(conventions.bos or "") if conventions is not None and conventions.adds_bos else text
