"""The step that survives an out-of-memory: where it does not fit, it is done again in less memory.

`start_elastic` puts an ElasticLoss in the place of a module's `loss`, and `stop_elastic` takes it off. A loop calls the
module and then `backward` of what it returns, as always: all of this is behind the two. As long as nothing fails, the
same kernels run in the same order, on the same memory.

When an allocator fails in forward or backward, the gradients of the step are dropped, the random state goes back to
where the step began, and its micro-batches, which are kept until it ends, are done again. There are two ways to need
less, and both stay for the rest of the run and are in its checkpoints:

1. the loss in chunks, and weights cast again in backward, which cost no time (memory/techniques.py);
2. half as many sequences at a time. The loss of a micro-batch is a mean over its targets: that of some of its sequences
   has a share in it, and the gradients of the shares add up to the same.

When one sequence does not fit, the run ends with the lines of YAML that need less (oom.py). So it does when memory ends
in the optimizer, because an update that has begun cannot be undone and PyTorch has by then given back all that it
could, and with several processes, of which the others would wait for one that does a step again.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.amp import GradScaler

from nanogpt_lit.errors import UserError
from nanogpt_lit.memory.micro_batch import MicroBatch, catch_oom, loss_of, share_of
from nanogpt_lit.memory.oom import free_unused, limit_device_memory
from nanogpt_lit.memory.techniques import FREE_OF_COST, MemoryConfig, change_techniques
from nanogpt_lit.runtime.process_settings import RandomState, random_state, set_random_state

SEQUENCES = ("sequences", "validation_sequences")
"""Keys of module.fallback for the number of sequences at a time, with gradients and without."""


@dataclass(frozen=True)
class ElasticConfig:
    """Settings for a step that runs out of memory. Until one does, they cost nothing."""

    enabled: bool = True
    """Do a step that does not fit again, in less memory. False ends the run there."""

    budget_mib: int | None = None
    """Most memory that PyTorch may reserve of the GPU, in MiB. None is all of the GPU, under Windows what is
    free of it when training starts."""

    def __post_init__(self) -> None:
        if self.budget_mib is not None and self.budget_mib < 1:
            raise UserError(
                f"model.elastic.budget_mib={self.budget_mib} must be at least 1; 3200 leaves room for a desktop on a "
                "4 GiB GPU, null sets no limit."
            )


def start_elastic(
    module: Any,
    *,
    accumulate_grad_batches: int,
    scaler: GradScaler | None,
    device: torch.device,
    say: Callable[[str], None],
) -> None:
    """Make the steps of a LitNanoGPT survive an out-of-memory, until stop_elastic. Other modules are left alone.

    What module.fallback says holds from the beginning: a run that goes on puts its checkpoint's there.
    scaler: of the loop, None unless gradients are scaled   device: where it computes   say: where a line goes
    Raises UserError for a fallback that cannot be, and for a budget that the device does not have.
    """
    if not hasattr(module, "elastic_config"):
        return
    stop_elastic(module)
    restore = limit_device_memory(device, module.elastic_config.budget_mib)

    def scaled(loss: Tensor) -> Tensor:
        loss = loss / accumulate_grad_batches
        return loss if scaler is None else scaler.scale(loss)

    module.loss = ElasticLoss(module, scaled, say, restore)
    fallback, module.fallback = module.fallback, {}
    module.loss.fall_back(fallback)


def stop_elastic(module: Any) -> None:
    """The run is over: the module's loss is its network's again."""
    loss = getattr(module, "loss", None)
    if isinstance(loss, ElasticLoss):
        loss.restore_limit()
        module.loss = loss.loss


class ElasticLoss:
    """The loss of a module that is trained, in less memory where it does not fit."""

    def __init__(
        self,
        module: Any,
        scaled: Callable[[Tensor], Tensor],
        say: Callable[[str], None],
        restore_limit: Callable[[], None],
    ) -> None:
        """scaled: what the loop makes of a loss before backward"""
        self.loss: Callable[[Tensor, Tensor], Tensor] = module.loss
        self.restore_limit = restore_limit
        self.window: list[MicroBatch] = []
        """The micro-batches whose gradients the parameters hold."""
        self._random: RandomState | None = None  # where their step began; None while nothing draws
        self._module, self._scaled, self._say = module, scaled, say
        self._memory: MemoryConfig = module.memory_config
        trains_alone = not (dist.is_available() and dist.is_initialized())
        self._is_on = module.elastic_config.enabled and trains_alone

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy of the module is in no loop."""
        return copy.deepcopy(self.loss, memo)

    def __call__(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Compute the loss. Raises UserError when one sequence at a time does not fit."""
        if not self._is_on:
            return self.loss(tokens, targets)
        kind = tokens.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        batch = MicroBatch(tokens, targets, dtype)
        return self._train(batch) if torch.is_grad_enabled() else self._validate(batch)

    def _validate(self, batch: MicroBatch) -> Tensor:
        while True:
            mean, reported = catch_oom(self._mean, batch)
            if reported is None:
                return mean
            self._need_less("validation", reported, batch)

    def _mean(self, batch: MicroBatch) -> Tensor:
        first, *others = (self._part(*piece) for piece in batch.pieces(self._sequences("validation")))
        return sum(others, start=first)

    def _train(self, batch: MicroBatch) -> Tensor:
        if not self.window:
            gpt = self._module.gpt
            draws = gpt.training and gpt.config.dropout > 0
            self._random = random_state(batch.tokens.device) if draws else None
        while True:
            if SEQUENCES[0] in self._module.fallback:
                batch.value, reported = catch_oom(self._forward_in_pieces, batch)
            else:
                batch.pending, reported = catch_oom(self.loss, batch.tokens, batch.targets)
                batch.value = batch.pending.detach() if batch.pending is not None else None
            if reported is None:
                return loss_of(batch, backward=partial(self._backward, batch))
            self._do_again(self.window, "forward", reported, batch)

    def _forward_in_pieces(self, batch: MicroBatch) -> Tensor:
        """The value of the loss. Of several pieces, the last alone is left for the loop's backward."""
        *first, last = batch.pieces(self._sequences("forward"))
        total: Tensor | float = 0.0
        if first and not self.window:
            self._drop_gradients()  # of the step before
        for piece in first:
            part = self._part(*piece)
            total = total + part.detach()
            batch.differentiate(self._scaled(part))
        if first:  # a loop may drop what it takes for the gradients of the step before
            batch.gradients = [p.grad for p in self._module.parameters()]
            self._drop_gradients()
        batch.pending = self._part(*last)
        return batch.pending.detach() + total if first else batch.pending.detach()

    def _backward(self, batch: MicroBatch) -> None:
        """The loop's, which has left its gradient of the loss in batch.d_loss."""
        if batch.gradients is not None:
            for p, gradient in zip(self._module.parameters(), batch.gradients, strict=True):
                p.grad = gradient
            batch.gradients = None
        _, reported = catch_oom(batch.differentiate_pending)
        if reported is not None:
            self._do_again([*self.window, batch], "backward", reported, batch)
        self.window.append(batch)

    def _part(self, tokens: Tensor, targets: Tensor, share: Tensor | None) -> Tensor:
        return share_of(self.loss(tokens, targets), share)

    def _drop_gradients(self) -> None:
        for p in self._module.parameters():
            p.grad = None

    # Once memory has ended.

    def _do_again(self, batches: list[MicroBatch], phase: str, reported: str | None, at: MicroBatch) -> None:
        """Do the step's micro-batches again until they fit. at: the one in which memory ended"""
        while reported is not None:
            at.pending = at.gradients = None
            self._drop_gradients()
            self._need_less(phase, reported, at)
            _, reported = catch_oom(self._replay, batches, at.tokens.device)

    def _replay(self, batches: list[MicroBatch], device: torch.device) -> None:
        if self._random is not None:
            set_random_state(self._random, device)
        for batch in batches:
            for piece in batch.pieces(self._sequences("backward")):
                with torch.enable_grad(), batch.autocast():
                    part = self._part(*piece)
                batch.differentiate(part, batch.d_loss)

    def _need_less(self, phase: str, reported: str, at: MicroBatch) -> None:
        """Take the next of the two ways, and say so. Raises UserError when there is none."""
        from nanogpt_lit.memory.ladder import advice, free_of_cost  # late, for few runs come here

        changes: dict[str, Any] = {}
        if not self._module.hparams["compile"]:  # its graph would be compiled anew, where memory has just ended
            changes = free_of_cost(self._memory, at.casts_weights, at.tokens.numel())
        size = at.tokens.size(0)
        sequences = min(size, self._sequences(phase) or size)
        if changes:
            step = "from here on with " + ", ".join(f"model.memory.{key}={changes[key]}".lower() for key in changes)
        elif sequences > 1:
            changes = {_key(phase): (sequences + 1) // 2}
            step = f"{size} sequences of a micro-batch are computed {changes[_key(phase)]} at a time from here on"
        else:
            where = f"{phase} of one sequence of {at.tokens.size(1)} tokens"
            raise UserError(advice(self._module, at.casts_weights, where, reported, self._memory))
        free_unused()
        self.fall_back(changes)
        self._say(f"out of memory in {phase} ({reported}): {step}; what did not fit is done again")

    def fall_back(self, changes: Mapping[str, Any]) -> None:
        """Need less from here on: module.fallback, of this run or of the one that it goes on from.

        Raises UserError for what is no fallback.
        """
        for key, value in changes.items():
            counts = key in ("loss_chunk_tokens", *SEQUENCES) and type(value) is int and value > 0
            if not counts and (key, value) != ("recast_weights", True):
                raise UserError(f"the checkpoint's elastic.{key}={value!r} is nothing that a run can fall back to.")
        if self._memory.loss_chunk_tokens is not None:  # as the YAML may have it by now
            changes = {key: value for key, value in changes.items() if key != "loss_chunk_tokens"}
        techniques = {key: value for key, value in changes.items() if key in FREE_OF_COST}
        if techniques:
            self._memory = replace(self._memory, **techniques)
            change_techniques(self._module.gpt, self._memory)
        self._module.fallback = {**self._module.fallback, **changes}

    def _sequences(self, phase: str) -> int | None:
        """The number of sequences at a time; None: all of a micro-batch."""
        return self._module.fallback.get(_key(phase))


def _key(phase: str) -> str:
    return SEQUENCES[phase == "validation"]
