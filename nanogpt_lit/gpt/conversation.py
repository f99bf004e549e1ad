"""A conversation with a trained network, whose answers come as they are made."""

from collections.abc import Iterator
from typing import Any

import torch

from nanogpt_lit.data.conversations import ANSWERS, Chat, Message
from nanogpt_lit.data.tokenizer import Tokenizer
from nanogpt_lit.errors import UserError
from nanogpt_lit.gpt.attention import KeyValueCache
from nanogpt_lit.gpt.generate import as_text, generate
from nanogpt_lit.gpt.network import Network


class Conversation:
    """The messages so far, with the keys and values of those that the network has read.

    options: of `generate`; the tokenizer has a chat template
    """

    def __init__(
        self, gpt: Network, tokenizer: Tokenizer, system: str, max_new_tokens: int, seed: int, **options: Any
    ) -> None:
        self.gpt, self.chat, self.max_new_tokens, self.options = gpt, Chat(tokenizer), max_new_tokens, options
        self.ends = self.chat.ends()
        self.begin: list[Message] = [{"role": "system", "content": system}] if system else []
        self.messages: list[Message] = []
        """Questions and answers in turns, after the system's message."""
        self._device = next(gpt.parameters()).device
        self._generator = torch.Generator(self._device).manual_seed(seed)
        self._cache = KeyValueCache(gpt.config.n_layer, gpt.config.block_size)
        self._read: list[int] = []
        """The ids that the cache holds."""

    def reset(self) -> None:
        """Begin anew."""
        self.messages = []

    def answer(self, question: str) -> Iterator[str]:
        """Yields the answer, piece by piece, until its end or for max_new_tokens.

        The oldest questions and answers are forgotten where all would be longer than block_size. Raises UserError for a
        question that is too long by itself, or that the template does not take.
        """
        self.messages.append({"role": "user", "content": question})
        made: list[int] = []
        try:
            prompt = self._prompt()
            self._cache.keep(common_beginning(self._read, prompt[:-1]))
            new_tokens = generate(
                self.gpt,
                torch.tensor([prompt], dtype=torch.int64, device=self._device),
                min(self.max_new_tokens, self.gpt.config.block_size - len(prompt)),
                generator=self._generator,
                cache=self._cache,
                vocab_size=self.chat.tokenizer.vocab_size,
                **self.options,
            )
        except UserError:
            self.messages.pop()
            raise
        said = ""
        try:
            for piece in as_text((noted(token, made) for token in new_tokens), self.chat.tokenizer, self.ends):
                said += piece
                yield piece
        finally:  # also where the listener has heard enough, be it in the middle of a token
            read = min(layer.length for layer in self._cache.layers)
            self._read = [*prompt, *made][:read]
            self.messages.append({"role": ANSWERS, "content": said})

    def _prompt(self) -> list[int]:
        """The ids that ask for an answer, at least one fewer than block_size."""
        block_size = self.gpt.config.block_size
        room = min(self.max_new_tokens, block_size // 2)
        for first in range(0, len(self.messages), 2):
            messages = self.messages[first:]
            prompt = self.chat.encode(self.chat.render([*self.begin, *messages], add_generation_prompt=True))
            if len(prompt) <= block_size - room or (len(messages) == 1 and len(prompt) < block_size):
                self.messages = messages
                return prompt.tolist()
        raise UserError(
            f"the question takes {len(prompt):,} tokens with what the template adds, and the network reads "
            f"{block_size:,} with its answer; ask a shorter one."
        )


def noted(token: torch.Tensor, made: list[int]) -> torch.Tensor:
    made.append(int(token))
    return token


def common_beginning(one: list[int], other: list[int]) -> int:
    """The number of ids that two sequences begin with in common."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
