"""The plan's own tensors without content against PyTorch's: the same memory, event by event, and the same time."""

from dataclasses import replace

import pytest
import torch
from small_networks import modern
from torch._subclasses.fake_tensor import FakeTensorMode

from nanogpt_lit.gpt.gpt2 import GPTConfig
from nanogpt_lit.gpt.networks import described
from nanogpt_lit.memory.ladder import Rung, ladder
from nanogpt_lit.memory.techniques import MemoryConfig
from nanogpt_lit.module import LitNanoGPT
from nanogpt_lit.optim.adamw import AdamWConfig
from nanogpt_lit.plan import step
from nanogpt_lit.plan.kernels import Kernels, Roofline
from nanogpt_lit.plan.shape_tensor import ShapeMode, ShapeTensor
from nanogpt_lit.plan.step import StepShape, trace_steps

GPT = GPTConfig(block_size=64, vocab_size=300, n_layer=2, n_head=2, n_embd=64)
OWN = Rung("as configured", MemoryConfig(), 4, 2)
RUNGS = {rung.name: rung.memory for rung in ladder(OWN, 64, casts_weights=True) if rung.batch_size == 4}
IN_OTHERS = ("the loss in chunks", "+ weights cast again in backward", "+ every block computed again")
"""Rungs whose every operation is in another one too."""


def traced(monkeypatch, mode, shape, gpt, memory, optim):
    if mode is FakeTensorMode:
        fake = FakeTensorMode()

        def compute(func, args, kwargs):
            with fake:
                return func(*args, **kwargs)

        monkeypatch.setattr(step, "ShapeMode", lambda: fake)
        monkeypatch.setattr(step, "compute", compute)
    roofline = Roofline(Kernels())
    trace = trace_steps(
        lambda: LitNanoGPT(**described(gpt), memory=memory, optim=AdamWConfig(**optim)), shape, roofline=roofline
    )
    return trace, roofline


def assert_same(monkeypatch, precision="16-mixed", gpt=GPT, memory=RUNGS["nothing"], optim={}):  # noqa: B006
    shape = StepShape(4, 64, 300, accumulate_grad_batches=2, precision=precision, zeroes_after_forward=True)
    ours, our_time = traced(monkeypatch, ShapeMode, shape, gpt, memory, optim)
    theirs, their_time = traced(monkeypatch, FakeTensorMode, shape, gpt, memory, optim)
    assert ours.events == theirs.events
    assert ours.timeline == theirs.timeline
    assert (ours.peaks, ours.host_peak_bytes, ours.marks) == (theirs.peaks, theirs.host_peak_bytes, theirs.marks)
    assert (our_time.seconds, our_time.flops) == (their_time.seconds, their_time.flops)


@pytest.mark.parametrize("name", [name for name in RUNGS if name not in IN_OTHERS])
def test_every_rung_takes_the_same_memory_at_the_same_moments(name, monkeypatch):
    assert_same(monkeypatch, memory=RUNGS[name])


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_every_precision_does(precision, monkeypatch):
    assert_same(monkeypatch, precision)


def test_dropout_does(monkeypatch):
    assert_same(monkeypatch, gpt=replace(GPT, dropout=0.1))


@pytest.mark.parametrize("optim", [{"implementation": "for-loop"}, {"implementation": "foreach"}, {"matrices": "muon"}])
def test_every_optimizer_does(optim, monkeypatch):
    assert_same(monkeypatch, gpt=modern(GPT, n_kv_head=1), optim=optim)


def test_a_layer_norm_in_16_bits_keeps_its_statistics_in_float32_as_on_cuda():
    with ShapeMode():
        x = torch.ones(4, 8, dtype=torch.float16)
        _, mean, rstd = torch.ops.aten.native_layer_norm(x, [8], None, None, 1e-5)
        assert (mean.dtype, rstd.dtype) == (torch.float32, torch.float32)


def test_operations_say_what_they_make():
    with ShapeMode():
        a = torch.ones(2, 3)
        whole = a.to(torch.int64)
        assert (type(a), a.device.type, a.is_meta) == (ShapeTensor, "cpu", False)
        for _ in range(2):  # the second time from what was found the first time
            assert (a * 2).dtype == torch.float32
            # These numbers are equal, and lead to different dtypes.
            assert [(whole * number).dtype for number in (1, 1.0, True)] == [torch.int64, torch.float32, torch.int64]
            product = a @ a.t()
            assert (product.shape, product.stride()) == ((2, 2), (2, 1))
            values, indices = a.max(dim=1)
            assert (values.dtype, indices.dtype) == (torch.float32, torch.int64)
        assert torch.ones(2, 3).t().contiguous().stride() == (2, 1)


def test_views_share_their_storage_and_new_tensors_have_their_own():
    with ShapeMode():
        a = torch.ones(4, 6)
        storage = a.untyped_storage()._cdata
        for view in (a.view(24), a.t(), a[1:], a.split(2, dim=1)[1], a.detach(), torch.ops.aten._unsafe_view(a, [24])):
            assert view.untyped_storage()._cdata == storage
        for written in (a.add_(1), a.copy_(torch.zeros(4, 6, device="meta"))):
            assert written is a
        for _ in range(2):
            for new in (a + 1, a.clone(), a.t().contiguous(), torch.empty_like(a)):
                assert new.untyped_storage()._cdata != storage
                assert new.untyped_storage().nbytes() == 96


def test_a_tensor_lies_where_its_inputs_do_or_where_it_is_sent():
    with ShapeMode():
        card = torch.ones(4)
        host = card.to("meta")
        assert host is not card
        number = torch.tensor(2.0, device="meta")
        places = [host + 1, host.to("cpu"), torch.empty_like(host, device="cpu"), number * card]
        assert [tensor.device.type for tensor in places] == ["meta", "cpu", "cpu", "cpu"]
        assert card.copy_(host).device.type == "cpu"


def test_a_number_that_is_asked_for_is_some_number():
    with ShapeMode():
        assert torch.tensor(0.0).item() == 1.0
