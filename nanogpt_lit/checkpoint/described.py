"""What a YAML says of a run, for a checkpoint of somebody's own loop, which does not say it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from nanogpt_lit.checkpoint.state import RunState
from nanogpt_lit.data.tokenizer import Tokenizer
from nanogpt_lit.gpt.model import GPTConfig
from nanogpt_lit.optim.adamw import AdamWConfig
from nanogpt_lit.optim.schedule import ScheduleConfig


@dataclass(frozen=True)
class Described:
    gpt: GPTConfig
    optim: AdamWConfig
    schedule: ScheduleConfig
    tokenizer: Tokenizer
    order: Mapping[str, int]
    """What the order of samples is a function of: seed, block_size, batch_size."""
    accumulate_grad_batches: int

    @property
    def data(self) -> dict[str, Any]:
        """As TokenDataModule.state_dict() has it."""
        return {"tokenizer": self.tokenizer.files(), **self.order}

    def complete(self, state: RunState) -> RunState:
        """The run with the data and the tokens that its checkpoint did not know of."""
        data = {**self.data, **state.data}
        tokens = state.batches * state.processes * data["batch_size"] * data["block_size"]
        return replace(state, data=data, tokens=state.tokens or tokens)
