"""A training step that does not run out of memory: where it does not fit, it is done again in smaller pieces.

The loss of a micro-batch is a mean over its targets: a piece of it, some of its sequences, has a share of the mean, and
the shares' gradients add up to the same. When an allocator fails in forward or backward, the step's gradients are
dropped, the random state goes back to where the step began, its micro-batches, which are kept until it ends, are
halved, and the step is done again. The loop around it (accumulation, loss scale, clipping, schedule, order of samples)
notices nothing. The pieces' size is kept, for the rest of the run and in its checkpoints. When not even one sequence at
a time fits, the network takes the next technique of the ladder (plan/ladder.py).

A loop calls the module and then `backward` of its loss, as always: all of this is behind the two. As long as nothing
fails, the same kernels run in the same order, on the same memory.

Several processes (DistributedDataParallel) need no agreement for it: gradients are exchanged once a step, in pieces or
not. A process that fails while the others wait for its gradients computes those anew that it has not sent, and sends
them. With a checkpoint all go on with the smallest pieces that one of them has found (loops/elastic_start.py).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from nanogpt_lit.elastic.climb import as_high, changed, climb, next_rung
from nanogpt_lit.elastic.exchange import ArrivalRecord, hand_over, stand_ins
from nanogpt_lit.elastic.guarded_optimizer import GuardedOptimizer, give_back
from nanogpt_lit.elastic.micro_batch import (
    MicroBatch,
    RandomState,
    differentiate,
    differentiate_pending,
    loss_of,
    pieces,
    random_state,
    set_random_state,
    share_of,
)
from nanogpt_lit.elastic.shortage import MIB, attempt
from nanogpt_lit.gpt.model import GPT
from nanogpt_lit.memory.techniques import MemoryConfig

Loss = Callable[[Tensor, Tensor], Tensor]
WHAT_FAILS = {
    "forward": "activations",
    "backward": "activations and gradients",
    "validation": "the activations of validation",
}
FOUND = {True: "sequences", False: "validation_sequences"}
"""With gradients and without: what a checkpoint calls the number of sequences at a time."""


@dataclass(frozen=True)
class ElasticConfig:
    """What happens when memory ends. Until then it costs nothing."""

    enabled: bool = True
    """Do a step that does not fit again, in smaller pieces. False ends the run there."""

    budget_mib: int | None = None
    """What PyTorch may reserve of the card, in MiB; memory ends there. None is all of the card, under Windows what is
    free of it when training starts."""

    def __post_init__(self) -> None:
        if self.budget_mib is not None and self.budget_mib < 1:
            raise ValueError(
                f"model.elastic.budget_mib={self.budget_mib} must be at least 1; 3200 leaves room for a desktop on a "
                "4 GiB card, null sets no limit."
            )


@dataclass
class _Run:
    """The loop that an Elastic is in, and how far its step is."""

    optimizer: GuardedOptimizer
    scaled: Callable[[Tensor], Tensor]
    say: Callable[[str], None]
    arrivals: ArrivalRecord | None
    """None where no hooks exchange gradients."""
    window: list[MicroBatch] = field(default_factory=list)
    """The micro-batches whose gradients the parameters hold."""
    random: RandomState | None = None
    """Where the step began; None while nothing draws."""
    is_stale: bool = True
    """Whether the parameters still hold the gradients of the step before."""
    has_left_gradients: bool = False
    """Whether the forward of the open micro-batch has: of all pieces but the last."""


class Elastic:
    """Calls the loss of one network. Attached to a loop, in pieces where it does not fit at once."""

    def __init__(self, gpt: GPT, memory: MemoryConfig, config: ElasticConfig, is_compiled: bool = False) -> None:
        self.config = config
        self._gpt = gpt
        self._own = self._memory = memory
        self._is_compiled = is_compiled
        self._sequences: dict[bool, int] = {}
        self._loss: Loss | None = None
        self._run: _Run | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy is in no loop."""
        return {**self.__dict__, "_loss": None, "_run": None}

    # What a run has found, for its checkpoints.

    @property
    def finding(self) -> dict[str, Any]:
        """Plain values; empty while everything fits."""
        found: dict[str, Any] = {FOUND[kind]: sequences for kind, sequences in self._sequences.items()}
        if self._memory != self._own:
            found["memory"] = changed(self._memory, self._own)
        return found

    def restore(self, finding: Mapping[str, Any]) -> None:
        """Goes at least as far as what the run has found before, or another process of it.

        Raises ValueError for what it cannot have found.
        """
        if not self.config.enabled:
            return
        for kind, name in FOUND.items():
            sequences = finding.get(name)
            if sequences is not None:
                if type(sequences) is not int or sequences < 1:
                    raise ValueError(f"the checkpoint's elastic.{name}={sequences!r} is no number of sequences.")
                self._sequences[kind] = min(sequences, self._sequences.get(kind, sequences))
        climbed = finding.get("memory", {})
        try:
            height = replace(self._own, **climbed)
        except (TypeError, ValueError) as error:
            raise ValueError(f"the checkpoint's elastic.memory={climbed!r} is no setting of model.memory.") from error
        memory = self._memory
        # As high as the run had climbed, from the YAML of today: whoever has put the techniques there is there already.
        while not as_high(memory, height):
            rung = self._next_rung(memory, casts_weights="recast_weights" in climbed)
            if rung is None:
                break
            memory = rung[1]
        self._use(memory)

    # What a loop tells.

    def attach(
        self,
        optimizer: Optimizer,
        scaled: Callable[[Tensor], Tensor],
        say: Callable[[str], None],
        exchanges: bool = False,
    ) -> None:
        """From here on, the steps of this optimizer are elastic. Whatever wraps the optimizer does so afterwards.

        scaled: what the loop makes of a loss before backward   say: where a line goes when something is found
        exchanges: whether hooks on the parameters exchange gradients between processes
        """
        self.detach()
        if not self.config.enabled:
            return
        guarded = GuardedOptimizer(optimizer, say, on_step=self.begin_step, on_zero_grad=self._on_zero_grad)
        self._run = _Run(guarded, scaled, say, ArrivalRecord(guarded.parameters) if exchanges else None)

    def detach(self) -> None:
        """The loop is over."""
        if self._run is not None:
            self._run.optimizer.release()
            if self._run.arrivals is not None:
                self._run.arrivals.release()
        self._run = self._loss = None

    def begin_step(self) -> None:
        """Follows from every optimizer.step and zero_grad. To be called before a step by a loop that zeroes gradients
        between the forward and the backward of its first micro-batch, for the sake of steps that a scaler skips."""
        if self._run is not None:
            self._run.window, self._run.is_stale = [], True

    def _on_zero_grad(self) -> bool:
        """Whether to; not when the gradients that are there belong to the step that begins."""
        run = self._run
        if run is None or run.has_left_gradients:
            return run is None
        run.window, run.is_stale = [], False
        return True

    # What a module calls.

    def __call__(self, loss: Loss, tokens: Tensor, targets: Tensor) -> Tensor:
        """loss(tokens, targets), a mean over targets, whose backward is elastic too.

        Not attached, it is the loss and no more. Raises ValueError when nothing is left that would make it fit.
        """
        if self._run is None:
            return loss(tokens, targets)
        self._loss = loss
        if torch.is_grad_enabled():
            return self._begin(self._run, MicroBatch.here(tokens, targets))
        while True:
            mean, shortage = attempt(self._mean, tokens, targets)
            if shortage is None:
                return mean
            self._make_room(self._run, "validation", shortage, MicroBatch.here(tokens, targets))

    def _mean(self, tokens: Tensor, targets: Tensor) -> Tensor:
        first, *others = (self._part(*piece) for piece in pieces(tokens, targets, self._sequences.get(False)))
        return sum(others, start=first)

    def _part(self, tokens: Tensor, targets: Tensor, share: Tensor | None) -> Tensor:
        assert self._loss is not None
        return share_of(self._loss(tokens, targets), share)

    def _begin(self, run: _Run, batch: MicroBatch) -> Tensor:
        if not run.window:
            draws = self._gpt.training and self._gpt.config.dropout > 0
            run.random = random_state(batch.tokens.device) if draws else None
        run.has_left_gradients = False
        while True:
            value, shortage = attempt(self._forward, run, batch)
            if shortage is None:
                break
            self._do_again(run, run.window, "forward", shortage, batch)
        return loss_of(batch, value, finish=lambda: self._finish(run, batch))

    def _forward(self, run: _Run, batch: MicroBatch) -> Tensor:
        """The value of the loss. Of several pieces, the last alone is left for the loop's backward."""
        *first, last = pieces(batch.tokens, batch.targets, self._sequences.get(True))
        if first and run.is_stale:
            run.optimizer.drop_gradients()
            run.is_stale = False
        total: Tensor | float = 0.0
        for piece in first:
            part = self._part(*piece)
            total = total + part.detach()
            run.has_left_gradients = True
            differentiate(run.scaled(part), batch)
        batch.pending = self._part(*last)
        return batch.pending.detach() + total if first else batch.pending.detach()

    def _finish(self, run: _Run, batch: MicroBatch) -> None:
        """The loop's backward, which has left its gradient of the loss in batch.d_loss."""
        if run.arrivals is not None:
            run.arrivals.clear()
        _, shortage = attempt(differentiate_pending, batch)
        if run.arrivals is None:
            self._do_again(run, [*run.window, batch], "backward", shortage, batch)
        else:
            self._do_again_beside(run, run.arrivals, [*run.window, batch], shortage, batch)
        run.window.append(batch)
        run.is_stale = run.has_left_gradients = False

    # Once memory has ended.

    def _do_again(self, run: _Run, batches: list[MicroBatch], phase: str, shortage: str | None, at: MicroBatch) -> None:
        """Undoes the step, and does its micro-batches again until they fit. at: where memory ended, if it has"""
        if shortage is None:
            return
        while shortage is not None:
            run.optimizer.drop_gradients()
            self._make_room(run, phase, shortage, at)
            _, shortage = attempt(self._replay, run, batches, at)
        run.is_stale, run.has_left_gradients = False, bool(batches)

    def _do_again_beside(
        self, run: _Run, arrivals: ArrivalRecord, batches: list[MicroBatch], shortage: str | None, at: MicroBatch
    ) -> None:
        """The same for the gradients that are not on their way to other processes."""
        if shortage is None:
            return
        missing = [p for p in run.optimizer.parameters if p not in arrivals.arrived]
        for p in missing:
            p.grad = None
        with stand_ins(self._gpt, constant=arrivals.arrived) as others:
            while shortage is not None:
                for p in missing:
                    others[p].grad = None
                self._make_room(run, "backward", shortage, at)
                _, shortage = attempt(self._replay, run, batches, at)
        hand_over(missing, others)

    def _replay(self, run: _Run, batches: list[MicroBatch], at: MicroBatch) -> None:
        if run.random is not None:
            set_random_state(run.random, at.tokens.device)
        for batch in batches:
            for piece in pieces(batch.tokens, batch.targets, self._sequences.get(True)):
                with torch.enable_grad(), batch.autocast():
                    part = self._part(*piece)
                differentiate(part, batch, batch.d_loss)

    def _make_room(self, run: _Run, phase: str, shortage: str, at: MicroBatch) -> None:
        """Halves the pieces, or else climbs; says so. Raises ValueError when neither is left."""
        at.pending = None
        with_gradients = phase != "validation"
        B = at.tokens.size(0)
        sequences = min(B, self._sequences.get(with_gradients, B))
        rung = self._next_rung(self._memory, casts_weights=at.autocast_dtype is not None)
        if sequences > 1:
            self._sequences[with_gradients] = sequences = (sequences + 1) // 2
            found = f"{B} sequences of a micro-batch are computed {sequences} at a time from here on"
        elif rung is not None:
            name, memory = rung
            fields = ", ".join(f"model.memory.{key}={value}" for key, value in changed(memory, self._memory).items())
            found = f"one sequence at a time does not fit, so from here on {name} ({fields})"
            self._use(memory)
        else:
            raise ValueError(self._nothing_left(run, phase, shortage, at))
        give_back()
        run.say(f"out of memory in {phase} ({shortage}): {found}; the same step is done again")

    def _next_rung(self, memory: MemoryConfig, casts_weights: bool) -> tuple[str, MemoryConfig] | None:
        return None if self._is_compiled else next_rung(memory, casts_weights)

    def _use(self, memory: MemoryConfig) -> None:
        if memory != self._memory:
            climb(self._gpt, memory)
            self._memory = memory

    def _nothing_left(self, run: _Run, phase: str, shortage: str, at: MicroBatch) -> str:
        parameters = run.optimizer.parameters
        mib = sum(16 * p.numel() for p in parameters if p.device == at.tokens.device) / MIB
        ways = [
            f"model.memory.{name}=host"
            for name, where in (("weights", self._own.weights), ("optimizer_state", self._own.optimizer_state))
            if where == "card" and self._own.weights == "card"
        ]
        return (
            f"{WHAT_FAILS[phase]} of one sequence of {at.tokens.size(1)} tokens do not fit beside weights, gradients "
            f"and the optimizer's state, {mib:,.0f} MiB ({shortage}); set "
            f"{' or '.join([*ways, 'a smaller data.block_size'])}, or see `python -m nanogpt_lit plan`."
        )
