"""Memory of small programs, counted by hand."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from nanogpt_lit.plan.allocator import replay, rounded
from nanogpt_lit.plan.cuda_paths import cuda_paths
from nanogpt_lit.plan.kernels import CUBLAS_BYTES
from nanogpt_lit.plan.trace import MemoryTrace

KIB = 1024


@pytest.fixture(params=["fake", "real"])
def tensors(request):
    """The same counts whether tensors are there or only pretend to be."""
    if request.param == "real":
        yield
        return
    with FakeTensorMode():
        yield


def in_use(trace):
    return {name: size for name, size in trace._bytes.items() if size}


def test_every_new_storage_counts_once_and_until_it_is_freed(tensors):
    with MemoryTrace() as trace:
        x = torch.zeros(256)  # 1 KiB
        y = x.view(16, 16).t()[1:]  # no memory of its own
        assert trace.allocated == KIB
        z = y + 1  # 15 x 16 floats
        assert trace.allocated == KIB + 1024  # 960 bytes in blocks of 512
        x.add_(1)
        assert trace.allocated == KIB + 1024
        del x
        assert trace.allocated == KIB + 1024  # its view holds it
        del y
        assert trace.allocated == 1024
        del z
        assert trace.allocated == 0
    assert trace.peak.bytes == KIB + 1024


def test_the_events_are_those_of_the_allocator(tensors):
    with MemoryTrace() as trace:
        x = torch.zeros(256)
        y = torch.zeros(512)
        del x, y
    assert [event.bytes for event in trace.events] == [1024, 2048, -1024, -2048]
    assert replay(trace.events).allocated == 3072


def test_a_linear_layer_is_counted_by_category(tensors):
    # y = relu(x W'), 8 x 64 from 8 x 128.
    layer = nn.Linear(128, 64, bias=False)
    with MemoryTrace() as trace:
        trace.label_module(layer)
        x = torch.zeros(8, 128)
        trace.label(x, "batch")
        trace.phase = "forward"
        loss = torch.relu(layer(x)).sum()
        held = {"weights": 64 * 128 * 4, "batch": 8 * 128 * 4, "workspace": CUBLAS_BYTES}
        # ReLU keeps its output for backward; its input is gone. The loss is a block of 512 bytes.
        assert in_use(trace) == held | {"activations": 8 * 64 * 4 + 512}
        trace.phase = "backward"
        loss.backward()
        # Backward has a cuBLAS workspace too; the gradient counts as one from the moment it is there.
        held |= {"gradients": 64 * 128 * 4, "workspace": 2 * CUBLAS_BYTES}
        assert in_use(trace) == held | {"activations": 512}
        trace.phase = "optimizer"
        optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
        optimizer.step()
        trace.label(list(optimizer.state.values()), "optimizer")
        assert in_use(trace) == held | {"activations": 512, "optimizer": 2 * 64 * 128 * 4 + 512}
    # In backward, besides all that is held: the gradient of the sum is expanded, that of ReLU is 8 x 64.
    backward = trace.peaks["backward"].bytes_by_category
    assert backward["temporaries"] - 512 <= 8 * 64 * 4 + 64 * 128 * 4


def test_logits_and_casts_are_told_from_activations():
    layer = nn.Linear(32, 1000, bias=False)
    with FakeTensorMode(allow_non_fake_inputs=True), cuda_paths(), MemoryTrace(vocab_size=1000) as trace:
        trace.label_module(layer)
        trace.phase = "forward"
        with torch.autocast("cpu", dtype=torch.float16, cache_enabled=False):
            logits = layer(torch.zeros(8, 32, requires_grad=True))  # whose gradient needs the weight
        assert trace._bytes["logits"] == 16384  # 8 x 1000 x 2 bytes in blocks of 512
        assert trace._bytes["casts"] == 1000 * 32 * 2
        del logits


def test_what_lies_on_the_host_is_not_on_the_card():
    with FakeTensorMode(), MemoryTrace() as trace:
        x = torch.zeros(1024)
        on_host = x.to("meta")
        assert (trace.allocated, trace.host_bytes) == (4096, 4096)
        del x
        back = torch.empty(1024)
        back.copy_(on_host)
        del on_host
        assert (trace.allocated, trace.host_bytes, trace.host_peak_bytes) == (4096, 0, 4096)


def test_flash_attention_holds_its_workspace_only_while_it_runs():
    B, H, T, D = 2, 3, 256, 64
    with FakeTensorMode(), cuda_paths(), MemoryTrace() as trace:
        q, k, v = (torch.zeros(B, H, T, D, dtype=torch.float16, requires_grad=True) for _ in range(3))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        trace.phase = "backward"
        y.backward(torch.zeros_like(y))
    # A float32 gradient of the queries and a number per row, as in mha_bwd of flash_api.cpp.
    assert trace.peaks["backward"].bytes_by_category["workspace"] == B * H * T * D * 4 + B * H * T * 4
    assert trace._bytes["workspace"] == 0


@pytest.mark.parametrize(
    ("dtype", "D", "bytes_a_head"),
    [
        # Rows for 128 tokens, of 192 channels and their sum.
        (torch.float16, 160, 128 * (192 + 1) * 4),
        # 100 sums and 2 x 2 tiles of 64 x 64, each with 16 bytes for its lock.
        (torch.float32, 80, 100 * 4 + 2 * 2 * (64 * 64 * 4 + 16)),
    ],
)
def test_attention_of_odd_sizes_works_in_whole_tiles(dtype, D, bytes_a_head):
    with FakeTensorMode(), cuda_paths(), MemoryTrace() as trace:
        q = torch.zeros(2, 4, 100, D, dtype=dtype, requires_grad=True)
        y = F.scaled_dot_product_attention(q, q, q, is_causal=True)
        trace.phase = "backward"
        y.backward(torch.zeros_like(y))
    assert trace.peaks["backward"].bytes_by_category["workspace"] == rounded(2 * 4 * bytes_a_head)


@pytest.mark.parametrize(
    ("tokens", "rows", "workspaces"),
    [
        (3072, 5000, []),
        # 409 parts of ten and one of each token; what numbers them is 64-bit.
        (4096, 5000, [8 * 4096] * 5 + [8 * (409 + 4096), (409 + 4096) * 64 * 4]),
        (4096, 257, [8 * 4096] * 3 + [8 * 257] * 2 + [8 * (409 + 257), (409 + 257) * 64 * 4]),
    ],
)
def test_the_gradient_of_an_embedding_is_summed_in_parts_beside_it(tokens, rows, workspaces):
    with FakeTensorMode(), MemoryTrace() as trace:
        weight = torch.zeros(rows, 64, requires_grad=True)
        y = F.embedding(torch.zeros(tokens, dtype=torch.int64), weight)
        trace.phase = "backward"
        y.backward(torch.zeros_like(y))
    peak = trace.peaks["backward"].bytes_by_category
    assert peak.get("workspace", 0) == sum(map(rounded, workspaces))


def test_the_timeline_begins_when_it_is_asked_for():
    with MemoryTrace() as trace:
        x = torch.zeros(4)
        trace.timeline = []
        trace.phase = "forward"
        x = x + 1
        x = x * 2
    assert [moment.phase for moment in trace.timeline] == ["forward", "forward"]
    assert max(moment.bytes for moment in trace.timeline) == trace.peak.bytes == 1024


def test_gradients_of_a_tied_matrix_are_added_in_place_as_autograd_does_without_a_trace():
    # Really: what ends up in .grad is the memory of the first gradient.
    places = []
    weight = nn.Parameter(torch.zeros(1000, 32))
    (F.embedding(torch.arange(8), weight).sum() + _Tied.apply(weight, places)).backward()
    assert weight.grad.data_ptr() == places[0]
    # In a trace: two matrices are held at most, and no third for their sum.
    with FakeTensorMode(), MemoryTrace() as trace:
        weight = nn.Parameter(torch.zeros(1000, 32))
        trace.label(weight, "weights")
        loss = F.embedding(torch.arange(8), weight).sum() + _Tied.apply(weight, None)
        trace.phase = "backward"
        loss.backward()
    matrix = 1000 * 32 * 4
    assert 2 * matrix <= trace.peaks["backward"].bytes_by_category["temporaries"] < 2.1 * matrix


def test_the_gradient_of_a_tied_linear_layer_is_added_to_new_memory():
    # Really: autograd adds, and does not add in place.
    weight, tokens = nn.Parameter(torch.zeros(1000, 32)), torch.arange(8)
    loss = F.linear(F.embedding(tokens, weight), weight).sum()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        loss.backward()
    matrices = [[1000, 32], [1000, 32]]
    assert [event.name for event in profiler.events() if event.input_shapes[:2] == matrices] == ["aten::add"]
    # In a trace: for a moment there are three.
    with FakeTensorMode(), MemoryTrace() as trace:
        weight, tokens = nn.Parameter(torch.zeros(1000, 32)), torch.arange(8)
        trace.label(weight, "weights")
        loss = F.linear(F.embedding(tokens, weight), weight).sum()
        trace.phase = "backward"
        loss.backward()
    matrix = 1000 * 32 * 4
    assert 3 * matrix <= trace.peaks["backward"].bytes_by_category["temporaries"] < 3.5 * matrix


class _Tied(torch.autograd.Function):
    """Another use of a matrix."""

    @staticmethod
    def forward(ctx, weight, places):
        ctx.shape, ctx.places = weight.shape, places
        return weight.new_zeros(())

    @staticmethod
    def backward(ctx, d_loss):
        d_weight = torch.ones(ctx.shape)
        if ctx.places is not None:
            ctx.places.append(d_weight.data_ptr())
        return d_weight, None
