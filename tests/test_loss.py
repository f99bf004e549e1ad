import math

import torch

from nanogpt_lit.gpt.loss import IGNORE_INDEX, cross_entropy


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
