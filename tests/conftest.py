import pytest
import torch

from nanogpt_lit.gpt.model import GPTConfig


@pytest.fixture(autouse=True)
def _two_threads():
    """The sum of a matrix product depends on the number of threads: bits are compared at one and the same."""
    torch.set_num_threads(2)


@pytest.fixture
def tiny_gpt():
    return GPTConfig(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=8)
