"""What did not fit, and how a run goes on: how many sequences at a time, and how far up the ladder."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from nanogpt_lit.elastic.climb import as_high, changed, climb, next_rung
from nanogpt_lit.errors import UserError
from nanogpt_lit.gpt.model import GPT
from nanogpt_lit.memory.techniques import MemoryConfig

NAMES = {True: "sequences", False: "validation_sequences"}
"""With gradients and without: what a checkpoint calls the number of sequences at a time."""
ALL = 2**31
"""As a number of sequences: however many there are."""


class Finding:
    """It only ever grows: to fewer sequences, and to higher rungs, which the network takes at once."""

    def __init__(self, gpt: GPT, memory: MemoryConfig, is_compiled: bool) -> None:
        self._gpt = gpt
        self.own = self._memory = memory
        self._is_compiled = is_compiled
        self._climbs = 0
        self._sequences: dict[bool, int] = {}

    def sequences(self, with_gradients: bool) -> int | None:
        """At a time; None: all of a micro-batch."""
        return self._sequences.get(with_gradients)

    def state_dict(self) -> dict[str, Any]:
        """Plain values; empty while everything fits."""
        found: dict[str, Any] = {NAMES[kind]: sequences for kind, sequences in self._sequences.items()}
        if self._memory != self.own:
            found["memory"] = changed(self._memory, self.own)
        return found

    def __str__(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.state_dict().items())

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes at least as far as a state_dict. Raises UserError for what a run cannot have found."""
        for kind, name in NAMES.items():
            sequences = state.get(name)
            if sequences is not None:
                if type(sequences) is not int or sequences < 1:
                    raise UserError(f"the checkpoint's elastic.{name}={sequences!r} is no number of sequences.")
                self._at_most(kind, sequences)
        climbed = state.get("memory", {})
        try:
            height = replace(self.own, **climbed)
        except (TypeError, ValueError) as error:
            raise UserError(f"the checkpoint's elastic.memory={climbed!r} is no setting of model.memory.") from error
        # As high as the run had climbed, from the YAML of today: whoever has put the techniques there is there already.
        while not as_high(self._memory, height) and self._climb("recast_weights" in climbed):
            pass

    def grow(self, with_gradients: bool, batch_size: int, casts_weights: bool) -> str | None:
        """Halves the number of sequences at a time, or else climbs. Says what it does; None when neither is left.

        casts_weights: whether autocast copies the weights to 16 bits
        """
        sequences = min(batch_size, self._sequences.get(with_gradients, batch_size))
        if sequences > 1:
            self._sequences[with_gradients] = (sequences + 1) // 2
            return f"{batch_size} sequences of a micro-batch are computed {(sequences + 1) // 2} at a time from here on"
        before = self._memory
        rung = self._climb(casts_weights)
        if rung is None:
            return None
        fields = ", ".join(f"model.memory.{key}={value}" for key, value in changed(self._memory, before).items())
        return f"one sequence at a time does not fit, so from here on {rung} ({fields})"

    # For processes that agree: the least of each number is what all of them go on with.

    def numbers(self) -> list[int]:
        return [self._sequences.get(True, ALL), self._sequences.get(False, ALL), -self._climbs]

    def adopt(self, numbers: Sequence[int], casts_weights: bool) -> None:
        """Goes at least as far as another process, which began with the same YAML."""
        for kind, sequences in zip((True, False), numbers, strict=False):
            if sequences < ALL:
                self._at_most(kind, sequences)
        while self._climbs < -numbers[2] and self._climb(casts_weights):
            pass

    def _at_most(self, kind: bool, sequences: int) -> None:
        self._sequences[kind] = min(sequences, self._sequences.get(kind, sequences))

    def _climb(self, casts_weights: bool) -> str | None:
        """What the next rung does, which the network has taken; None when there is none."""
        rung = None if self._is_compiled else next_rung(self._memory, casts_weights)
        if rung is None:
            return None
        name, self._memory = rung
        self._climbs += 1
        climb(self._gpt, self._memory)
        return name
