import copy
import math

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from nanogpt_lit.gpt.gpt2 import GPT, GPTConfig
from nanogpt_lit.memory.host_optimizer import HostAdamW, HostResidentAdamW
from nanogpt_lit.optim import muon
from nanogpt_lit.optim.adamw import AdamWConfig, build_optimizer, param_groups
from nanogpt_lit.optim.muon import COEFFICIENTS, MuonBesideAdamW, orthogonalised, together
from nanogpt_lit.optim.schedule import ScheduleConfig, WarmupDecay, short_of_peak, warmup_decay

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
    rates = [warmup_decay(step, config) for step in range(130)]
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
    schedule = WarmupDecay(optimizer, ScheduleConfig(warmup_steps=2, total_steps=6))
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
    assert rates == pytest.approx([warmup_decay(step, config) for step in (0, 0, 1, 1, 1, 2)])
    assert schedule.skipped_steps == 3
    assert torch.equal(weights[1], weights[3])  # the skipped steps really were skipped
    assert not torch.equal(weights[3], weights[4])


def test_schedule_holds_for_a_step_without_gradients():
    _, _, schedule = train([False], fused=False)
    rate = schedule.get_last_lr()
    schedule.optimizer.step()
    schedule.step()
    assert (schedule.get_last_lr(), schedule.skipped_steps) == (rate, 1)


def test_schedule_continues_from_its_saved_state():
    _, _, whole = train([False, True, False, False], fused=False)
    _, _, half = train([False, True], fused=False)
    _, _, rest = train([], fused=False)
    rest.load_state_dict(half.state_dict())
    for _ in range(2):
        for parameter in rest.optimizer.param_groups[0]["params"]:
            parameter.grad = torch.ones_like(parameter)
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
        (lambda: AdamWConfig(matrices="lion"), "model.optim.matrices='lion'"),
        (lambda: AdamWConfig(muon_lr=0.1), "model.optim.muon_lr=0.1 does nothing"),
        (lambda: AdamWConfig(matrices="muon", muon_lr=-0.1), "model.optim.muon_lr=-0.1"),
        (lambda: AdamWConfig(muon_momentum=1.0), "model.optim.muon_momentum=1.0"),
        (lambda: ScheduleConfig(decay="linear"), "model.schedule.decay='linear'"),
        (lambda: ScheduleConfig(cooldown_ratio=0.0), "model.schedule.cooldown_ratio=0.0"),
        (lambda: ScheduleConfig(total_steps=-1), "trainer.max_steps=-1"),
        (lambda: ScheduleConfig(warmup_steps=-5), "model.schedule.warmup_steps=-5"),
        (lambda: ScheduleConfig(min_lr_ratio=2.0), "model.schedule.min_lr_ratio=2.0"),
    ],
)
def test_values_that_cannot_work_are_refused_by_name(make, sentence):
    with pytest.raises(ValueError, match=sentence.replace(".", r"\.")):
        make()


MODERN = AdamWConfig(lr=0.02, matrices="muon", muon_lr=0.03, weight_decay=0.1)


def made(config=MODERN, adamw=AdamW):
    torch.manual_seed(0)
    gpt = GPT(TINY)
    return gpt, build_optimizer(gpt.named_parameters(), config, adamw)


def take_steps(gpt, optimizer, seeds):
    for seed in seeds:
        windows = torch.randint(0, 11, (2, 9), generator=torch.Generator().manual_seed(seed))
        gpt.loss(windows[:, :-1], windows[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_muon_has_the_blocks_matrices_and_adamw_every_other_parameter():
    gpt, optimizer = made()
    groups = [{id(p) for p in group["params"]} for group in optimizer.param_groups]
    assert sorted(i for group in groups for i in group) == sorted(map(id, gpt.parameters()))
    decayed, plain, muons = groups
    for name, p in gpt.named_parameters():
        of_a_block = ".h." in name and p.dim() == 2
        assert (id(p) in muons) == of_a_block, name
        assert (id(p) in decayed) == ("wte" in name or "wpe" in name), name
        assert (id(p) in plain) == (p.dim() < 2), name
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0, 0.1]


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4)])
def test_orthogonalising_applies_the_quintic_to_the_singular_values(shape):
    matrices = torch.randn(3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    U, S, Vh = torch.linalg.svd(matrices, full_matrices=False)
    S = S / S.pow(2).sum(-1, keepdim=True).sqrt()
    a, b, c = 3.4445, -4.7750, 2.0315
    for _ in range(5):
        S = a * S + b * S**3 + c * S**5
    torch.testing.assert_close(orthogonalised(matrices), U * S[:, None] @ Vh, rtol=1e-9, atol=1e-9)
    # The least of the six was near zero and is on its way up.
    assert S.min() > 0.3
    assert S.max() < 1.3


@pytest.mark.parametrize("in_bfloat16", [False, True])
def test_three_steps_equal_torchs_own_muon_up_to_its_bfloat16(in_bfloat16, monkeypatch):
    monkeypatch.setattr(muon, "_has_bfloat16", lambda _: in_bfloat16)
    torch.manual_seed(0)
    start = [torch.randn(8, 24), torch.randn(24, 8), torch.randn(8, 24)]
    ours, theirs = ([nn.Parameter(w.clone()) for w in start] for _ in range(2))
    adamw = AdamW([nn.Parameter(torch.zeros(1))])
    optimizers = (
        MuonBesideAdamW(ours, adamw, lr=0.1, momentum=0.9, weight_decay=0.2),
        torch.optim.Muon(theirs, lr=0.1, momentum=0.9, weight_decay=0.2, adjust_lr_fn="match_rms_adamw"),
    )
    for step in range(3):
        for i, pair in enumerate(zip(ours, theirs, strict=True)):
            for p in pair:
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step + i))
        for optimizer in optimizers:
            optimizer.step()
    for p, q, w in zip(ours, theirs, start, strict=True):
        # torch orthogonalises in bfloat16, good to 0.4 % an operation, and the five rounds multiply a part of that.
        assert (p - q).norm() < 0.03 * (q - w).norm()
        torch.testing.assert_close(optimizers[0].state[p], optimizers[1].state[q])


@pytest.mark.parametrize("shape", [(3, 8, 16), (2, 40, 8)])
def test_oblong_matrices_move_as_the_rounds_written_out(shape, monkeypatch):
    monkeypatch.setattr(muon, "_has_bfloat16", lambda _: False)
    torch.manual_seed(0)
    matrices = torch.randn(shape, dtype=torch.float64)
    x = matrices / torch.linalg.matrix_norm(matrices)[:, None, None]
    a, b, c = COEFFICIENTS
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    torch.testing.assert_close(orthogonalised(matrices), x, rtol=1e-9, atol=1e-9)
    # Singular values over four orders of magnitude, where rounding is multiplied most.
    steep = (matrices * torch.logspace(0, -4, shape[2], dtype=torch.float64)).float()
    exact = orthogonalised(steep.double()).float()
    assert (orthogonalised(steep) - exact).norm() < 1e-3 * exact.norm()


@pytest.mark.parametrize(
    ("tiles", "onednn", "dtype", "expected"),
    [
        (True, True, torch.float32, torch.bfloat16),
        (True, True, torch.float64, torch.float64),
        (True, False, torch.float32, torch.float32),  # oneDNN held back, as by ONEDNN_MAX_CPU_ISA
        (False, True, torch.float32, torch.float32),  # multiplies bfloat16, without tiles
    ],
)
def test_a_cpu_orthogonalises_in_bfloat16_where_it_has_tiles_for_it(tiles, onednn, dtype, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn)
    assert orthogonalised(torch.eye(8, dtype=dtype)[None]).dtype == expected


def test_matrices_move_the_same_alone_and_together():
    torch.manual_seed(0)
    matrices = torch.randn(5, 8, 8, dtype=torch.float64)
    alone = torch.cat([orthogonalised(m[None]) for m in matrices])
    torch.testing.assert_close(orthogonalised(matrices), alone, rtol=1e-12, atol=1e-12)
    parameters = [
        nn.Parameter(torch.zeros(shape)) for shape in [(2, 3), (3, 2), (2, 3), (2**12, 2**10), (2**12, 2**10)]
    ]
    assert [len(same) for same in together(parameters)] == [2, 1, 1, 1]


def test_adamws_part_has_the_bits_of_adamw_alone():
    gpt, both = made()
    alone_gpt, _ = made()
    rest = [(name, p) for name, p in alone_gpt.named_parameters() if not (".h." in name and p.dim() == 2)]
    alone = build_optimizer(rest, AdamWConfig(lr=0.02, weight_decay=0.1))
    for step in range(3):
        for networks in (gpt, alone_gpt):
            generator = torch.Generator().manual_seed(step)
            for p in networks.parameters():
                p.grad = torch.randn(p.shape, generator=generator)
        both.step()
        alone.step()
    theirs = dict(gpt.named_parameters())
    assert all(torch.equal(p, theirs[name]) for name, p in rest)


@pytest.mark.parametrize("there", [AdamW, HostAdamW, HostResidentAdamW])
@pytest.mark.parametrize("here", [AdamW, HostAdamW, HostResidentAdamW])
def test_a_saved_optimizer_goes_on_bit_for_bit_wherever_its_moments_lie(here, there):
    whole, optimizer = made()
    take_steps(whole, optimizer, range(6))
    half, optimizer = made(adamw=here)
    take_steps(half, optimizer, range(3))
    saved = copy.deepcopy((half.state_dict(), optimizer.state_dict()))
    rest, optimizer = made(adamw=there)
    take_steps(rest, optimizer, [9])  # what is there already is replaced
    rest.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    again = optimizer.state_dict()
    assert again["param_groups"] == saved[1]["param_groups"]
    for number, state in saved[1]["state"].items():
        assert all(torch.equal(value, again["state"][number][name]) for name, value in state.items())
    take_steps(rest, optimizer, range(3, 6))
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), rest.parameters(), strict=True))


def test_the_schedule_moves_both_rates_and_a_checkpoint_keeps_them():
    gpt, optimizer = made()
    schedule = WarmupDecay(optimizer, ScheduleConfig(warmup_steps=1, total_steps=4))
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.01, 0.015]
    take_steps(gpt, optimizer, [0])
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.02, 0.02, 0.03]
    other, second = made()
    second.load_state_dict(optimizer.state_dict())
    for group in second.param_groups:
        group["lr"] = 0.0
    before = copy.deepcopy(other.state_dict())
    take_steps(other, second, [1])
    assert all(torch.equal(before[name], value) for name, value in other.state_dict().items())


def test_a_scaler_that_overflows_skips_the_step_of_both():
    gpt, optimizer = made()
    schedule = WarmupDecay(optimizer, ScheduleConfig(warmup_steps=2, total_steps=6))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    before = copy.deepcopy(gpt.state_dict())
    for overflow in (True, False):
        tokens = torch.zeros(1, 8, dtype=torch.int64)
        scaler.scale(gpt.loss(tokens, tokens) * (float("inf") if overflow else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        optimizer.zero_grad()
        unchanged = [name for name, value in gpt.state_dict().items() if torch.equal(before[name], value)]
        assert (len(unchanged) == len(before)) == overflow
    assert schedule.skipped_steps == 1


def test_a_divided_matrix_is_refused_in_one_sentence():
    with pytest.raises(ValueError, match=r"model\.optim\.matrices=muon needs whole matrices .* \(12,\)"):
        build_optimizer([("gpt.transformer.h.0.attn.c_attn.weight", nn.Parameter(torch.zeros(12)))], MODERN)


def test_cooldown_stays_at_the_peak_and_falls_in_a_straight_line():
    config = ScheduleConfig(warmup_steps=10, min_lr_ratio=0.0, total_steps=100, decay="cooldown", cooldown_ratio=0.4)
    rates = [warmup_decay(step, config) for step in range(110)]
    assert rates[0] == pytest.approx(1 / 11)
    assert rates[10:61] == [1.0] * 51
    assert rates[60:101] == pytest.approx([(100 - step) / 40 for step in range(60, 101)])
    assert rates[100:] == [0.0] * 10


def test_without_an_end_the_rate_stays_at_its_peak():
    rates = [warmup_decay(step, ScheduleConfig(warmup_steps=3, min_lr_ratio=0.0)) for step in range(2000)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert set(rates[3:]) == {1.0}


@pytest.mark.parametrize(("total_steps", "works"), [(60, "6 warms up over a tenth"), (5, "0 begins at it")])
def test_a_warm_up_that_does_not_end_is_told_one_that_does(total_steps, works):
    sentence = short_of_peak(ScheduleConfig(total_steps=total_steps))
    assert sentence.endswith(f"; {works}")
    assert short_of_peak(ScheduleConfig(total_steps=total_steps, warmup_steps=int(works.split()[0]))) is None
