import math

import pytest
import torch
from torch import nn

from nanogpt_lit.run.curves import StepMeter, ValidationRecord, gradient_norm, perplexity


class Clock:
    now_s = 0.0

    def __call__(self):
        return self.now_s


def curves(meter, **changes):
    arguments = {
        "lr": 0.25,
        "grad_norm": torch.tensor(0.5),
        "loss_scale": None,
        "skipped_steps": 0,
        "flops_per_token": 10,
        "peak_flops": None,
        "device": torch.device("cpu"),
    }
    return meter.curves(**(arguments | changes))


def test_loss_is_the_mean_of_the_whole_window_not_of_its_last_batch():
    meter = StepMeter()
    for loss in (1.0, 2.0, 3.0, 6.0):
        meter.add_batch(torch.tensor(loss) / 4, tokens=8)
    meter.end_step()
    values = curves(meter)
    assert values["train/loss"] == meter.drawn_loss == 3.0
    assert values["train/tokens"] == 32
    assert values["train/lr"] == 0.25
    assert values["train/grad_norm"] == 0.5


def test_tokens_per_second_leave_validation_out():
    clock = Clock()
    meter = StepMeter(clock)
    meter.start()
    for _ in range(2):
        clock.now_s += 1.0
        meter.add_batch(torch.tensor(1.0), tokens=100)
        meter.end_step()
    meter.pause()
    clock.now_s += 50.0  # validation
    meter.start()
    clock.now_s += 2.0
    values = curves(meter, peak_flops=5000.0)
    assert values["throughput/tokens_per_s"] == 200 / 4.0
    assert values["throughput/mfu"] == 50.0 * 10 / 5000.0
    clock.now_s += 1.0
    meter.add_batch(torch.tensor(1.0), tokens=100)
    meter.end_step()
    assert curves(meter)["throughput/tokens_per_s"] == 100.0  # counted anew since the last curves


def test_the_time_of_a_run_is_that_of_all_its_pieces_with_validation():
    now_s = 100.0
    meter = StepMeter(clock=lambda: now_s)
    meter.earlier_s = 7200.0
    assert meter.trained_s == 7200.0
    meter.start()
    now_s += 1800.0
    meter.pause()  # a validation
    now_s += 1800.0
    meter.start()
    assert meter.trained_s == 3 * 3600.0
    meter.add_batch(torch.tensor(1.0), tokens=1)
    meter.end_step()
    assert curves(meter)["throughput/trained_hours"] == 3.0


def test_an_unknown_card_has_no_mfu_and_a_run_without_scaler_no_loss_scale():
    meter = StepMeter()
    meter.start()
    meter.add_batch(torch.tensor(1.0), tokens=100)
    meter.end_step()
    values = curves(meter)
    assert "throughput/mfu" not in values
    assert "train/loss_scale" not in values
    assert curves(meter, loss_scale=65536.0)["train/loss_scale"] == 65536.0


def test_the_best_validation_is_kept_with_its_step():
    record = ValidationRecord()
    for step, loss in ((10, 3.0), (20, 2.0), (30, 2.5)):
        record.add(step, loss)
    assert record.best == (20, 2.0)
    assert record.latest == (30, 2.5)
    assert perplexity(2.5) == math.exp(2.5)
    assert record.sentence() == "step 30  validation loss 2.5000  perplexity 12.18  (best 2.0000 at step 20)"
    restored = ValidationRecord()
    restored.load_state_dict(record.state_dict())
    assert (restored.best, restored.latest) == (record.best, record.latest)


def test_perplexity_of_a_run_that_blew_up_is_infinite_and_no_error():
    assert perplexity(1e6) == math.inf


def test_gradient_norm_equals_what_clipping_reports():
    parameters = [nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(2))]
    for p in parameters[:2]:
        p.grad = torch.randn_like(p)
    norm = gradient_norm(parameters)
    assert torch.equal(norm, nn.utils.clip_grad_norm_(parameters, math.inf))
    assert norm.item() == pytest.approx(math.sqrt(sum(float(p.grad.square().sum()) for p in parameters[:2])))
