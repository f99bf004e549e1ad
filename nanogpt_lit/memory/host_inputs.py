"""What autograd keeps for backward, kept in host memory."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from nanogpt_lit.memory.host import Mark, empty_on_host, lanes


@dataclass
class _Away:
    at_host: Tensor
    device: torch.device
    left: Mark


def saved_on_host() -> saved_tensors_hooks:
    """A context: tensors that are saved inside leave the card, and come back when backward asks for them.

    torch.autograd.graph.save_on_cpu does the same with the card waiting for every copy.
    """
    return saved_tensors_hooks(_send_away, _bring_back)


def _send_away(tensor: Tensor) -> Tensor | _Away:
    if tensor.numel() == 0:
        return tensor
    at_host = empty_on_host(tensor)
    _, leaving = lanes(tensor.device)
    return _Away(at_host, tensor.device, leaving.copy(tensor, at_host, after=Mark.now(tensor.device)))


def _bring_back(away: Tensor | _Away) -> Tensor:
    if isinstance(away, Tensor):
        return away
    arriving, _ = lanes(away.device)
    tensor = torch.empty_like(away.at_host, device=away.device)
    # Its memory may still be read by what is computed now, and what it is filled with may still be leaving.
    away.left.hold_computation()
    arriving.copy(away.at_host, tensor, after=Mark.now(away.device)).hold_computation()
    return tensor
