"""Conversations: the text that a tokenizer's chat template makes of one and which part of it is an answer, and those of
JSON Lines as tokens with their turns.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nanogpt_lit.data.documents import Document
from nanogpt_lit.data.encoder import Side, Split, TokenBatch, hash_of_start
from nanogpt_lit.data.rows import jsonl_rows
from nanogpt_lit.data.tokenizer import Conventions, Tokenizer, without_surrogates
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


# Conversations in rows of JSON Lines.

PAIRS = (("prompt", "response"), ("prompt", "completion"), ("instruction", "output"))
"""Fields of a row that is one question and its answer."""
WORKS = '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'


@dataclass(frozen=True)
class Conversation:
    messages: list[Message]
    where: str
    """File and line, for errors."""

    def pieces(self) -> Iterator[str]:
        """The messages' text, for a vocabulary and for the choice of what is held out."""
        # A system's message last: it may be long, and the same in all conversations.
        in_order = sorted(self.messages, key=lambda message: message["role"] == "system")
        yield without_surrogates("\n".join(message["content"] for message in in_order))

    def divide(self, tail: float) -> tuple[Document, Document]:
        raise AssertionError("a conversation is held out whole")


def conversations(path: Path, skipped: set[str] | None) -> Iterator[Conversation]:
    """A conversation for each line. skipped: as `jsonl_rows` takes it. Raises UserError for what is none."""
    for row, where in jsonl_rows(path, WORKS, skipped):
        yield Conversation(messages_of(row, where), where)


def messages_of(row: dict[str, Any], where: str) -> list[Message]:
    """The messages of a row, from `messages` or from a question and its answer. Raises UserError for other rows."""
    messages = row.get("messages")
    if messages is None:
        pair = next((pair for pair in PAIRS if pair[0] in row and pair[1] in row), None)
        if pair is None:
            raise UserError(f"{where} holds no conversation: its keys are {', '.join(row) or 'none'}; {WORKS} works.")
        question, answer = (row[name] for name in pair)
        if pair[0] == "instruction" and row.get("input"):  # what the instruction is about
            question = f"{question}\n\n{row['input']}"
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: messages is no list of messages; {WORKS} works.")
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise UserError(f"{where} has a message without a role and a content that are text; {WORKS} works.")
    return messages


def encode_conversations(documents: Iterable[Document], split: Split, chat: Chat) -> Iterator[TokenBatch]:
    """The tokens of all conversations with their turns; those without an answer are left out."""
    for conversation in documents:
        assert isinstance(conversation, Conversation)
        (text,) = conversation.pieces()
        side: Side = split.side(hash_of_start(text))
        try:
            sequences = chat.sequences(conversation.messages)
        except UserError as error:
            raise UserError(f"{conversation.where}: {error}") from error
        for sequence in sequences:
            parts = [chat.encode(part) for turn in sequence for part in (turn.context, turn.answer)]
            lengths = np.array([len(part) for part in parts]).reshape(-1, 2)
            turns = np.column_stack([np.arange(len(lengths)) == 0, lengths]).astype(np.uint32)
            text_bytes = sum(len(turn.context) + len(turn.answer) for turn in sequence)
            yield TokenBatch(side, np.concatenate(parts), documents=1, text_bytes=text_bytes, turns=turns)


def unused_id(is_used: np.ndarray, eot: int) -> int:
    """An id that no conversation has, to stand between them: end-of-text, or else the last.

    is_used: of each id of the vocabulary. Raises UserError where all are used.
    """
    if not is_used[eot]:
        return eot
    if is_used.all():
        raise UserError(
            f"data.source uses all {len(is_used)} tokens of the vocabulary, and none is left to stand between "
            "conversations; data.special_tokens: ['<|between|>'] adds one."
        )
    return int(np.flatnonzero(~is_used)[-1])
