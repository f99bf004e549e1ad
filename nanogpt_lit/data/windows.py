"""Shards to sequences: windows of a stream of tokens, and conversations side by side in one, none cut in the middle.

Beside the tokens of conversations lies SPLIT_turns.npy: a row for each answer, uint32, in the order of the tokens:
whether it is the first of its sequence, the tokens before it since the answer before, and its own.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from nanogpt_lit.data.sampler import BatchOrder, NumberedOrder, StreamPosition, ValidationOrder, windows_in
from nanogpt_lit.data.shards import TokenShards, read_manifest
from nanogpt_lit.data.tokenizer import Tokenizer
from nanogpt_lit.errors import UserError
from nanogpt_lit.gpt.loss import IGNORE_INDEX

Batch = tuple[Tensor, Tensor]


class Windows(Dataset[Batch]):
    """Windows of a split, by a sampler's batches of them."""

    @property
    def n_windows(self) -> int:
        """The number of them in one reading of the split."""
        raise NotImplementedError

    def __getitems__(self, windows: list[int]) -> Batch:
        """tokens and targets, (B, T) int64 each"""
        raise NotImplementedError

    def training_order(self, batch_size: int, seed: int, position: StreamPosition) -> BatchOrder:
        raise NotImplementedError

    def validation_order(self, batch_size: int, rank: int, world: int, limit: int | None) -> ValidationOrder:
        raise NotImplementedError

    def remark(self) -> str:
        """A sentence about them that a user may want to know; empty where there is none."""
        return ""

    def __len__(self) -> int:
        # Asked by Lightning's distributed sampler alone.
        raise UserError(
            "trainer.use_distributed_sampler=true would deal out samples that are dealt out already; set it to false."
        )


class TokenWindows(Windows):
    """Windows of a stream, by where they start. Raises UserError where the stream has not even one."""

    def __init__(self, shards: TokenShards, block_size: int, split: str) -> None:
        self._n_windows = windows_in(len(shards), block_size, split)
        self.shards = shards
        self.block_size = block_size

    @property
    def n_windows(self) -> int:
        return self._n_windows

    def training_order(self, batch_size: int, seed: int, position: StreamPosition) -> BatchOrder:
        return BatchOrder(len(self.shards), self.block_size, batch_size, seed, position)

    def validation_order(self, batch_size: int, rank: int, world: int, limit: int | None) -> ValidationOrder:
        return ValidationOrder(len(self.shards), self.block_size, batch_size, rank, world, limit)

    def __getitems__(self, starts: list[int]) -> Batch:
        windows = torch.from_numpy(self.shards.read_windows(starts, self.block_size + 1))  # (B, T+1)
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


# Conversations.


class Turns:
    """The turns of a split: where its sequences begin in the stream of tokens, and what is learned of each.

    Raises UserError for a file that is damaged or belongs to other shards.
    """

    def __init__(self, path: Path, n_tokens: int) -> None:
        try:
            turns = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError, MemoryError) as error:
            raise UserError(f"{path} cannot be read ({error}); prepare the data again.") from error
        if turns.ndim != 2 or turns.shape[1:] != (3,) or turns.dtype != np.uint32 or not len(turns) or not turns[0, 0]:
            raise UserError(f"{path} holds no turns of conversations; prepare the data again.")
        self.lengths = turns[:, 1:].astype(np.int64)  # (turns, 2): tokens before the answer, and of it
        if int(self.lengths.sum()) != n_tokens:
            raise UserError(
                f"{path} describes {int(self.lengths.sum()):,} tokens and its shards hold {n_tokens:,}: it belongs to "
                "another preparation; prepare the data again."
            )
        self.first = np.append(np.flatnonzero(turns[:, 0]), len(turns))
        """(sequences + 1,): the first turn of each."""
        ends = np.append(0, self.lengths.sum(axis=1).cumsum())
        self.starts = ends[self.first]
        """(sequences + 1,): where each begins in the stream of tokens, and where the last one ends."""
        self._answer_starts = ends[1:] - self.lengths[:, 1] - np.repeat(self.starts[:-1], np.diff(self.first))

    def learnable(self, length: int) -> np.ndarray:
        """The sequences that have an answer, or the beginning of one, in their first `length` tokens.

        The first token of all does not count: nothing predicts it.
        """
        starts, ends = np.maximum(self._answer_starts, 1), self._answer_starts + self.lengths[:, 1]  # (turns,)
        has_answer = starts < np.minimum(ends, length)
        return np.flatnonzero(np.logical_or.reduceat(has_answer, self.first[:-1]))

    def is_answer(self, sequence: int) -> np.ndarray:
        """Mask of a sequence: True for each token of an answer."""
        lengths = self.lengths[self.first[sequence] : self.first[sequence + 1]].ravel()
        return np.repeat(np.arange(len(lengths)) % 2 == 1, lengths)


class ConversationWindows(Windows):
    """Windows of whole conversations side by side, by their numbers; one is cut only where it is longer than a window.

    A window holds, for each sequence, its tokens but the last, which predicts nothing, and then `document_end`. Every
    window has something to learn.
    Raises UserError where no answer begins within block_size.
    """

    def __init__(self, shards: TokenShards, turns: Turns, block_size: int, document_end: int) -> None:
        self.shards, self.turns = shards, turns
        self.block_size, self.document_end = block_size, document_end
        lengths = np.diff(turns.starts)
        learnable = turns.learnable(block_size + 1)
        if not len(learnable):
            raise UserError(
                f"data.block_size={block_size} ends before any answer begins; {int(lengths.max())} holds every one."
            )
        self.n_sequences, self.n_cut = len(lengths), int((lengths > block_size + 1).sum())
        self.n_left_out = self.n_sequences - len(learnable)
        kept = np.minimum(lengths[learnable], block_size + 1)
        order, self._window_starts = pack(kept, block_size + 1)
        self._sequences = learnable[order]

    @property
    def n_windows(self) -> int:
        return len(self._window_starts) - 1

    def training_order(self, batch_size: int, seed: int, position: StreamPosition) -> BatchOrder:
        return NumberedOrder(self.n_windows, batch_size, seed, position)

    def validation_order(self, batch_size: int, rank: int, world: int, limit: int | None) -> ValidationOrder:
        # Of windows of one token, their numbers.
        return ValidationOrder(self.n_windows + 1, 1, batch_size, rank, world, limit)

    def __getitems__(self, windows: list[int]) -> Batch:
        """tokens and targets, (B, T) int64 each; targets that are no answer are IGNORE_INDEX"""
        T = self.block_size
        tokens = np.full((len(windows), T), self.document_end, dtype=np.int64)
        targets = np.full((len(windows), T), IGNORE_INDEX, dtype=np.int64)
        for row, window in enumerate(windows):
            at = 0
            for sequence in self._sequences[self._window_starts[window] : self._window_starts[window + 1]]:
                start, end = self.turns.starts[sequence : sequence + 2]
                length = min(int(end - start), T + 1)
                ids = self.shards.read(int(start), length)
                is_answer = self.turns.is_answer(int(sequence))[1:length]
                tokens[row, at : at + length - 1] = ids[:-1]
                targets[row, at : at + length - 1] = np.where(is_answer, ids[1:], IGNORE_INDEX)
                at += length
        return torch.from_numpy(tokens), torch.from_numpy(targets)

    def remark(self) -> str:
        cut = f"; {self.n_cut:,} are longer and are cut there" if self.n_cut else ""
        left_out = f", {self.n_left_out:,} of them before any answer, and are left out" if self.n_left_out else ""
        return f"{self.n_sequences:,} conversations in {self.n_windows:,} windows of {self.block_size}{cut}{left_out}"


def pack(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Distribute what has these lengths, each at most `capacity`, over few windows that hold `capacity`.

    Returns the order in which to lay them out, and where in it each window starts, with the end of the last. The
    longest goes first, each into the window with the least room that still holds it (best fit decreasing).
    """
    window_of = np.empty(len(lengths), dtype=np.int64)
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # windows by the room that is left in them
    rooms = 0  # bit r: there is a window with room r
    n_windows = 0
    for k in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[k])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            window = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, window, n_windows = capacity, n_windows, n_windows + 1
        window_of[k] = window
        with_room[room - length].append(window)
        rooms |= 1 << (room - length)
    order = np.argsort(window_of, kind="stable")
    return order, np.searchsorted(window_of[order], np.arange(n_windows + 1))


def first_question(folder: Path, tokenizer: Tokenizer) -> str:
    """The beginning of the validation part of a folder of conversations: all before the first answer."""
    shards = TokenShards.open(folder, "val")
    turns = Turns(folder / read_manifest(folder)["splits"]["val"]["turns"]["file"], len(shards))
    return tokenizer.decode(shards.read(0, int(turns.lengths[0, 0])))
