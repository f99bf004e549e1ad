import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table

from nanogpt_lit.gpt.layers import CompiledEmbedding
from nanogpt_lit.module import LitNanoGPT

REPEATED = """
import torch
from nanogpt_lit.gpt.layers import CompiledEmbedding
torch.manual_seed(0)
table = CompiledEmbedding(65, 256)
tokens, weights = torch.randint(0, 65, (16, 256)), torch.randn(16, 256, 256)
loss = torch.compile(lambda: (table(tokens) * weights).sum())
gradients = {torch.autograd.grad(loss(), table.weight)[0].numpy().tobytes() for _ in range(40)}
print(torch.get_num_threads(), len(gradients))
"""


@pytest.mark.parametrize("shape", [(3, 5), (7,)])
def test_a_compiled_table_has_the_rows_and_the_gradient_of_pytorchs(shape):
    ours, theirs = CompiledEmbedding(11, 4), nn.Embedding(11, 4)
    theirs.load_state_dict(ours.state_dict())
    tokens, weights = torch.randint(0, 11, shape), torch.randn(*shape, 4)
    compiled = torch.compile(lambda: (ours(tokens) * weights).sum(), fullgraph=True, backend="aot_eager")
    loss, expected = compiled(), (theirs(tokens) * weights).sum()
    loss.backward()
    expected.backward()
    assert torch.equal(loss, expected)
    assert torch.equal(ours.weight.grad, theirs.weight.grad)


def test_the_compiler_of_a_cpu_is_given_no_sum_that_threads_share():
    graphs = []

    def keep(graph, _):
        graphs.append(graph.code)
        return graph.forward

    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep, decompositions=select_decomp_table())
    table, tokens = CompiledEmbedding(11, 4), torch.randint(0, 11, (3, 5))
    torch.compile(lambda: table(tokens).sum(), backend=backend)().backward()
    assert "rows_gradient" in graphs[1]
    assert "index_put" not in graphs[1]


def test_a_module_that_is_compiled_has_such_tables_and_the_weights_of_one_that_is_not(tiny_gpt):
    compiled, eager = (LitNanoGPT(tiny_gpt, compile=compile) for compile in (True, False))
    tables = [part for part in compiled.modules() if isinstance(part, nn.Embedding)]
    assert {type(table) for table in tables} == {CompiledEmbedding}
    assert compiled.state_dict().keys() == eager.state_dict().keys()


@pytest.mark.long
def test_on_two_threads_the_compiled_gradient_is_the_same_each_time():
    done = subprocess.run(
        [sys.executable, "-c", REPEATED], env=os.environ | {"OMP_NUM_THREADS": "2"},
        capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip
    assert done.stdout.split() == ["2", "1"]  # threads, and gradients that differ
