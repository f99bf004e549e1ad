import pytest
import torch

from nanogpt_lit.gpt.model import GPTConfig


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """The sum of a matrix product depends on the number of threads: bits are compared at one and the same, also those
    of a module's fixture, which is set up before any other."""
    torch.set_num_threads(2)


@pytest.fixture
def tiny_gpt():
    return GPTConfig(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=8)
