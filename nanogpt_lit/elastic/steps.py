"""The steps of one loop: see elastic.py."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from nanogpt_lit.elastic.exchange import FAILED, FITS, LOST, Exchange, handed_over
from nanogpt_lit.elastic.finding import Finding
from nanogpt_lit.elastic.guarded_optimizer import GuardedOptimizer, give_back
from nanogpt_lit.elastic.micro_batch import (
    Loss,
    MicroBatch,
    differentiate,
    differentiate_pending,
    loss_of,
    pieces,
    share_of,
)
from nanogpt_lit.elastic.shortage import MIB, attempt
from nanogpt_lit.errors import UserError
from nanogpt_lit.gpt.model import GPT
from nanogpt_lit.runtime.random_state import RandomState, random_state, set_random_state

WHAT_FAILS = {
    "forward": "activations",
    "backward": "activations and gradients",
    "validation": "the activations of validation",
}


class Steps:
    """How far a step is, and how it is done again when memory ends in it."""

    def __init__(
        self,
        gpt: GPT,
        finding: Finding,
        optimizer: Optimizer,
        scaled: Callable[[Tensor], Tensor],
        say: Callable[[str], None],
    ) -> None:
        self._gpt, self._finding, self._scaled, self._say = gpt, finding, scaled, say
        self._optimizer = GuardedOptimizer(optimizer, say, on_step=self.begin, on_zero_grad=self._on_zero_grad)
        self._loss: Loss = gpt.loss
        self._exchange: Exchange | None = None  # of a process that does not train alone
        # The micro-batches whose gradients the parameters hold, and where their step began; None while nothing draws.
        self._window: list[MicroBatch] = []
        self._random: RandomState | None = None
        # Whether the parameters still hold the gradients of the step before.
        self._is_stale = True
        # Whether the forward of the open micro-batch has left gradients: of all pieces but the last.
        self._has_left_gradients = False
        # Whether memory has ended in this step, and no other process knows.
        self._has_failed = False
        # Whose forward is called again, for the exchange of gradients that are there.
        self._handing_over: MicroBatch | None = None

    def agree_through(self, replica: DistributedDataParallel) -> None:
        self._exchange = Exchange(replica, self._optimizer.parameters)

    def release(self) -> None:
        self._optimizer.release()
        if self._exchange is not None:
            self._exchange.release()

    def begin(self) -> None:
        self._window, self._is_stale = [], True

    def _on_zero_grad(self) -> bool:
        """Whether to; not when the gradients that are there belong to the step that begins."""
        if self._has_left_gradients:
            return False
        self._window, self._is_stale = [], False
        return True

    # What a module calls.

    def validate(self, loss: Loss, tokens: Tensor, targets: Tensor) -> Tensor:
        self._loss = loss
        while True:
            mean, shortage = attempt(self._mean, tokens, targets)
            if shortage is None:
                return mean
            self._make_room("validation", shortage, MicroBatch.here(tokens, targets))

    def train(self, loss: Loss, tokens: Tensor, targets: Tensor) -> Tensor:
        self._loss = loss
        if self._handing_over is not None:
            return self._gradients_as_they_are(self._handing_over)
        return self._begin_batch(MicroBatch.here(tokens, targets))

    def _mean(self, tokens: Tensor, targets: Tensor) -> Tensor:
        first, *others = (self._part(*piece) for piece in pieces(tokens, targets, self._finding.sequences(False)))
        return sum(others, start=first)

    def _part(self, tokens: Tensor, targets: Tensor, share: Tensor | None) -> Tensor:
        return share_of(self._loss(tokens, targets), share)

    def _begin_batch(self, batch: MicroBatch) -> Tensor:
        if not self._window:
            draws = self._gpt.training and self._gpt.config.dropout > 0
            self._random = random_state(batch.tokens.device) if draws else None
        self._has_left_gradients = False
        while True:
            value, shortage = attempt(self._forward, batch)
            if shortage is None:
                break
            self._do_again(self._window, "forward", shortage, batch)
        batch.value = value
        return loss_of(batch, finish=lambda: self._finish(batch))

    def _forward(self, batch: MicroBatch) -> Tensor:
        """The value of the loss. Of several pieces, the last alone is left for the loop's backward."""
        *first, last = pieces(batch.tokens, batch.targets, self._finding.sequences(True))
        if first and self._is_stale:
            self._optimizer.drop_gradients()
            self._is_stale = False
        total: Tensor | float = 0.0
        for piece in first:
            part = self._part(*piece)
            total = total + part.detach()
            self._has_left_gradients = True
            differentiate(self._scaled(part), batch)
        batch.pending = self._part(*last)
        return batch.pending.detach() + total if first else batch.pending.detach()

    def _finish(self, batch: MicroBatch) -> None:
        """The loop's backward, which has left its gradient of the loss in batch.d_loss."""
        batches, exchange = [*self._window, batch], self._exchange
        if exchange is None or not exchange.is_due:
            _, shortage = attempt(differentiate_pending, batch)
            self._do_again(batches, "backward", shortage, batch)
        else:
            exchange.begin_backward()
            _, shortage = attempt(differentiate_pending, batch)
            if shortage is not None:
                exchange.complete()
            self._agree(exchange, batches, shortage, batch)
        self._window.append(batch)
        self._is_stale = self._has_left_gradients = False

    # Once memory has ended.

    def _do_again(self, batches: list[MicroBatch], phase: str, shortage: str | None, at: MicroBatch) -> None:
        """Undoes the step, and does its micro-batches again until they fit. at: where memory ended, if it has"""
        if shortage is None:
            return
        while shortage is not None:
            self._optimizer.drop_gradients()
            self._make_room(phase, shortage, at)
            _, shortage = attempt(self._replay, batches, at)
        self._is_stale, self._has_left_gradients = False, bool(batches)

    def _agree(self, exchange: Exchange, batches: list[MicroBatch], shortage: str | None, at: MicroBatch) -> None:
        """At the end of a step whose gradients were exchanged. Where memory ended in any process, they were not right:
        all do the step again until it fits everywhere, and exchange anew."""
        is_first_time = True
        while not self._all_fit(exchange, shortage, at):
            is_first_time = False
            self._optimizer.drop_gradients()
            _, shortage = attempt(self._replay, batches, at)
        if not is_first_time:
            # The replica's own exchange, in its own order: of a forward that computes nothing.
            self._handing_over = at
            try:
                with torch.enable_grad():
                    ready = exchange.replica(at.tokens, at.targets)
            finally:
                self._handing_over = None
            ready.backward()

    def _all_fit(self, exchange: Exchange, shortage: str | None, at: MicroBatch) -> bool:
        """Whether memory lasted in all processes; all go on with what each has found. Raises UserError in all when
        one of them cannot go on."""
        nothing_left: UserError | None = None
        if shortage is not None:
            try:
                self._make_room("backward", shortage, at)
            except UserError as error:
                nothing_left = error
        verdict = LOST if nothing_left is not None else FAILED if self._has_failed else FITS
        own = self._finding.numbers()
        worst, *numbers = exchange.agree([verdict, *own])
        if worst == LOST:
            raise nothing_left or UserError(
                "memory ended in another process, which says what does not fit and cannot go on."
            )
        self._has_failed = False
        self._finding.adopt(numbers, at.casts_weights)
        if numbers != own:
            give_back()
            if exchange.is_first:
                self._say(f"out of memory in another process: all go on with what it found, {self._finding}")
        return worst == FITS

    def _gradients_as_they_are(self, batch: MicroBatch) -> Tensor:
        """A loss of the same value, whose backward gives the parameters the gradients that they have."""
        assert batch.value is not None
        parameters = self._optimizer.parameters
        gradients = [p.grad for p in parameters]
        for p in parameters:
            p.grad = None
        return handed_over(parameters, gradients, batch.value)

    def _replay(self, batches: list[MicroBatch], at: MicroBatch) -> None:
        if self._random is not None:
            set_random_state(self._random, at.tokens.device)
        for batch in batches:
            for piece in pieces(batch.tokens, batch.targets, self._finding.sequences(True)):
                with torch.enable_grad(), batch.autocast():
                    part = self._part(*piece)
                differentiate(part, batch, batch.d_loss)

    def _make_room(self, phase: str, shortage: str, at: MicroBatch) -> None:
        """Halves the pieces, or else climbs; says so. Raises UserError when neither is left."""
        at.pending = None
        self._has_failed |= phase != "validation"
        found = self._finding.grow(phase != "validation", at.tokens.size(0), at.casts_weights)
        if found is None:
            raise UserError(self._nothing_left(phase, shortage, at))
        give_back()
        self._say(f"out of memory in {phase} ({shortage}): {found}; the same step is done again")

    def _nothing_left(self, phase: str, shortage: str, at: MicroBatch) -> str:
        parameters = self._optimizer.parameters
        mib = sum(16 * p.numel() for p in parameters if p.device == at.tokens.device) / MIB
        own = self._finding.own
        ways = [
            f"model.memory.{name}=host"
            for name, where in (("weights", own.weights), ("optimizer_state", own.optimizer_state))
            if where == "card" and own.weights == "card"
        ]
        return (
            f"{WHAT_FAILS[phase]} of one sequence of {at.tokens.size(1)} tokens do not fit beside weights, gradients "
            f"and the optimizer's state, {mib:,.0f} MiB ({shortage}); set "
            f"{' or '.join([*ways, 'a smaller data.block_size'])}, or see `python -m nanogpt_lit plan`."
        )
