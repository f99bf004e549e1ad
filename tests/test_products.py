"""Products by oneDNN, against float64 and against the same network by MKL."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from nanogpt_lit.gpt import products
from nanogpt_lit.gpt.generate import generate
from nanogpt_lit.gpt.model import GPTConfig
from nanogpt_lit.module import LitNanoGPT
from nanogpt_lit.plan.shape_tensor import ShapeMode

onednn_only = pytest.mark.skipif(not products.multiply_by_onednn(), reason="MKL multiplies on this processor")


@pytest.fixture(autouse=True)
def as_in_a_new_process():
    products._taken = False
    products._is_exact.cache_clear()
    yield
    products._is_exact.cache_clear()


class Asked(TorchDispatchMode):
    """Who multiplies in each operation."""

    def __init__(self):
        super().__init__()
        self.libraries = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.libraries.setdefault(func._schema.name.partition("::")[2], set()).add(torch.get_float32_matmul_precision())
        return func(*args, **(kwargs or {}))


def network():
    torch.manual_seed(0)
    return LitNanoGPT(GPTConfig(block_size=32, vocab_size=64, n_layer=2, n_head=2, n_embd=64))


def batch():
    tokens = torch.randint(64, (4, 33), generator=torch.Generator().manual_seed(0))
    return tokens[:, :-1], tokens[:, 1:]


@pytest.mark.parametrize("shape", [(64, 32, 96), (512, 384, 1536), (768, 129, 65)])
def test_a_product_is_as_exact_as_float32_is(shape):
    M, K, N = shape
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(M, K, generator=generator), torch.randn(K, N, generator=generator)
    products.multiply_by_onednn()
    for product, exact in [(a @ b, a.double() @ b.double()), (b.t() @ a.t(), b.t().double() @ a.t().double())]:
        # A sum of K products, each of two numbers of 24 bits, rounded at each addition: about sqrt(K) * 2**-24.
        assert (product - exact).norm() / exact.norm() < K**0.5 * 2**-24


def test_a_processor_that_would_round_to_bfloat16_stays_with_mkl(monkeypatch):
    eye = torch.eye
    monkeypatch.setattr(torch, "eye", lambda *args, **options: eye(*args, **options) * (1 + 2.0**-8))
    assert not products.multiply_by_onednn()
    assert torch.get_float32_matmul_precision() == products.MKL


def test_one_without_avx512_stays_with_mkl(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert not products.multiply_by_onednn()
    assert torch.get_float32_matmul_precision() == products.MKL


def test_a_card_takes_tf32_where_it_may_and_else_what_it_was_told():
    on_card = torch.empty(1, device="meta")  # whatever is not a processor
    products.choose_products(on_card, tf32=False)
    assert torch.get_float32_matmul_precision() == "highest"
    products.choose_products(on_card, tf32=True)
    assert torch.backends.cuda.matmul.allow_tf32
    products.choose_products(on_card, tf32=False)  # the user's own setting
    assert torch.get_float32_matmul_precision() == "high"


@onednn_only
def test_a_card_after_a_processor_is_not_given_tf32():
    products.choose_products(torch.empty(1), tf32=False)
    assert torch.get_float32_matmul_precision() == products.ONEDNN
    products.choose_products(torch.empty(1, device="meta"), tf32=False)
    assert not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize("mode", [ShapeMode, FakeTensorMode])
def test_a_plan_that_is_made_beside_a_run_on_a_card_changes_nothing_for_it(mode):
    with mode():
        network()(*batch())
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
def test_with_tf32_a_card_multiplies_numbers_of_10_bits():
    a, b = (torch.randn(512, 512, device="cuda") for _ in range(2))
    errors = []
    for tf32 in (False, True):
        products.choose_products(a, tf32)
        errors.append(float((a @ b - a.double() @ b.double()).norm() / (a.double() @ b.double()).norm()))
    assert errors[0] < 1e-6
    assert 1e-5 < errors[1] < 2**-10


@onednn_only
def test_matrices_are_multiplied_by_onednn_and_the_tiles_of_attention_by_mkl():
    module = network()
    with Asked() as asked:
        module(*batch()).backward()
    assert asked.libraries["mm"] == {products.ONEDNN}
    tiles = [libraries for name, libraries in asked.libraries.items() if "attention" in name]
    assert tiles == [{products.MKL}] * 2  # forward and backward


def test_short_attention_in_bfloat16_is_computed_in_float32():
    q, k, v = torch.randn(3, 2, 2, 16, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = products.attention(q, k, v, is_causal=True)
    wide = torch.nn.functional.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True)
    assert torch.equal(y, wide.bfloat16())


@onednn_only
def test_a_backward_pass_that_fails_inside_attention_leaves_the_bits_of_the_next():
    module = network()
    module(*batch()).backward()
    undisturbed = [p.grad.clone() for p in module.parameters()]

    class Failing(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "attention" in func._schema.name and "backward" in func._schema.name:
                raise MemoryError
            return func(*args, **(kwargs or {}))

    loss = module(*batch())
    with pytest.raises(MemoryError), Failing():
        loss.backward()
    module.zero_grad()
    module(*batch()).backward()
    assert all(torch.equal(p.grad, before) for p, before in zip(module.parameters(), undisturbed, strict=True))


@onednn_only
def test_single_tokens_are_generated_by_mkl():
    products.multiply_by_onednn()
    with Asked() as asked:
        list(generate(network().gpt, torch.zeros(1, 1, dtype=torch.int64), 3, temperature=0))
    assert asked.libraries["mm"] == {products.MKL}
    assert torch.get_float32_matmul_precision() == products.ONEDNN


def test_the_loss_is_that_of_mkl_up_to_rounding():
    module = network()
    by_mkl = module.gpt.loss(*batch())
    # 100 additions and more in another order, each to 2**-24, in each of the layers.
    torch.testing.assert_close(module(*batch()), by_mkl, rtol=1e-5, atol=0)
