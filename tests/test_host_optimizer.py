"""AdamW with its moments in host memory: torch's own bits, torch's own state, and little of it on the GPU."""

import pytest
import torch
from lightning.fabric.utilities.optimizer import _optimizer_to_device
from torch.optim import AdamW

from nanogpt_lit.gpt.gpt2 import GPTConfig
from nanogpt_lit.memory import host_optimizer
from nanogpt_lit.memory.host_optimizer import HostAdamW
from nanogpt_lit.memory.techniques import MemoryConfig
from nanogpt_lit.module import LitNanoGPT
from nanogpt_lit.optim.adamw import AdamWConfig, build_optimizer
from nanogpt_lit.plan.kernels import CUBLAS_BYTES
from nanogpt_lit.plan.step import StepShape, trace_steps

IMPLEMENTATIONS = ("for-loop", "foreach", "fused")
SHAPES = [(71, 71), (77,), (2500,), (3 * 1024,), (1,), (100, 13)]


@pytest.fixture(autouse=True)
def _small_buckets(monkeypatch):
    """A parameter is cut into several slices, and a step takes more buckets than there are slots."""
    torch.set_num_threads(1)
    monkeypatch.setattr(host_optimizer, "BUCKET_ELEMENTS", 1024)


def parameters():
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]


def optimizer_of(adamw, params, implementation):
    return build_optimizer(
        [(str(k), p) for k, p in enumerate(params)], AdamWConfig(lr=0.01, implementation=implementation), adamw
    )


def take_steps(optimizer, params, first, last):
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_slices_are_computed_as_the_whole_tensor_is(implementation, threads):
    torch.set_num_threads(threads)
    ours, theirs = parameters(), parameters()
    for adamw, params in ((HostAdamW, ours), (AdamW, theirs)):
        take_steps(optimizer_of(adamw, params, implementation), params, 0, 4)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("first", "then"), [(AdamW, HostAdamW), (HostAdamW, AdamW), (HostAdamW, HostAdamW)])
def test_a_checkpoint_goes_from_one_to_the_other(first, then, implementation):
    params, straight = parameters(), parameters()
    before = optimizer_of(first, params, implementation)
    take_steps(before, params, 0, 3)
    after = optimizer_of(then, params, implementation)
    after.load_state_dict(before.state_dict())
    take_steps(after, params, 3, 6)

    reference = optimizer_of(AdamW, straight, implementation)
    take_steps(reference, straight, 0, 6)
    expected, found = reference.state_dict(), after.state_dict()
    assert found["param_groups"] == expected["param_groups"]
    for k, p in enumerate(params):
        assert torch.equal(p, straight[k])
        assert list(found["state"][k]) == list(expected["state"][k])
        for name, value in expected["state"][k].items():
            assert torch.equal(found["state"][k][name], value)


def test_lightning_does_not_move_the_moments_to_the_card_when_it_loads_them():
    params = parameters()
    optimizer = optimizer_of(HostAdamW, params, "fused")
    take_steps(optimizer, params, 0, 1)
    state_dict = optimizer.state_dict()
    for adamw, stay in ((HostAdamW, True), (AdamW, False)):
        loaded = optimizer_of(adamw, params, "fused")
        loaded.load_state_dict(state_dict)
        _optimizer_to_device(loaded, torch.device("meta"))  # in place of a GPU
        devices = {value["exp_avg"].device.type for value in loaded.state_dict()["state"].values()}
        assert devices == {"cpu" if stay else "meta"}


def test_a_parameter_without_gradient_is_left_alone():
    params = parameters()
    optimizer = optimizer_of(HostAdamW, params, "fused")
    take_steps(optimizer, params[:2], 0, 1)
    assert list(optimizer.state_dict()["state"]) == [0, 2]  # the first matrix and the first vector


def test_the_plan_sees_the_moments_leave_the_card(monkeypatch):
    monkeypatch.setattr(host_optimizer, "BUCKET_ELEMENTS", 2**22)
    gpt = GPTConfig(block_size=64, vocab_size=50304, n_layer=2, n_head=4, n_embd=256)
    shape = StepShape(batch_size=1, block_size=64, vocab_size=50304, accumulate_grad_batches=2)
    on_card, on_host = (
        trace_steps(lambda memory=memory: LitNanoGPT(gpt, memory=memory), shape)
        for memory in (MemoryConfig(), MemoryConfig(optimizer_state="host"))
    )
    count = LitNanoGPT(gpt).gpt.parameter_count(non_embedding=False)
    assert on_card.host_peak_bytes == 0
    assert on_host.host_peak_bytes == 8 * count
    assert on_card.peaks["forward"].bytes_by_category["optimizer"] >= 8 * count
    assert on_host.peaks["forward"].bytes_by_category["optimizer"] < 100 * 512  # one count per tensor
    # At the step: weights, gradients, and three buckets of 4 Mi parameters' moments.
    at_step = on_host.peaks["optimizer"].bytes - 2 * CUBLAS_BYTES
    assert 8 * count < at_step <= 8 * count + 3 * 2**22 * 8 + 2**20


def test_a_place_for_the_state_that_is_not_known_is_refused():
    with pytest.raises(ValueError, match=r"model\.memory\.optimizer_state='disk' is not known; use device or host"):
        MemoryConfig(optimizer_state="disk")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_on_a_card_the_bits_are_the_same_and_the_moments_are_page_locked(implementation):
    runs = []
    for adamw in (AdamW, HostAdamW):
        params = [torch.nn.Parameter(p.detach().cuda()) for p in parameters()]
        optimizer = optimizer_of(adamw, params, implementation)
        for step in range(5):
            generator = torch.Generator("cuda").manual_seed(step)
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator, device="cuda")
            optimizer.step()
        runs.append((params, optimizer.state_dict()["state"]))
    (plain, plain_state), (ours, our_state) = runs
    for k, (a, b) in enumerate(zip(plain, ours, strict=True)):
        assert torch.equal(a, b)
        for moment in ("exp_avg", "exp_avg_sq"):
            assert our_state[k][moment].is_pinned()
            assert torch.equal(plain_state[k][moment].cpu(), our_state[k][moment])
