"""A run that begins with the weights and the tokenizer of another model: step 0, a schedule and a best of its own."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from filelock import FileLock
from jsonargparse import Namespace
from torch import nn

from nanogpt_lit.checkpoint.convert import fetched, read_network
from nanogpt_lit.checkpoint.network import size
from nanogpt_lit.checkpoint.run_file import StoredNetwork
from nanogpt_lit.data.tokenizer import TOKENIZER_JSON, TOKENIZER_RANKS, Tokenizer
from nanogpt_lit.data.tokenizer_files import tokenizer_from_files, with_special_tokens
from nanogpt_lit.errors import UserError
from nanogpt_lit.gpt.network import HEAD
from nanogpt_lit.gpt.networks import NETWORKS, config_of, described, section_of
from nanogpt_lit.runtime.durable import write_durably

POSITIONS = "transformer.wpe.weight"
EMBEDDINGS = tuple(network.EMBEDDING for _, network in NETWORKS.values())
ONES_OWN = ("dropout", "block_size", "document_start", "document_end")
"""Fields that a fine-tuned network need not have in common with the one it begins from."""

SUFFIXES = (".safetensors", ".gguf", ".pt", ".ckpt", ".bin")
"""Endings of files that hold a network; any other may be a name on the hub."""


@dataclass(frozen=True)
class Beginning:
    source: str
    """The path or name, with its revision where it is a model of the hub."""
    what: str
    stored: StoredNetwork
    known: int
    """Tokens that the model has learnt; those behind them are of the run's own."""
    tokenizer: Tokenizer

    @classmethod
    def of(cls, source: str, special_tokens: Sequence[str], chats: bool) -> "Beginning":
        """Reads any model that `convert` reads. Raises UserError as it does.

        chats: whether it is to have conversations, for which a tokenizer without a chat template gets one
        """
        of_hub = re.fullmatch(r"gpt2(-\w+)?|[\w-]+/[\w.-]+", source) and Path(source).suffix not in SUFFIXES
        if of_hub and not Path(source).exists():
            name = f"openai-community/{source}" if "/" not in source else source
            raise UserError(
                f"init_from={source} is no file or folder here; a model of the hub is named as in hf:{name}."
            )
        path, source = fetched(source)
        what, stored = read_network(path)
        tokenizer = tokenizer_from_files(stored.tokenizer_files)
        known = tokenizer.vocab_size
        tokenizer = with_special_tokens(tokenizer, special_tokens)
        if chats:
            from nanogpt_lit.data.chat import able_to_chat

            tokenizer = able_to_chat(tokenizer)
        return cls(source, what, stored, known, tokenizer)

    def choose(self, settings: Namespace) -> None:
        """Sets the network and the tokenizer in settings of fit. Raises UserError for a block_size it has no positions
        for."""
        try:
            config = config_of(self.stored.hyper_parameters)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"init_from={self.source} holds another network than LitNanoGPT's.") from error
        if settings.data.block_size > config.block_size:
            raise UserError(
                f"data.block_size={settings.data.block_size} is longer than the {config.block_size} positions of "
                f"init_from={self.source}; set data.block_size={config.block_size} or less."
            )
        before, settings.model.network = section_of(settings.model), described(config)["network"]
        shape = settings.model[config.SECTION]
        for name in ONES_OWN:  # which the YAML may have given below the other network
            shape[name] = settings.model[before][name]
        for name, value in asdict(config).items():
            if name not in ONES_OWN:
                shape[name] = value
        assert config.vocab_size is not None
        shape.vocab_size = max(config.vocab_size, self.tokenizer.vocab_size)
        settings.data.tokenizer = option_of(self.tokenizer, Path(settings.trainer.default_root_dir))

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Check the shards' tokenizer. Raises UserError where they were made with another one than the model."""
        if tokenizer.sha256 != self.tokenizer.sha256:
            raise UserError(
                f"init_from={self.source} was trained with another tokenizer than this text has ({tokenizer.name}); a "
                "char tokenizer knows the characters of its own text alone, and ready shards keep theirs."
            )

    def load_into(self, module: nn.Module, block_size: int) -> None:
        """The weights, with the first block_size positions, and with rows for new tokens.

        A new row is the mean of those that were learnt: its logit is the mean of theirs, so that it takes hardly any
        probability from them before it is learnt itself.
        """
        weights = dict(self.stored.weights)
        for name, tensor in weights.items():
            if name.endswith(POSITIONS):
                weights[name] = tensor[:block_size]
            elif name.endswith((HEAD, *EMBEDDINGS)) and self.tokenizer.vocab_size > self.known:
                learnt = tensor[: self.known]
                new = learnt.mean(dim=0, keepdim=True).expand(self.tokenizer.vocab_size - self.known, -1)
                weights[name] = torch.cat([learnt, new, tensor[self.tokenizer.vocab_size :]])
        module.load_state_dict(weights)

    def __str__(self) -> str:
        shape = size(config_of(self.stored.hyper_parameters))
        return f"init: the weights and the tokenizer of {self.source}, {self.what}: {shape}"


def option_of(tokenizer: Tokenizer, folder: Path) -> str:
    """The value of data.tokenizer for it; one of byte pairs is written into the folder, in a file of that name."""
    if tokenizer.kind != "bpe":
        return tokenizer.kind
    files = tokenizer.files()
    path = folder / f"tokenizer_{tokenizer.sha256[:12]}.tiktoken"
    beside = {**json.loads(files[TOKENIZER_JSON]), "chat_template": tokenizer.chat_template}
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):  # every process of a run comes here
        if not path.is_file():
            write_durably(path.with_suffix(".json"), json.dumps(beside, indent=1) + "\n")
            write_durably(path, files[TOKENIZER_RANKS])
    return str(path)
