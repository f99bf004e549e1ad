"""Teachers of a fit: the models whose probabilities its network learns."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nanogpt_lit.data.datamodule import TokenDataModule
from nanogpt_lit.data.tokenizer import Tokenizer
from nanogpt_lit.errors import UserError
from nanogpt_lit.gpt.average import Average
from nanogpt_lit.gpt.distillation import TaughtLoss
from nanogpt_lit.gpt.network import Network
from nanogpt_lit.module import LitNanoGPT


@dataclass(frozen=True)
class Teachers:
    names: Sequence[str]
    gpt: Network
    tokenizer: Tokenizer

    @classmethod
    def of(cls, names: Sequence[str]) -> "Teachers":
        """Reads any models that `convert` reads. Raises UserError as it does, and where their tokenizers differ."""
        from nanogpt_lit.checkpoint.convert import load_mean  # late: all formats are behind it

        gpt, tokenizer = load_mean([Path(name) for name in names])
        return cls(names, gpt, tokenizer)

    def check(self, data: TokenDataModule, vocab_size: int) -> None:
        """Raises UserError where they cannot read the run's sequences, or speak of other tokens."""
        config = self.gpt.config
        if self.tokenizer.sha256 != data.tokenizer.sha256 or config.vocab_size != vocab_size:
            raise UserError(
                f"teachers={','.join(self.names)} has {config.vocab_size:,} tokens of the tokenizer "
                f"{self.tokenizer.name}, and this run {vocab_size:,} of {data.tokenizer.name}: a network learns from "
                "those that have its own; use the data section that they were trained with."
            )
        if data.block_size > config.block_size:
            raise UserError(
                f"data.block_size={data.block_size} is longer than the {config.block_size} tokens that "
                f"teachers={','.join(self.names)} can read; set data.block_size={config.block_size} or less."
            )

    def teach(self, module: LitNanoGPT) -> None:
        """Gives the module their loss. It holds them, and no checkpoint of its does."""
        teachers = self.gpt if isinstance(self.gpt, Average) else Average([self.gpt])
        module.loss = TaughtLoss(module.gpt, teachers, compiled=module.hparams["compile"])
