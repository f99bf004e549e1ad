import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from live_bytes import LiveBytes
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel

from nanogpt_lit.gpt.gpt2 import GPT, GPTConfig
from nanogpt_lit.gpt.loss import IGNORE_INDEX, chunked_cross_entropy, cross_entropy
from nanogpt_lit.memory.techniques import MemoryConfig, apply_techniques


def random_inputs(B=2, T=5, C=8, V=11):
    g = torch.Generator().manual_seed(0)
    return (
        torch.randn(B, T, C, generator=g),
        torch.randn(V, C, generator=g),
        torch.randint(V, (B, T), generator=g),
    )


def naive_loss(hidden, head_weight, targets):
    """-log p of each counted target, in Python floats (float64), averaged."""
    losses = []
    for states, row in zip(hidden.tolist(), targets.tolist(), strict=True):
        for state, target in zip(states, row, strict=True):
            if target != IGNORE_INDEX:
                logits = [sum(h * w for h, w in zip(state, weights, strict=True)) for weights in head_weight.tolist()]
                losses.append(math.log(sum(math.exp(logit) for logit in logits)) - logits[target])
    return sum(losses) / len(losses)


def test_loss_equals_a_naive_loop():
    inputs = random_inputs()
    # float32 against float64: 6e-8 for each of some ten roundings.
    torch.testing.assert_close(cross_entropy(*inputs).item(), naive_loss(*inputs), rtol=1e-6, atol=0)


def test_ignored_targets_count_neither_above_nor_below_the_fraction_line():
    hidden, head_weight, targets = random_inputs()
    targets[0, 1:4] = IGNORE_INDEX
    hidden.requires_grad_()
    loss = cross_entropy(hidden, head_weight, targets)
    loss.backward()
    torch.testing.assert_close(loss.item(), naive_loss(hidden, head_weight, targets), rtol=1e-6, atol=0)
    assert not hidden.grad[0, 1:4].any()
    assert hidden.grad[0, 0].any()


def test_softmax_is_float32_for_16_bit_states():
    hidden, head_weight, targets = random_inputs(V=5000)
    hidden, head_weight = hidden.bfloat16(), head_weight.bfloat16()
    loss = cross_entropy(hidden, head_weight, targets)
    assert loss.dtype == torch.float32
    # Only the logits are rounded to bfloat16; from them on it is the float32 loss, exactly.
    logits = (hidden @ head_weight.t()).float()
    assert torch.equal(loss, torch.nn.functional.cross_entropy(logits.view(-1, 5000), targets.view(-1)))


# The loss in chunks.


def differentiated(loss_function, hidden, head_weight, targets, *options):
    """The loss, and its gradients by the states and the head."""
    hidden, head_weight = hidden.clone().requires_grad_(), head_weight.clone().requires_grad_()
    loss = loss_function(hidden, head_weight, targets, *options)
    return loss.detach(), *torch.autograd.grad(loss, (hidden, head_weight))


def float64_loss(hidden, head_weight, targets):
    logits = F.linear(hidden.double(), head_weight.double()).flatten(0, 1)
    return F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE_INDEX)


def relative_error(value, reference):
    return ((value.double() - reference.double()).norm() / reference.double().norm()).item()


@pytest.mark.parametrize("chunk_tokens", [1, 3, 5, 9, 10, 1000])
def test_chunked_loss_and_gradients_are_those_of_float64_for_every_chunk_size(chunk_tokens):
    hidden, head_weight, targets = (x.double() if x.is_floating_point() else x for x in random_inputs())
    targets[1, 1:3] = IGNORE_INDEX
    expected = differentiated(float64_loss, hidden, head_weight, targets)
    # The same formula in another order: 1e-16 for each of some tens of roundings.
    for value, reference in zip(
        differentiated(chunked_cross_entropy, hidden, head_weight, targets, chunk_tokens), expected, strict=True
    ):
        torch.testing.assert_close(value, reference, rtol=1e-13, atol=1e-15)


def test_chunked_loss_in_float32_is_no_further_from_float64_than_the_plain_one():
    inputs = random_inputs(B=4, T=32, C=48, V=3001)
    expected = differentiated(float64_loss, *inputs)
    plain = differentiated(cross_entropy, *inputs)
    for value, by_plain, reference in zip(
        differentiated(chunked_cross_entropy, *inputs, 32), plain, expected, strict=True
    ):
        assert value.dtype == torch.float32
        # Both are a few roundings of 6e-8 away; which is nearer is chance.
        assert relative_error(value, reference) < max(2 * relative_error(by_plain, reference), 2e-7)


def test_chunked_loss_under_extreme_logits_is_finite_and_exact():
    hidden, head_weight, targets = random_inputs()
    hidden *= 1000  # float32's exp ends at 88, these logits are in the thousands
    for value, reference in zip(
        differentiated(chunked_cross_entropy, hidden, head_weight, targets, 3),
        differentiated(float64_loss, hidden, head_weight, targets),
        strict=True,
    ):
        torch.testing.assert_close(value.double(), reference.double(), rtol=1e-6, atol=1e-6)


def test_a_batch_of_ignored_targets_has_no_loss_and_zero_gradients():
    hidden, head_weight, _ = random_inputs()
    nothing = torch.full((2, 5), IGNORE_INDEX)
    for loss_function, options in ((cross_entropy, ()), (chunked_cross_entropy, (4,))):
        loss, *gradients = differentiated(loss_function, hidden, head_weight, nothing, *options)
        assert loss.isnan()
        assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_rows_at_a_time_have_the_bits_of_all_rows_at_once(dtype, monkeypatch):
    hidden, head_weight, targets = random_inputs(V=700)
    targets[0, 1] = IGNORE_INDEX

    def computed(logits_at_a_time, rows_of_product):
        monkeypatch.setattr("nanogpt_lit.gpt.loss.CACHED_LOGITS", logits_at_a_time)
        monkeypatch.setattr("nanogpt_lit.gpt.loss.PRODUCT_ROWS", rows_of_product)
        states, weight = hidden.to(dtype).requires_grad_(), head_weight.clone().requires_grad_()
        loss = chunked_cross_entropy(states, weight, targets, chunk_tokens=6)
        loss.backward()
        return loss.detach(), states.grad, weight.grad

    at_once = computed(10**9, 10**9)
    for few in (1, 1400, 2800):  # a row of logits, two, four; of chunks of six tokens and of four
        assert all(map(torch.equal, computed(few, 1 + few // 7), at_once))


def test_chunked_loss_without_gradients_is_the_same_number():
    hidden, head_weight, targets = random_inputs()
    targets[0, 2] = IGNORE_INDEX
    with torch.no_grad():
        loss = chunked_cross_entropy(hidden, head_weight.requires_grad_(), targets, 3)
    assert not loss.requires_grad
    torch.testing.assert_close(loss.item(), naive_loss(hidden, head_weight, targets), rtol=1e-6, atol=0)


def test_a_frozen_head_or_frozen_states_get_no_gradient():
    hidden, head_weight, targets = random_inputs()
    _, d_hidden, d_weight = differentiated(chunked_cross_entropy, hidden, head_weight, targets, 4)
    states = hidden.clone().requires_grad_()
    chunked_cross_entropy(states, head_weight, targets, 4).backward()
    assert torch.equal(states.grad, d_hidden)
    head = head_weight.clone().requires_grad_()
    chunked_cross_entropy(hidden, head, targets, 4).backward()
    assert torch.equal(head.grad, d_weight)


def test_a_second_backward_pass_is_refused_and_not_wrong():
    hidden, head_weight, targets = random_inputs()
    loss = chunked_cross_entropy(hidden, head_weight.requires_grad_(), targets, 4)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def scaled_gradients(loss_function, inputs, *options, scale, dtype=torch.float16):
    """The gradients as GradScaler would hand them on: of the scaled loss, divided by the scale."""
    hidden, head_weight, targets = inputs
    hidden, head_weight = hidden.clone().requires_grad_(), head_weight.clone().requires_grad_()
    with torch.autocast("cpu", dtype=dtype, cache_enabled=False):
        loss = loss_function(hidden, head_weight, targets, *options)
    assert loss.dtype == torch.float32
    (loss * scale).backward()
    return hidden.grad / scale, head_weight.grad / scale


@pytest.fixture(scope="module")
def untrained_gpt2_head():
    """GPT-2's vocabulary and initialisation in few channels, and the gradients in float64.

    All probabilities are about 1 / V = 2e-5; divided by the number of targets that is where float16 ends, 6e-8.
    """
    g = torch.Generator().manual_seed(0)
    V, N, C = 50257, 320, 8
    hidden, head_weight = torch.randn(1, N, C, generator=g), 0.02 * torch.randn(V, C, generator=g)
    inputs = hidden.half().float(), head_weight.half().float(), torch.randint(1000, (1, N), generator=g)
    return inputs, differentiated(float64_loss, *inputs)[2]


RARE = slice(1000, None)
"""Tokens that are never a target there: all of their gradient comes from those probabilities."""


@pytest.mark.parametrize("scale", [1.0, 65536.0])
def test_float16_gradients_of_rare_tokens_survive_whatever_the_loss_scale(untrained_gpt2_head, scale):
    inputs, expected = untrained_gpt2_head
    _, d_weight = scaled_gradients(chunked_cross_entropy, inputs, 128, scale=scale)
    # Logits of size 0.1 are rounded by 3e-5, p * 256 to 11 bits, 2e-4 on average.
    assert relative_error(d_weight[RARE], expected[RARE]) < 3e-4


def test_the_plain_loss_needs_the_loss_scale_in_float16(untrained_gpt2_head):
    inputs, expected = untrained_gpt2_head
    _, d_weight = scaled_gradients(cross_entropy, inputs, scale=1.0)
    assert relative_error(d_weight[RARE], expected[RARE]) > 0.05
    _, d_weight = scaled_gradients(cross_entropy, inputs, scale=65536.0)
    assert relative_error(d_weight[RARE], expected[RARE]) < 1e-3


def test_float16_gradients_stay_finite_where_one_token_fills_the_batch():
    # 256 * 512 tokens * 4 per channel is eight times what float16 can say.
    hidden, head_weight = torch.full((1, 512, 4), 4.0), torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
    inputs = hidden, head_weight, torch.full((1, 512), 7)
    _, expected_hidden, expected_weight = differentiated(float64_loss, *inputs)
    d_hidden, d_weight = scaled_gradients(chunked_cross_entropy, inputs, 512, scale=1024.0)
    # Logits of size 10 are rounded to 0.008 in float16.
    assert relative_error(d_weight, expected_weight) < 0.02
    assert relative_error(d_hidden, expected_hidden) < 0.02


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_chunked_loss_under_autocast_is_no_further_from_float64_than_the_plain_one(dtype):
    inputs = random_inputs(B=4, T=64, C=32, V=2003)
    _, *expected = differentiated(float64_loss, *inputs)
    plain = scaled_gradients(cross_entropy, inputs, scale=1024.0, dtype=dtype)
    chunked = scaled_gradients(chunked_cross_entropy, inputs, 64, scale=1024.0, dtype=dtype)
    for value, by_plain, reference in zip(chunked, plain, expected, strict=True):
        assert relative_error(value, reference) < 1.1 * relative_error(by_plain, reference)


def tied_gpt(chunk_tokens=None):
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(block_size=16, vocab_size=53, n_layer=2, n_head=2, n_embd=16))
    apply_techniques(gpt, MemoryConfig(loss_chunk_tokens=chunk_tokens))
    return gpt


def batches(count):
    windows = torch.randint(53, (count, 2, 17), generator=torch.Generator().manual_seed(1))
    return [(window[:, :-1], window[:, 1:]) for window in windows]


def test_accumulated_gradients_of_a_tied_network_are_those_of_the_plain_loss():
    # float64, where a wrong factor or a lost summand cannot hide in rounding. The plain loss is spelled out: ours
    # takes a softmax in float32.
    plain, chunked = tied_gpt().double(), tied_gpt(5).double()
    for tokens, targets in batches(3):
        (float64_loss(plain.hidden(tokens), plain.lm_head.weight, targets) / 3).backward()
        (chunked.loss(tokens, targets) / 3).backward()
    for (name, expected), parameter in zip(plain.named_parameters(), chunked.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-10, atol=1e-14, msg=name)


def test_distributed_data_parallel_sees_every_gradient_of_a_tied_and_of_an_untied_head():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for tied in (True, False):
            torch.manual_seed(0)
            gpt = GPT(GPTConfig(block_size=16, vocab_size=53, n_layer=1, n_head=2, n_embd=16, tied_head=tied))
            apply_techniques(gpt, MemoryConfig(loss_chunk_tokens=5))
            gpt.forward = gpt.loss
            wrapped = DistributedDataParallel(gpt)
            for batch in batches(2):  # a gradient that the first pass hides is an error in the second
                gpt.zero_grad()
                wrapped(*batch).backward()
            reduced = [parameter.grad.clone() for parameter in gpt.parameters()]
            gpt.zero_grad()
            gpt.loss(*batches(2)[1]).backward()
            assert all(torch.equal(a, b.grad) for a, b in zip(reduced, gpt.parameters(), strict=True))
    finally:
        dist.destroy_process_group()


def test_chunked_loss_compiles_without_graph_breaks_to_the_same_loss_and_gradients():
    eager, compiled = tied_gpt(12), tied_gpt(12)
    ((tokens, targets),) = batches(1)
    compiled_loss = torch.compile(compiled.loss, fullgraph=True, backend="aot_eager")
    expected, loss = eager.loss(tokens, targets), compiled_loss(tokens, targets)
    expected.backward()
    loss.backward()
    assert torch.equal(loss, expected)
    for (name, parameter), other in zip(eager.named_parameters(), compiled.parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad), name


@pytest.mark.parametrize("fake", [False, True], ids=["real", "fake"])
def test_no_more_than_one_chunk_of_logits_is_ever_held(fake):
    N, C, V, chunk_tokens = 1024, 8, 4099, 64

    def peak(loss_function, *options):
        with FakeTensorMode(allow_non_fake_inputs=True) if fake else torch.no_grad():
            hidden, head_weight = torch.randn(1, N, C), torch.randn(V, C)
        hidden.requires_grad_()
        head_weight.requires_grad_()
        targets = torch.zeros_like(hidden[..., 0], dtype=torch.int64)
        with LiveBytes() as live:
            loss_function(hidden, head_weight, targets, *options).backward()
        return live.most

    # The plain loss keeps the log-softmax for backward, which makes the gradients by it and by the logits. In chunks:
    # logits and softmax, which becomes the gradient.
    plain, chunked = 3 * N * V * 4, 2 * chunk_tokens * V * 4
    gradients = (N + V) * C * 4
    few = 30 * N * 4  # numbers per token: losses, masks, largest logits
    assert plain <= peak(cross_entropy) <= plain + gradients + few
    assert chunked + gradients <= peak(chunked_cross_entropy, chunk_tokens) <= chunked + 2 * gradients + few
