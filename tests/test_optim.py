import math

import pytest
import torch
from torch import nn

from nanogpt_lit.gpt.model import GPT, GPTConfig
from nanogpt_lit.optim.adamw import AdamWConfig, build_optimizer, param_groups
from nanogpt_lit.optim.schedule import ScheduleConfig, WarmupCosine, warmup_cosine

TINY = GPTConfig(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=8)


def test_every_parameter_is_in_exactly_one_group():
    gpt = GPT(TINY)
    grouped = [p for group in param_groups(gpt.named_parameters(), 0.1) for p in group["params"]]
    assert sorted(map(id, grouped)) == sorted(map(id, gpt.parameters()))
    assert len({id(p) for p in grouped}) == len(grouped)


def test_matrices_decay_and_vectors_do_not():
    gpt = GPT(TINY)
    decay, no_decay = param_groups(gpt.named_parameters(), 0.1)
    names = {id(p): name for name, p in gpt.named_parameters()}
    assert (decay["weight_decay"], no_decay["weight_decay"]) == (0.1, 0.0)
    assert all(names[id(p)].endswith("weight") and "ln_" not in names[id(p)] for p in decay["params"])
    assert all(names[id(p)].endswith("bias") or "ln_" in names[id(p)] for p in no_decay["params"])


@pytest.mark.parametrize("implementation", ["for-loop", "foreach", "fused"])
def test_three_steps_equal_adamw_written_out_by_hand(implementation):
    config = AdamWConfig(lr=0.1, weight_decay=0.1, beta1=0.9, beta2=0.95, implementation=implementation)
    weight = nn.Parameter(torch.tensor([[1.0, -2.0]], dtype=torch.float64))
    bias = nn.Parameter(torch.tensor([3.0], dtype=torch.float64))
    optimizer = build_optimizer([("weight", weight), ("bias", bias)], config)
    expected = {"weight": weight.detach().clone(), "bias": bias.detach().clone()}
    m = {name: torch.zeros_like(value) for name, value in expected.items()}
    v = {name: torch.zeros_like(value) for name, value in expected.items()}
    for t in range(1, 4):
        (weight.square().sum() + bias.square().sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
        for name, decay in (("weight", 0.1), ("bias", 0.0)):  # Loshchilov & Hutter 2019, algorithm 2
            gradient = 2 * expected[name]
            m[name] = 0.9 * m[name] + 0.1 * gradient
            v[name] = 0.95 * v[name] + 0.05 * gradient**2
            m_hat, v_hat = m[name] / (1 - 0.9**t), v[name] / (1 - 0.95**t)
            expected[name] = expected[name] - 0.1 * decay * expected[name] - 0.1 * m_hat / (v_hat.sqrt() + 1e-8)
    # float64 on both sides; the operations are the same but not their order, so a few units in the last place.
    torch.testing.assert_close(weight.detach(), expected["weight"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(bias.detach(), expected["bias"], rtol=1e-12, atol=1e-12)


def test_rate_rises_to_the_peak_and_falls_to_the_floor():
    config = ScheduleConfig(warmup_steps=10, min_lr_ratio=0.1, total_steps=110)
    rates = [warmup_cosine(step, config) for step in range(130)]
    assert rates[0] == pytest.approx(1 / 11)
    assert rates[10] == 1.0 == max(rates)
    assert rates[60] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 2)))
    assert rates[110] == pytest.approx(0.1)
    assert rates[129] == pytest.approx(0.1)
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)


def train(scales_overflow, fused):
    """Rates of each attempted step with a real GradScaler whose losses overflow where the list says so."""
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    implementation = "fused" if fused else "for-loop"
    optimizer = build_optimizer(model.named_parameters(), AdamWConfig(lr=1.0, implementation=implementation))
    schedule = WarmupCosine(optimizer, ScheduleConfig(warmup_steps=2, total_steps=6))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    rates, weights = [], []
    for overflow in scales_overflow:
        loss = model(torch.ones(1, 4)).sum() * (float("inf") if overflow else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        rates.append(optimizer.param_groups[0]["lr"])
        weights.append(model.weight.detach().clone())
        schedule.step()
        optimizer.zero_grad()
    return rates, weights, schedule


@pytest.mark.parametrize("fused", [False, True])
def test_schedule_holds_while_the_grad_scaler_skips(fused):
    config = ScheduleConfig(warmup_steps=2, total_steps=6)
    rates, weights, schedule = train([True, False, True, True, False, False], fused)
    assert rates == pytest.approx([warmup_cosine(step, config) for step in (0, 0, 1, 1, 1, 2)])
    assert schedule.skipped_steps == 3
    assert torch.equal(weights[1], weights[3])  # the skipped steps really were skipped
    assert not torch.equal(weights[3], weights[4])


def test_schedule_continues_from_its_saved_state():
    _, _, whole = train([False, True, False, False], fused=False)
    _, _, half = train([False, True], fused=False)
    _, _, rest = train([], fused=False)
    rest.load_state_dict(half.state_dict())
    for _ in range(2):
        rest.optimizer.step()
        rest.step()
    assert rest.get_last_lr() == whole.get_last_lr()
    assert rest.skipped_steps == whole.skipped_steps == 1


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: AdamWConfig(lr=0.0), "model.optim.lr=0.0"),
        (lambda: AdamWConfig(beta2=1.0), "model.optim.beta2=1.0"),
        (lambda: AdamWConfig(weight_decay=-1.0), "model.optim.weight_decay=-1.0"),
        (lambda: ScheduleConfig(total_steps=-1), "trainer.max_steps=-1"),
        (lambda: ScheduleConfig(warmup_steps=-5), "model.schedule.warmup_steps=-5"),
        (lambda: ScheduleConfig(min_lr_ratio=2.0), "model.schedule.min_lr_ratio=2.0"),
    ],
)
def test_values_that_cannot_work_are_refused_by_name(make, sentence):
    with pytest.raises(ValueError, match=sentence.replace(".", r"\.")):
        make()
