"""Steps that do not run out of memory (elastic/elastic.py), for every loop."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nanogpt_lit.checkpoint.state import RunState
from nanogpt_lit.elastic.elastic import Elastic
from nanogpt_lit.elastic.shortage import cap_card_memory
from nanogpt_lit.loops.contract import Parts
from nanogpt_lit.run.curves import say
from nanogpt_lit.runtime.processes import gathered


def start_elastic(
    parts: Parts, accumulate_grad_batches: int, device: torch.device, start: RunState | None = None
) -> None:
    """Makes a module's steps elastic, if it is one that can be. To be called before a framework wraps the optimizer.

    device: where it will compute   start: the checkpoint that the run goes on from, if nobody has told the module
    """
    elastic = elastic_of(parts.module)
    if elastic is None:
        return
    if start is not None:
        elastic.restore(start.elastic)

    def scaled(loss: Tensor) -> Tensor:
        loss = loss / accumulate_grad_batches
        return loss if parts.scaler is None else parts.scaler.scale(loss)

    elastic.attach(parts.optimizer, scaled, say, at_end=cap_card_memory(device, elastic.config.budget_mib))


def agree_on_steps(module: nn.Module, replica: nn.Module) -> None:
    """Has several processes take the same steps. Each calls it, after start_elastic.

    replica: the module as the loop calls it; a module that trains alone is its own
    """
    elastic = elastic_of(module)
    if elastic is not None and isinstance(replica, DistributedDataParallel):
        elastic.agree_through(replica)


def stop_elastic(module: nn.Module) -> None:
    elastic = elastic_of(module)
    if elastic is not None:
        elastic.detach()


def elastic_of(module: nn.Module) -> Elastic | None:
    elastic = getattr(module, "elastic", None)
    return elastic if isinstance(elastic, Elastic) else None


def finding_of(module: nn.Module) -> dict[str, Any]:
    """What a checkpoint keeps of it."""
    elastic = elastic_of(module)
    return {} if elastic is None else elastic.finding


def share_finding(module: nn.Module) -> None:
    """All processes go on with what each of them has found. Each has to call it."""
    elastic = elastic_of(module)
    if elastic is None:
        return
    for finding in gathered(elastic.finding):
        elastic.restore(finding)
