"""The likelihood of text to a network, which every evaluation here is made of; and the text as a stream of tokens."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nanogpt_lit.checkpoint.run_file import SUFFIX, validations_of
from nanogpt_lit.data.sampler import windows_in
from nanogpt_lit.data.shards import TokenShards, read_manifest, ready_format
from nanogpt_lit.data.sources import open_source
from nanogpt_lit.data.tokenizer import Tokenizer
from nanogpt_lit.data.windows import ConversationWindows, Turns
from nanogpt_lit.errors import UserError
from nanogpt_lit.gpt.loss import IGNORE_INDEX
from nanogpt_lit.gpt.network import Network
from nanogpt_lit.run.resume import latest_config

TOKENS_AT_ONCE = 4096
"""Tokens of a forward pass; their logits are held LOGITS_AT_ONCE at a time."""
LOGITS_AT_ONCE = 512
TOKENS_AT_A_TIME = 1 << 18

Row = tuple[Sequence[int] | np.ndarray, Sequence[int] | np.ndarray]
"""Tokens and targets."""


@dataclass(frozen=True)
class TextLoss:
    """Sums over the tokens of a text."""

    nats: float
    """Summed over all targets."""
    targets: int
    text_nats: float
    """Summed over the targets that stand for text: end-of-text is left out, it belongs to no document."""
    text_bytes: int
    """Bytes of UTF-8 that those targets decode to."""

    @property
    def loss(self) -> float:
        """Mean cross-entropy in nats per token, as val/loss."""
        return self.nats / self.targets

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers. NaN where there is no text."""
        return self.text_nats / math.log(2) / self.text_bytes if self.text_bytes else math.nan


@dataclass(frozen=True)
class Continuation:
    log_likelihood: float
    """Summed over the continuation's tokens, in nats; at most 0."""
    is_greedy: bool
    """Each of them is the network's likeliest."""


class Scorer:
    """A network and its tokenizer, ready to score: gpt in eval mode, on the device where it computes, in its dtype."""

    def __init__(self, gpt: Network, tokenizer: Tokenizer) -> None:
        # What stood between the conversations that it learned from stands between no others.
        gpt.config = replace(gpt.config, document_end=None)
        self.gpt = gpt
        self.tokenizer = tokenizer
        self.block_size = gpt.config.block_size
        self._device = next(gpt.parameters()).device
        self._byte_lengths = tokenizer.byte_lengths()

    def text_loss(self, stream: Iterable[np.ndarray]) -> TextLoss:
        """The loss of a stream of token ids that comes in pieces, in windows of block_size side by side.

        Each token but the first is predicted once, from those before it in its window. Raises UserError for a stream
        of fewer than two tokens.
        """
        return self._loss(_windows(stream, self.block_size))

    def answers_loss(self, windows: ConversationWindows) -> TextLoss:
        """The loss of the answers alone, each conversation read for itself."""
        own = self.gpt.config
        self.gpt.config = replace(own, document_start=None, document_end=windows.document_end)
        try:
            return self._loss(
                (row.numpy(), wanted.numpy())
                for n in range(windows.n_windows)
                for row, wanted in zip(*windows.__getitems__([n]), strict=True)
            )
        finally:
            self.gpt.config = own

    def _loss(self, rows: Iterable[Row]) -> TextLoss:
        nats = text_nats = 0.0
        targets_seen = text_bytes = 0
        for tokens, targets in self._batches(rows):
            losses = self._score(tokens, targets)[0].double()
            is_target = targets != IGNORE_INDEX
            is_text = is_target & (targets != self.tokenizer.eot)
            nats += float(losses[is_target].sum())
            text_nats += float(losses[is_text].sum())
            targets_seen += int(is_target.sum())
            text_bytes += int(self._byte_lengths[targets[is_text].numpy()].sum())
        if targets_seen == 0:
            raise UserError("there is nothing to predict: the text has fewer than two tokens.")
        return TextLoss(nats, targets_seen, text_nats, text_bytes)

    def continuations(self, pairs: Sequence[tuple[str, str]]) -> list[Continuation]:
        """The likelihood of each (context, continuation), in their order.

        Tokens are those of both together, without the context's; spaces at the end of a context go to the
        continuation, as lm-eval does it. An empty context is the beginning of a document. What is longer than
        block_size loses its beginning. Raises UserError for a continuation that is longer than block_size.
        """
        encoded = [self._encoded(*pair) for pair in pairs]
        longest_first = sorted(range(len(encoded)), key=lambda k: -len(encoded[k][0]))
        found: dict[int, Continuation] = {}
        rows = ((encoded[k][0][:-1], encoded[k][1]) for k in longest_first)
        position = iter(longest_first)
        for tokens, targets in self._batches(rows):
            losses, is_likeliest = self._score(tokens, targets)
            is_target = targets != IGNORE_INDEX
            for row in range(len(tokens)):
                likelihood = -float(losses[row][is_target[row]].double().sum())
                found[next(position)] = Continuation(likelihood, bool(is_likeliest[row][is_target[row]].all()))
        return [found[k] for k in range(len(pairs))]

    def _encoded(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """(tokens of both, targets: IGNORE_INDEX where the context is predicted)"""
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        before = self.tokenizer.encode(context).tolist()
        both = self.tokenizer.encode(context + continuation).tolist()
        scored = len(both) - len(before)
        if not before:
            both = [self.tokenizer.eot, *both]
        if scored > self.block_size:
            raise UserError(
                f"a continuation of {scored} tokens is longer than the network's block_size={self.block_size}: "
                f"{continuation[:60]!r}..."
            )
        both = both[-(self.block_size + 1) :]
        targets = both[1:]
        return both, [IGNORE_INDEX] * (len(targets) - scored) + targets[len(targets) - scored :]

    def _batches(self, rows: Iterable[Row]) -> Iterable[tuple[Tensor, Tensor]]:
        """tokens and targets (B, T) int64 on the host; shorter rows are filled up at their end, which none sees."""
        batch: list[Row] = []
        for row in rows:
            if batch and (len(batch) + 1) * max(len(row[0]), len(batch[0][0])) > TOKENS_AT_ONCE:
                yield self._stacked(batch)
                batch = []
            batch.append(row)
        if batch:
            yield self._stacked(batch)

    def _stacked(self, batch: list[Row]) -> tuple[Tensor, Tensor]:
        T = max(len(tokens) for tokens, _ in batch)
        tokens = torch.full((len(batch), T), self.tokenizer.eot, dtype=torch.int64)
        targets = torch.full((len(batch), T), IGNORE_INDEX, dtype=torch.int64)
        for k, (row, wanted) in enumerate(batch):
            tokens[k, : len(row)] = torch.as_tensor(row)
            targets[k, : len(wanted)] = torch.as_tensor(wanted)
        return tokens, targets

    @torch.no_grad()
    def _score(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Losses in nats (0 where not asked for), and whether each target is the likeliest. (B, T), on the host."""
        tokens = tokens.to(self._device)
        hidden = self.gpt.hidden(tokens, documents=self.gpt.documents(tokens)).flatten(0, 1)  # (B*T, C)
        wanted = targets.to(self._device).flatten()
        losses, is_likeliest = [], []
        for states, ids in zip(hidden.split(LOGITS_AT_ONCE), wanted.split(LOGITS_AT_ONCE), strict=True):
            logits = self.gpt.lm_head(states).float()
            losses.append(F.cross_entropy(logits, ids, ignore_index=IGNORE_INDEX, reduction="none"))
            is_likeliest.append(logits.argmax(dim=1) == ids)
        return torch.cat(losses).view_as(targets).cpu(), torch.cat(is_likeliest).view_as(targets).cpu()


def _windows(stream: Iterable[np.ndarray], block_size: int) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    """(tokens, targets) side by side; the last may be shorter."""
    rest = np.empty(0, dtype=np.int64)
    for piece in stream:
        rest = np.concatenate([rest, piece.astype(np.int64)])
        whole = max(0, len(rest) - 1) // block_size
        for k in range(whole):
            window = rest[k * block_size : (k + 1) * block_size + 1]
            yield window[:-1], window[1:]
        rest = rest[whole * block_size :]
    if len(rest) > 1:
        yield rest[:-1], rest[1:]


# The text, as a stream of tokens.


def tokens_of(source: str, text_key: str, tokenizer: Tokenizer, block_size: int) -> Iterator[np.ndarray]:
    """Yield the tokens of a text, every document with end-of-text before it; of ready shards, the windows that training
    validates on.

    source, text_key: as data.source and data.text_key. Raises UserError for shards of a larger vocabulary.
    """
    folder = Path(source).expanduser()
    if ready_format(folder):
        shards = TokenShards.open(folder, "val")
        shards.check_vocabulary(tokenizer.vocab_size)
        end = windows_in(len(shards), block_size, "val") * block_size + 1
        for start in range(0, end, TOKENS_AT_A_TIME):
            yield shards.read(start, min(TOKENS_AT_A_TIME, end - start))
        return
    for document in open_source(source, text_key).documents():
        starts = True
        for piece in document.pieces():
            yield tokenizer.encode_stream([(piece, starts)])
            starts = False


def conversations_of(source: str, tokenizer: Tokenizer, block_size: int) -> ConversationWindows | None:
    """The windows that training validates on, of ready shards of conversations; None for any other text."""
    folder = Path(source).expanduser()
    if ready_format(folder) != "ours" or "document_end" not in (manifest := read_manifest(folder)):
        return None
    shards = TokenShards.open(folder, "val")
    shards.check_vocabulary(tokenizer.vocab_size)
    turns = Turns(folder / manifest["splits"]["val"]["turns"]["file"], len(shards))
    return ConversationWindows(shards, turns, block_size, manifest["document_end"])


def validation_shards(checkpoints: Sequence[Path]) -> str:
    """The shards of the run that the first of these checkpoints belongs to.

    Raises UserError where the run's folder does not say, and where they hold another text than one was trained with.
    """
    from nanogpt_lit.data.datamodule import TokenDataModule  # which imports Lightning

    kept, _ = latest_config(checkpoints[0].parent.parent)
    data = (kept or {}).get("data") or {}
    root = ((kept or {}).get("trainer") or {}).get("default_root_dir")
    candidates = [data.get("source"), data.get("shards_dir"), Path(root) / "shards" if root else None]
    for folder in candidates:
        if folder is not None and ready_format(Path(folder).expanduser()):
            text = TokenDataModule(str(folder)).text
            for checkpoint in checkpoints:
                trained_on = validations_of(checkpoint).get("text") if checkpoint.suffix == SUFFIX else None
                if trained_on not in (None, text):
                    raise UserError(
                        f"{folder} now holds another text than {checkpoint} was trained with; name what to measure, "
                        f"--data {folder} or that text."
                    )
            return str(folder)
    raise UserError(
        f"{checkpoints[0]} lies in no run whose shards are here; name a text, or a folder of shards, with --data."
    )
