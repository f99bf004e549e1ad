"""A training step that does not run out of memory: where it does not fit, it is done again in smaller pieces.

The loss of a micro-batch is a mean over its targets: a piece of it, some of its sequences, has a share of the mean, and
the shares' gradients add up to the same. When an allocator fails in forward or backward, the step's gradients are
dropped, the random state goes back to where the step began, its micro-batches, which are kept until it ends, are
halved, and the step is done again. The loop around it (accumulation, loss scale, clipping, schedule, order of samples)
notices nothing. The pieces' size is kept, for the rest of the run and in its checkpoints. When not even one sequence at
a time fits, the network takes the next technique of the ladder (memory/ladder.py).

A loop calls the module and then `backward` of its loss, as always: all of this is behind the two. As long as nothing
fails, the same kernels run in the same order, on the same memory.

Several processes (DistributedDataParallel) take every step in the same pieces. Before a step ends each says whether
memory ended in it; if it did in one of them, all do the step again, in the smallest pieces that one has found, and only
then exchange gradients anew.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from nanogpt_lit.elastic.finding import Finding
from nanogpt_lit.elastic.micro_batch import Loss
from nanogpt_lit.elastic.steps import Steps
from nanogpt_lit.errors import UserError
from nanogpt_lit.gpt.model import GPT
from nanogpt_lit.memory.techniques import MemoryConfig


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
            raise UserError(
                f"model.elastic.budget_mib={self.budget_mib} must be at least 1; 3200 leaves room for a desktop on a "
                "4 GiB card, null sets no limit."
            )


class Elastic:
    """Calls the loss of one network. Attached to a loop, in pieces where it does not fit at once."""

    def __init__(self, gpt: GPT, memory: MemoryConfig, config: ElasticConfig, is_compiled: bool = False) -> None:
        self.config = config
        self._gpt = gpt
        self._finding = Finding(gpt, memory, is_compiled)
        self._steps: Steps | None = None
        self._at_end: Callable[[], None] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy is in no loop."""
        return {**self.__dict__, "_steps": None, "_at_end": None}

    @property
    def finding(self) -> dict[str, Any]:
        """What a run has found, for its checkpoints: plain values, empty while everything fits."""
        return self._finding.state_dict()

    def restore(self, finding: Mapping[str, Any]) -> None:
        """Goes at least as far as what the run has found before, or another process of it.

        Raises UserError for what it cannot have found.
        """
        if self.config.enabled:
            self._finding.restore(finding)

    # What a loop tells.

    def attach(
        self,
        optimizer: Optimizer,
        scaled: Callable[[Tensor], Tensor],
        say: Callable[[str], None],
        at_end: Callable[[], None] | None = None,
    ) -> None:
        """From here on, the steps of this optimizer are elastic. Whatever wraps the optimizer does so afterwards.

        scaled: what the loop makes of a loss before backward   say: where a line goes when something is found
        at_end: called when the loop is over
        """
        self.detach()
        self._at_end = at_end
        if self.config.enabled:
            self._steps = Steps(self._gpt, self._finding, optimizer, scaled, say)

    def agree_through(self, replica: DistributedDataParallel) -> None:
        """From here on, the processes that train replicas of the module together take the same steps. Each calls it."""
        if self._steps is not None:
            self._steps.agree_through(replica)

    def begin_step(self) -> None:
        """Follows from every optimizer.step and zero_grad. To be called before a step by a loop that zeroes gradients
        between the forward and the backward of its first micro-batch, for the sake of steps that a scaler skips."""
        if self._steps is not None:
            self._steps.begin()

    def detach(self) -> None:
        """The loop is over."""
        if self._steps is not None:
            self._steps.release()
        if self._at_end is not None:
            self._at_end()
        self._steps = self._at_end = None

    # What a module calls.

    def __call__(self, loss: Loss, tokens: Tensor, targets: Tensor) -> Tensor:
        """loss(tokens, targets), a mean over targets, whose backward is elastic too.

        Not attached, it is the loss and no more. Raises UserError when nothing is left that would make it fit.
        """
        if self._steps is None:
            return loss(tokens, targets)
        if torch.is_grad_enabled():
            return self._steps.train(loss, tokens, targets)
        return self._steps.validate(loss, tokens, targets)
