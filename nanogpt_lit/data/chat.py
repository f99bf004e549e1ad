"""Conversations as text and tokens: a tokenizer's chat template applied, and which part of the text is an answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nanogpt_lit.data.tokenizer import Conventions, Tokenizer
from nanogpt_lit.data.tokenizer_files import with_chat_template, with_special_tokens
from nanogpt_lit.errors import UserError
from nanogpt_lit.untrusted.jinja_template import JinjaTemplate

Message = dict[str, Any]
"""A message with `role` and `content`, and whatever else the template may read."""

ANSWERS = "assistant"
"""The role whose messages are learned."""
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""The template of a tokenizer that has none; llama.cpp and Ollama know it by its tokens."""


def able_to_chat(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer, with ChatML and its two special tokens where it has no chat template.

    Raises UserError for a char tokenizer, which takes no special tokens.
    """
    if tokenizer.chat_template is not None:
        return tokenizer
    chats = with_chat_template(with_special_tokens(tokenizer, CHATML_TOKENS), CHATML)
    # Other programs are to stop where an answer ends, and to put nothing before what the template writes.
    bos = None if chats.conventions is None else chats.conventions.bos
    words = () if chats.conventions is None else chats.conventions.words
    chats.conventions = Conventions(bos, CHATML_TOKENS[1], adds_bos=False, words=words)
    return chats


@dataclass(frozen=True)
class Turn:
    """An answer and the text before it, back to the answer before."""

    context: str
    answer: str
    """The tokens to learn: with the special token that ends the answer, and without what follows it."""


class Chat:
    """Conversations by the template of a tokenizer, which must have one. Raises UserError for one that is no Jinja."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        assert tokenizer.chat_template is not None
        self.tokenizer = tokenizer
        self._name = f"the chat template of the tokenizer {tokenizer.name}"
        self._template = JinjaTemplate(tokenizer.chat_template, self._name)
        self._eot = tokenizer.eot_text
        self._specials = tuple({self._eot, *getattr(tokenizer, "specials", {})})
        # Where it does not say, our exports begin and end a text with end-of-text.
        conventions = tokenizer.conventions or Conventions(self._eot, self._eot, adds_bos=False)
        named = {"bos_token": conventions.bos, "eos_token": conventions.eos}
        self._named = {name: text for name, text in named.items() if text is not None}

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """The text, as transformers' apply_chat_template. Raises UserError with what the template says against it."""
        return self._template.render(
            messages=list(messages),
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **self._named,
        )

    def encode(self, text: str) -> np.ndarray:
        """Ids of a rendered text, in which every special token stands for itself, end-of-text too."""
        eot = np.array([self.tokenizer.eot], dtype=self.tokenizer.dtype)
        first, *others = (self.tokenizer.encode(part) for part in text.split(self._eot))
        return np.concatenate([first, *(ids for part in others for ids in (eot, part))])

    def sequences(self, messages: Sequence[Message]) -> list[list[Turn]]:
        """The conversation as sequences to train on, in which each answer is learned once, after what precedes it
        when it is given: one sequence, or several for a template that writes a message otherwise when others follow
        (Qwen3's leaves the thoughts out of earlier answers).

        Raises UserError for a template by which a conversation does not go on from the prompt for its answer.
        """
        found: list[list[Turn]] = []
        read = ""
        for n, message in enumerate(messages):
            if message["role"] != ANSWERS:
                continue
            prompt, whole = self.render(messages[:n], add_generation_prompt=True), self.render(messages[: n + 1])
            if not whole.startswith(prompt):
                raise UserError(
                    f"{self._name} does not go on with an answer from its own prompt for one, so that answers cannot "
                    f"be told from the rest: the prompt ends in {prompt[-40:]!r}; a model with another template, or "
                    "with none, works."
                )
            answer = self._learned(whole[len(prompt) :])
            if found and prompt.startswith(read):
                found[-1].append(Turn(prompt[len(read) :], answer))
            else:
                found.append([Turn(prompt, answer)])
            read = prompt + answer
        return found

    def _learned(self, answer: str) -> str:
        ended = answer.rstrip()
        return ended if ended.endswith(self._specials) else answer

    def ends(self) -> set[int]:
        """The ids that end an answer: the special token that the template writes after one, and what ends any text."""
        answer = "\N{SNOWMAN}"
        try:
            whole = self.render([{"role": "user", "content": "A"}, {"role": ANSWERS, "content": answer}])
        except UserError:
            return self.tokenizer.ends
        behind = whole.rpartition(answer)[2].lstrip()
        found = [text for text in self._specials if behind.startswith(text)]
        return {*self.tokenizer.ends, *self.encode(max(found, key=len, default="")).tolist()}
