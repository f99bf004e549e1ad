"""Products of float32 matrices by oneDNN, against float64 and MKL; and the process is left as it was found."""

import pytest
import torch
from small_runs import LOOPS, fit, small_run
from torch.utils._python_dispatch import TorchDispatchMode

from nanogpt_lit.__main__ import main
from nanogpt_lit.gpt.attention import attention
from nanogpt_lit.gpt.generate import generate
from nanogpt_lit.gpt.gpt2 import GPTConfig
from nanogpt_lit.loops import reference
from nanogpt_lit.loops.contract import LoopSettings
from nanogpt_lit.module import LitNanoGPT
from nanogpt_lit.optim.schedule import ScheduleConfig
from nanogpt_lit.runtime import process_settings
from nanogpt_lit.runtime.process_settings import by_mkl, restored_matmul_backend, set_matmul_backend

onednn_only = pytest.mark.skipif(not process_settings.onednn_is_exact(), reason="MKL multiplies on this CPU")
CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def as_in_a_new_process():
    process_settings.onednn_is_exact.cache_clear()
    yield
    process_settings.onednn_is_exact.cache_clear()


@pytest.fixture
def onednn(monkeypatch):
    """As on a CPU where oneDNN is exact, whatever this one is."""
    monkeypatch.setattr(process_settings, "onednn_is_exact", lambda: True)


def settings_of_process():
    older = torch.get_float32_matmul_precision()
    return older, torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision


class Asked(TorchDispatchMode):
    """Who multiplies in each operation."""

    def __init__(self):
        super().__init__()
        self.libraries = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.partition("::")[2]
        self.libraries.setdefault(name, set()).add(torch.backends.mkldnn.matmul.fp32_precision)
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
    set_matmul_backend(CPU, tf32=False)
    for product, exact in [(a @ b, a.double() @ b.double()), (b.t() @ a.t(), b.t().double() @ a.t().double())]:
        # A sum of K products, each of two numbers of 24 bits, rounded at each addition: about sqrt(K) * 2**-24.
        assert (product - exact).norm() / exact.norm() < K**0.5 * 2**-24


def test_a_cpu_that_would_round_to_bfloat16_stays_with_mkl(monkeypatch):
    eye = torch.eye
    monkeypatch.setattr(torch, "eye", lambda *args, **options: eye(*args, **options) * (1 + 2.0**-8))
    before = settings_of_process()
    set_matmul_backend(CPU, tf32=False)
    assert settings_of_process() == before


def test_one_without_avx512_stays_with_mkl(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    before = settings_of_process()
    set_matmul_backend(CPU, tf32=False)
    assert settings_of_process() == before


def test_a_cpu_that_multiplies_by_onednn_allows_no_tf32_on_a_gpu(onednn):
    set_matmul_backend(CPU, tf32=True)
    assert torch.backends.mkldnn.matmul.fp32_precision == process_settings.ONEDNN
    assert torch.backends.cuda.matmul.fp32_precision != "tf32"
    assert not torch.backends.cuda.matmul.allow_tf32


def test_a_gpu_takes_tf32_where_it_may_and_else_what_it_was_told():
    set_matmul_backend(GPU, tf32=False)
    assert settings_of_process() == ("highest", "ieee", "ieee")
    set_matmul_backend(GPU, tf32=True)
    assert torch.backends.cuda.matmul.allow_tf32
    set_matmul_backend(GPU, tf32=False)  # the user's own setting
    assert settings_of_process() == ("high", "tf32", "ieee")


@pytest.mark.parametrize(
    ("owner", "precision"),
    [
        (torch.backends.cuda.matmul, "tf32"),
        (torch.backends.mkldnn.matmul, "tf32"),
        (torch.backends.mkldnn.matmul, "bf16"),
        (torch.backends, "tf32"),
    ],
)
def test_on_a_gpu_pytorchs_older_setting_can_be_read_whatever_a_user_has_set_by_the_newer_one(owner, precision):
    """Lightning reads it when it prepares the GPU, and PyTorch raises where the two say different things."""
    owner.fp32_precision = precision
    try:
        with restored_matmul_backend():
            set_matmul_backend(GPU, tf32=False)
            assert torch.get_float32_matmul_precision() in ("highest", "high")
            assert isinstance(torch.backends.cuda.matmul.allow_tf32, bool)
        assert owner.fp32_precision == precision
    finally:
        owner.fp32_precision = "none"


def set_then_fail(device):
    set_matmul_backend(device, tf32=True)
    raise MemoryError


def test_what_was_set_is_put_back_also_after_an_error(onednn):
    for older in ("highest", "high"):
        torch.set_float32_matmul_precision(older)
        before = settings_of_process()
        for device in (CPU, GPU):
            with pytest.raises(MemoryError), restored_matmul_backend():
                set_then_fail(device)
            assert settings_of_process() == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_with_tf32_a_gpu_multiplies_numbers_of_10_bits():
    a, b = (torch.randn(512, 512, device="cuda") for _ in range(2))
    errors = []
    for tf32 in (False, True):
        set_matmul_backend(GPU, tf32)
        errors.append(float((a @ b - a.double() @ b.double()).norm() / (a.double() @ b.double()).norm()))
    assert errors[0] < 1e-6
    assert 1e-5 < errors[1] < 2**-10


# In a run.


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_a_run_multiplies_by_onednn_and_leaves_the_process_as_it_was(loop, onednn, text, tmp_path, monkeypatch):
    seen, forward = set(), LitNanoGPT.forward

    def watched(module, tokens, targets):
        seen.add((torch.is_grad_enabled(), torch.backends.mkldnn.matmul.fp32_precision))
        return forward(module, tokens, targets)

    monkeypatch.setattr(LitNanoGPT, "forward", watched)
    before = settings_of_process()
    assert loop(*small_run(text, tmp_path / "root")) == 0
    assert seen == {(True, process_settings.ONEDNN), (False, process_settings.ONEDNN)}
    assert settings_of_process() == before
    if loop is fit:
        seen.clear()
        ckpt = tmp_path / "root" / "version_0" / "checkpoints" / "last.safetensors"
        assert main(["validate", *small_run(text, tmp_path / "root"), f"--ckpt_path={ckpt}"]) == 0
        assert seen == {(False, process_settings.ONEDNN)}
        assert settings_of_process() == before


def test_the_plain_loop_puts_it_back_where_a_step_fails(onednn):
    module = LitNanoGPT(network().gpt.config, schedule=ScheduleConfig(warmup_steps=1, total_steps=2))
    before, during = settings_of_process(), []

    def failing(*_):
        during.append(torch.backends.mkldnn.matmul.fp32_precision)
        raise MemoryError

    module.register_forward_pre_hook(failing)
    with pytest.raises(MemoryError):
        reference.train(module, [batch()], [], LoopSettings(2))
    assert during[0] == process_settings.ONEDNN
    assert settings_of_process() == before


def test_a_forward_changes_nothing_for_the_process(onednn):
    before = settings_of_process()
    network()(*batch()).backward()
    assert settings_of_process() == before


# Attention.


def test_matrices_are_multiplied_by_onednn_and_the_tiles_of_attention_by_mkl(onednn):
    module = network()
    set_matmul_backend(CPU, tf32=False)
    with Asked() as asked:
        module(*batch()).backward()
    assert asked.libraries["mm"] == {process_settings.ONEDNN}
    tiles = [libraries for name, libraries in asked.libraries.items() if "attention" in name]
    assert tiles == [{process_settings.MKL}] * 2  # forward and backward


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("T", [1, 16, 65, 300])
def test_attention_in_tiles_is_pytorchs_own_to_the_bit_with_its_gradients(T, is_causal, onednn):
    qkv = torch.randn(3, 2, 2, T, 8, generator=torch.Generator().manual_seed(0))
    outcomes = []
    for attend in (attention, torch.nn.functional.scaled_dot_product_attention):
        leaf = qkv.clone().requires_grad_()
        with restored_matmul_backend():
            if attend is attention:
                set_matmul_backend(CPU, tf32=False)
            y = attend(*leaf.unbind(0), is_causal=is_causal)
            y.square().sum().backward()
        outcomes.append((y, leaf.grad))
    for ours, theirs in zip(*outcomes, strict=True):
        assert torch.equal(ours, theirs)


def test_short_attention_in_bfloat16_is_computed_in_float32():
    q, k, v = torch.randn(3, 2, 2, 16, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = attention(q, k, v, is_causal=True)
    wide = torch.nn.functional.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True)
    assert torch.equal(y, wide.bfloat16())


def test_a_backward_pass_that_fails_inside_attention_leaves_the_bits_of_the_next(onednn):
    module = network()
    set_matmul_backend(CPU, tf32=False)
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
    assert torch.backends.mkldnn.matmul.fp32_precision == process_settings.ONEDNN
    module.zero_grad()
    module(*batch()).backward()
    assert all(torch.equal(p.grad, before) for p, before in zip(module.parameters(), undisturbed, strict=True))


def test_single_tokens_are_generated_by_mkl(onednn):
    set_matmul_backend(CPU, tf32=False)
    with Asked() as asked:
        list(generate(network().gpt, torch.zeros(1, 1, dtype=torch.int64), 3, temperature=0))
    assert asked.libraries["mm"] == {process_settings.MKL}
    assert torch.backends.mkldnn.matmul.fp32_precision == process_settings.ONEDNN


@onednn_only
def test_the_loss_is_that_of_mkl_up_to_rounding():
    module = network()
    set_matmul_backend(CPU, tf32=False)
    by_onednn = module(*batch())
    with by_mkl(CPU):
        # 100 additions and more in another order, each to 2**-24, in each of the layers.
        torch.testing.assert_close(by_onednn, module(*batch()), rtol=1e-5, atol=0)
