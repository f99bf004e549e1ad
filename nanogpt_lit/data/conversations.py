"""Conversations in JSON Lines, and as tokens with their turns: what is said to the model, and what it answers."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nanogpt_lit.data.chat import Chat, Message
from nanogpt_lit.data.documents import Document
from nanogpt_lit.data.encoder import Side, Split, TokenBatch, hash_of_start
from nanogpt_lit.data.rows import jsonl_rows
from nanogpt_lit.data.tokenizer import without_surrogates
from nanogpt_lit.errors import UserError

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
