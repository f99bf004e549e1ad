import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from nanogpt_lit.gpt.gpt2 import GPTConfig
from nanogpt_lit.gpt.loss import add_product_
from nanogpt_lit.module import LitNanoGPT
from nanogpt_lit.plan.budget import gpu_named
from nanogpt_lit.plan.cuda_paths import cuda_paths
from nanogpt_lit.plan.kernels import (
    ATTENTION_SHARE,
    BANDWIDTH_SHARE,
    HOST_BANDWIDTH,
    LAUNCH_S,
    MATRIX_SHARE,
    Kernels,
    Roofline,
)
from nanogpt_lit.plan.step import StepShape, trace_steps
from nanogpt_lit.plan.trace import MemoryTrace

GPU = gpu_named("rtx2050")


def estimate(program, weight=1, tf32=False):
    roofline = Roofline(Kernels(GPU), tf32)
    roofline.weight = weight
    with FakeTensorMode(), cuda_paths(), MemoryTrace() as trace:
        inputs = program(None)
        trace.watch = roofline.add
        program(inputs)
        trace.watch = None
    return roofline


def test_a_large_product_takes_as_long_as_its_arithmetic():
    def program(inputs):
        if inputs is None:
            return torch.zeros(4096, 4096, dtype=torch.float16)
        return inputs @ inputs

    roofline = estimate(program)
    assert roofline.flops == 2 * 4096**3
    assert roofline.seconds == pytest.approx(2 * 4096**3 / (GPU.fp16 * MATRIX_SHARE))


def test_the_lowest_clock_slows_arithmetic_and_leaves_traffic_alone():
    def product(inputs):
        return torch.zeros(4096, 4096, dtype=torch.float16) if inputs is None else inputs @ inputs

    def addition(inputs):
        return torch.zeros(2**24) if inputs is None else inputs + 1

    bound_by_arithmetic, bound_by_traffic = estimate(product), estimate(addition)
    slower = bound_by_arithmetic.seconds_at_lowest_clock / bound_by_arithmetic.seconds
    assert slower == pytest.approx(1.477 / 1.155)  # NVIDIA's boost clocks of an RTX 2050 at 45 and at 30 watts
    assert bound_by_traffic.seconds_at_lowest_clock == bound_by_traffic.seconds


def test_a_product_of_float32_matrices_takes_as_long_as_it_may():
    def program(inputs):
        if inputs is None:
            return torch.zeros(4096, 4096)
        return inputs @ inputs

    for tf32, peak in [(False, GPU.fp32), (True, GPU.tf32)]:
        expected_s = 2 * 4096**3 / (peak * MATRIX_SHARE)
        assert estimate(program, tf32=tf32).seconds == pytest.approx(expected_s)


def test_an_addition_takes_as_long_as_its_traffic():
    def program(inputs):
        if inputs is None:
            return torch.zeros(2**24)
        return inputs + 1

    assert estimate(program).seconds == pytest.approx(2 * 4 * 2**24 / (GPU.bandwidth * BANDWIDTH_SHARE))


def test_a_small_operation_takes_as_long_as_its_launch():
    def program(inputs):
        if inputs is None:
            return torch.zeros(8)
        return inputs + 1

    assert estimate(program, weight=3).seconds == pytest.approx(3 * LAUNCH_S)


def test_the_product_of_the_chunked_loss_counts_as_one():
    def program(inputs):
        if inputs is None:
            return torch.zeros(512, 256), torch.zeros(512, 128, dtype=torch.float16), torch.zeros(128, 256).half()
        return add_product_(*inputs, beta=1.0)

    assert estimate(program).flops == 2 * 512 * 128 * 256


def test_attention_is_slower_than_a_product():
    def program(inputs):
        if inputs is None:
            return torch.zeros(4, 12, 1024, 64, dtype=torch.float16)
        return F.scaled_dot_product_attention(inputs, inputs, inputs, is_causal=True)

    roofline = estimate(program)
    assert roofline.seconds == pytest.approx(roofline.flops / (GPU.fp16 * ATTENTION_SHARE))


def test_attention_is_as_fast_backward_as_forward():
    """Its backward takes the numbers of a random state, which are none of the precision that it multiplies in."""

    def program(inputs):
        if inputs is None:
            return torch.zeros(4, 12, 1024, 64, dtype=torch.float16, requires_grad=True)
        return F.scaled_dot_product_attention(inputs, inputs, inputs, is_causal=True).backward(inputs.detach())

    forward_and_backward = 3.5 * 2 * 2 * 4 * 12 * 1024 * 1024 * 64  # 2 products and 5
    roofline = estimate(program)
    assert roofline.flops == forward_and_backward
    # A twentieth more: queries, keys and values are one tensor here, whose three gradients are added up.
    assert roofline.seconds == pytest.approx(forward_and_backward / (GPU.fp16 * ATTENTION_SHARE), rel=0.06)


def test_copies_to_the_host_run_beside_the_computation_of_their_phase():
    def program(inputs):
        if inputs is None:
            return torch.zeros(2**24)
        on_host = inputs.to("meta")  # 64 MiB leave
        inputs.copy_(on_host)  # and arrive
        return inputs + 1

    # Both directions at once, and the addition within the same time.
    assert estimate(program).seconds == pytest.approx(4 * 2**24 / GPU.host_bandwidth)


def test_the_processor_works_at_its_own_pace():
    def program(inputs):
        if inputs is None:
            return torch.zeros(2**24, device="meta")
        return inputs + 1

    assert estimate(program).seconds == pytest.approx(2 * 4 * 2**24 / HOST_BANDWIDTH)


def test_a_step_counts_the_flops_of_the_network():
    gpt = GPTConfig(block_size=64, vocab_size=256, n_layer=2, n_head=2, n_embd=64)
    roofline = Roofline(Kernels(GPU))
    trace_steps(lambda: LitNanoGPT(gpt), StepShape(2, 64, 256, 5, "16-mixed"), GPU, roofline)
    network = LitNanoGPT(gpt).gpt
    attention = 2 * 2 * 64 * 64  # counted in full, forward 2 products of T x T x C in each of 2 layers
    matrices = 6 * (network.parameter_count(non_embedding=True) - network_vectors(network))
    # FlashAttention computes the scores once more in backward: 7 products in place of 6.
    expected = 2 * 64 * 5 * (matrices + 3.5 * 2 * attention)
    assert roofline.flops == pytest.approx(expected, rel=0.02)


def network_vectors(network):
    return sum(p.numel() for p in network.parameters() if p.dim() == 1)
