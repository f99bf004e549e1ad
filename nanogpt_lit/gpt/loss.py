"""The language-modelling loss, from the hidden states to one number."""

import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100
"""A target with this value is not predicted and not counted; it is the default of PyTorch and Hugging Face."""


def cross_entropy(hidden: Tensor, head_weight: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy over the targets that are not IGNORE_INDEX, a float32 scalar.

    hidden: (B, T, C)   head_weight: (V, C)   targets: (B, T) int64
    NaN when every target is IGNORE_INDEX, as F.cross_entropy.
    """
    logits = F.linear(hidden, head_weight).flatten(0, 1)  # (B*T, V)
    # Under autocast the logits are 16-bit, and a sum over 50,000 exponentials needs more than 8 bits of mantissa.
    return F.cross_entropy(logits.float(), targets.flatten(), ignore_index=IGNORE_INDEX)
