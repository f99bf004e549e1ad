"""Weights in host memory: where everything lies, what travels, and when. Bits: tests/test_offload.py."""

import copy
import functools

import pytest
import torch
from lightning.fabric.utilities.optimizer import _optimizer_to_device
from torch._subclasses.fake_tensor import FakeTensorMode

from nanogpt_lit.gpt.gpt2 import GPTConfig
from nanogpt_lit.loops.contract import device_of, scaler_beside
from nanogpt_lit.memory.host import HELD
from nanogpt_lit.memory.host_weights import HostWeights
from nanogpt_lit.memory.techniques import MemoryConfig
from nanogpt_lit.module import LitNanoGPT
from nanogpt_lit.optim.adamw import AdamWConfig
from nanogpt_lit.optim.schedule import ScheduleConfig
from nanogpt_lit.plan.allocator import MIB
from nanogpt_lit.plan.kernels import CUBLAS_BYTES
from nanogpt_lit.plan.shape_tensor import HOST
from nanogpt_lit.plan.step import StepShape, trace_steps


def made(gpt, **memory):
    torch.manual_seed(0)
    return LitNanoGPT(gpt, AdamWConfig(lr=0.05), ScheduleConfig(total_steps=9), memory=MemoryConfig(**memory))


def batch(seed, device="cpu"):
    windows = torch.randint(0, 11, (2, 9), generator=torch.Generator().manual_seed(seed)).to(device)
    return windows[:, :-1], windows[:, 1:]


@pytest.mark.parametrize("weights", ["host", "streamed"])
def test_the_weights_stay_resident_when_the_module_is_sent_to_a_card(weights, tiny_gpt):
    module = made(tiny_gpt, weights=weights)
    before = {name: (p, p.data_ptr()) for name, p in module.named_parameters()}
    module.to("meta")  # in place of a GPU
    for name, p in module.named_parameters():
        assert (p, p.data_ptr()) == before[name]
        assert p.device.type == "cpu"
    assert module.gpt.lm_head.weight is module.gpt.transformer.wte.weight
    module.double()  # a dtype is taken over
    assert {p.dtype for p in module.parameters()} == {torch.float64}


@pytest.mark.parametrize("weights", ["host", "streamed"])
def test_names_and_shapes_are_those_of_the_plain_network(weights, tiny_gpt):
    plain, ours = made(tiny_gpt), made(tiny_gpt, weights=weights)
    assert list(plain.state_dict()) == list(ours.state_dict())
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, ours.state_dict()[name])


@pytest.mark.parametrize("implementation", ["for-loop", "foreach", "fused"])
@pytest.mark.parametrize("weights", ["host", "streamed"])
def test_the_card_gets_the_weights_of_now(weights, implementation, tiny_gpt):
    """After a step of any optimizer, after a checkpoint, and in another precision."""
    module = made(tiny_gpt, weights=weights)
    module.optim_config = AdamWConfig(lr=0.05, implementation=implementation)
    optimizer = module.configure_optimizers()["optimizer"]

    def is_up_to_date():
        plain = made(tiny_gpt)
        plain.load_state_dict(module.state_dict())
        for dtype in (None, torch.bfloat16):
            with torch.no_grad(), torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
                assert torch.equal(module(*batch(0)), plain(*batch(0)))

    is_up_to_date()
    module(*batch(1)).backward()
    optimizer.step()
    is_up_to_date()
    torch.manual_seed(5)
    module.load_state_dict({name: torch.randn_like(p) for name, p in module.state_dict().items()})
    is_up_to_date()


def test_a_copy_of_the_network_computes_with_weights_of_its_own(tiny_gpt):
    module = made(tiny_gpt, weights="host")
    loss = module(*batch(0))
    other = copy.deepcopy(module)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    assert other(*batch(0)).item() == pytest.approx(torch.log(torch.tensor(11.0)).item())
    assert torch.equal(module(*batch(0)), loss)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_streamed_weights_are_sent_ahead_in_the_order_in_which_they_are_used(recompute, tiny_gpt, monkeypatch):
    asked, sent = [], []
    stream, depart = HostWeights._stream, HostWeights._depart
    monkeypatch.setattr(HostWeights, "_stream", lambda *args: asked.append(args[1]) or stream(*args))
    monkeypatch.setattr(HostWeights, "_depart", lambda *args: sent.append(args[1]) or depart(*args))
    module = made(tiny_gpt, weights="streamed", recompute=recompute)
    names = {p: name for name, p in module.named_parameters()}
    per_batch = []
    for seed in range(4):
        asked.clear()
        sent.clear()
        module(*batch(seed)).backward()
        per_batch.append(([names[p] for p in asked], [names[p] for p in sent]))
    matrices = 4 * tiny_gpt.n_layer
    for asked_for, was_sent in per_batch[2:]:  # the first shows the order, the second its end
        assert len(asked_for) == 2 * matrices + 1  # in forward and in backward; the head once
        # While one is used the next travels, also the first of the next batch; unless it is the one that is used.
        first_ahead = asked_for[0] != asked_for[-1]
        assert first_ahead == (recompute == "full")
        assert was_sent == (asked_for[1:] + asked_for[:1] if first_ahead else asked_for)


@pytest.mark.parametrize("weights", ["host", "streamed"])
def test_in_a_trace_all_parameters_are_on_its_host_and_a_tied_one_is_one(weights, tiny_gpt):
    with FakeTensorMode():
        module = made(tiny_gpt, weights=weights)
    assert {p.device.type for p in module.parameters()} == {HOST}
    assert module.gpt.lm_head.weight is module.gpt.transformer.wte.weight


@functools.cache
def peak(weights):
    gpt = GPTConfig(block_size=64, vocab_size=50304, n_layer=4, n_head=4, n_embd=256)
    shape = StepShape(1, 64, 50304, accumulate_grad_batches=2, precision="bf16-mixed")
    config = MemoryConfig(loss_chunk_tokens=32, recompute="full", weights=weights)
    trace = trace_steps(lambda: LitNanoGPT(gpt, memory=config), shape)
    count = LitNanoGPT(gpt).gpt.parameter_count(non_embedding=False)
    head = 50304 * 256
    return trace, count, head


def test_the_plan_sees_16_bytes_a_parameter_leave_the_card():
    trace, count, head = peak("host")
    on_card = trace.peak.bytes - 2 * CUBLAS_BYTES
    # The blocks' 16-bit copies, and in the loss the head's with its float32 gradient; of the rest little at 64 tokens.
    copies = 2 * (count - head)
    assert copies + 6 * head < on_card < copies + 6 * head + 2 * 32 * 50304 * 6
    assert trace.peaks["optimizer"].bytes_by_category.get("gradients", 0) == 0
    assert trace.host_peak_bytes > 16 * count


def test_the_plan_sees_streamed_weights_come_and_go():
    resident, count, head = peak("host")
    streamed, _, _ = peak("streamed")
    blocks = 2 * (count - head)
    one_block = blocks / 4
    # At most a block in its recomputation, and one matrix ahead.
    assert resident.peaks["optimizer"].bytes - streamed.peaks["optimizer"].bytes > blocks - 2 * one_block
    assert streamed.host_peak_bytes - resident.host_peak_bytes == pytest.approx(blocks, rel=0.1)


def test_block_inputs_leave_the_card_in_the_plan():
    gpt = GPTConfig(block_size=512, vocab_size=128, n_layer=5, n_head=5, n_embd=160)
    shape = StepShape(4, 512, 128, accumulate_grad_batches=2, precision="bf16-mixed")
    peaks = {}
    for where in ("device", "host"):
        memory = MemoryConfig(recompute="full", block_inputs=where)
        trace = trace_steps(lambda memory=memory: LitNanoGPT(gpt, memory=memory), shape)
        peaks[where] = trace.peaks["backward"].bytes, trace.host_peak_bytes
    inputs = 4 * 512 * 160 * 4  # 1.25 MiB
    assert peaks["host"][1] == 5 * 2 * MIB  # page-locked memory comes in powers of two
    # All but the one that is computed with and those that are kept until they are copied.
    assert peaks["device"][0] - peaks["host"][0] >= (5 - 1 - HELD) * inputs


@pytest.mark.parametrize(
    ("memory", "sentence"),
    [
        ({"weights": "disk"}, r"model\.memory\.weights='disk' is not known; use device, host or streamed"),
        ({"block_inputs": "disk"}, r"model\.memory\.block_inputs='disk' is not known; use device or host"),
        ({"block_inputs": "host"}, r"block_inputs=host does nothing while recompute is none"),
    ],
)
def test_a_choice_that_cannot_be_is_refused(memory, sentence):
    with pytest.raises(ValueError, match=sentence):
        MemoryConfig(**memory)


@pytest.mark.parametrize("weights", ["host", "streamed"])
def test_lightning_does_not_move_the_state_of_weights_that_stay(weights, tiny_gpt):
    module = made(tiny_gpt, weights=weights)
    optimizer = module.configure_optimizers()["optimizer"]
    module(*batch(0)).backward()
    optimizer.step()
    _optimizer_to_device(optimizer, torch.device("meta"))  # as after loading a checkpoint; in place of a GPU
    module(*batch(1)).backward()
    optimizer.step()
    assert {state["exp_avg"].device.type for state in optimizer.state_dict()["state"].values()} == {"cpu"}


def test_a_scaler_is_where_the_gradients_are(tiny_gpt):
    card = torch.device("meta")  # in place of one
    ours, plain = made(tiny_gpt, weights="host").to(card), made(tiny_gpt).to(card)
    scaler = torch.amp.GradScaler("meta", init_scale=2.0**7, growth_interval=5)
    assert scaler_beside(list(plain.parameters()), scaler, card) is scaler
    beside = scaler_beside(list(ours.parameters()), scaler, card)
    assert beside.state_dict() == scaler.state_dict()
    beside.scale(torch.ones((), device=card))  # GradScaler's scale lies where its first loss does
    weight = next(ours.parameters())
    weight.grad = torch.full_like(weight, 2.0**7)
    beside.unscale_(torch.optim.SGD([weight]))
    assert weight.grad.unique().tolist() == [1.0]
    assert device_of(ours) == device_of(plain) == card


def test_weights_that_come_and_go_are_not_compiled(tiny_gpt):
    with pytest.raises(ValueError, match=r"model\.compile=true does not go with model\.memory\.weights=streamed"):
        LitNanoGPT(tiny_gpt, memory=MemoryConfig(weights="streamed"), compile=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("memory", [{"weights": "host"}, {"weights": "streamed", "recompute": "full"}])
def test_on_a_card_the_losses_and_gradients_are_the_same(memory, tiny_gpt):
    memory = {"recompute": "full", **memory}
    runs = []
    for config in ({"recompute": "full"}, {**memory, "block_inputs": "host"}):
        module = made(tiny_gpt, **config).cuda()
        losses = []
        for seed in range(3):
            with torch.autocast("cuda", torch.float16, cache_enabled=False):
                loss = module(*batch(seed, "cuda"))
            (loss * 1024).backward()
            losses.append(loss.item())
        runs.append((losses, {name: p.grad.cpu() for name, p in module.named_parameters()}))
    (losses, gradients), (our_losses, our_gradients) = runs
    assert losses == our_losses
    for name, gradient in gradients.items():
        if "wte" in name or "wpe" in name:  # summed by the processor, in another order
            torch.testing.assert_close(our_gradients[name], gradient, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(our_gradients[name], gradient), name
