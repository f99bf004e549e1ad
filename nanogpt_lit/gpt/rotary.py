"""Positions as rotations of queries and keys: Su et al., RoFormer (arXiv:2104.09864)."""

import torch
from torch import Tensor, nn

BASE = 10_000.0
"""The paper's: the slowest pair of channels turns once in 2 pi * BASE tokens."""


class Rotary(nn.Module):
    """Turns each head's channels by angles that grow with the position, so that a product of a query and a key sees
    only how far apart they are.

    Channel i is paired with channel i + D / 2, as in GPT-NeoX and Llama; the paper pairs neighbours, which is the same
    network with its channels in another order. There is nothing to learn and nothing in the state_dict.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, block_size: int, D: int) -> None:
        super().__init__()
        angles = torch.outer(torch.arange(block_size).float(), BASE ** (-torch.arange(0, D, 2).float() / D))
        # A buffer goes where the network goes; it is made again with the network, so no checkpoint need hold it.
        self.register_buffer("cos", angles.cos(), persistent=False)  # (block_size, D / 2)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x: Tensor, start: int) -> Tensor:
        """x: (B, H, T, D), queries or keys of the positions from start on; the dtype stays."""
        end = start + x.size(2)
        cos, sin = self.cos[start:end], self.sin[start:end]  # (T, D / 2)
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
        return turned.type_as(x)  # computed in float32 also where autocast hands in 16 bits
