import math

import pytest
import torch
from trainings import training_of

from nanogpt_lit.checkpoint.state import ValidationRecord, perplexity
from nanogpt_lit.module import LitNanoGPT
from nanogpt_lit.run import metrics as metrics_module
from nanogpt_lit.run.metrics import StepMetrics


class Clock:
    now_s = 0.0

    def __call__(self):
        return self.now_s


class Metered:
    """Metrics without a loop, whose clock stands."""

    def __init__(self, module, every=1, **settings):
        self.clock, self.logged = Clock(), []
        self.training = training_of(module, **settings)
        self.metrics = StepMetrics(lambda values, step: self.logged.append((step, values)), every, clock=self.clock)
        self.metrics.on_train_start(self.training)

    def step(self, step, *losses, tokens=8):
        for loss in losses:
            self.metrics.on_batch_end(torch.tensor(loss), tokens)
        self.metrics.on_step_end(step, 0.25, torch.tensor(0.5))
        return self.logged[-1][1] if self.logged else None


@pytest.fixture
def module(tiny_gpt):
    return LitNanoGPT(tiny_gpt)


def test_loss_is_the_mean_of_the_whole_window_not_of_its_last_batch(module):
    run = Metered(module, accumulate_grad_batches=4)
    values = run.step(1, 1.0, 2.0, 3.0, 6.0)
    assert values["train/loss"] == run.metrics.logged_loss == 3.0
    assert values["train/tokens"] == 32
    assert values["train/lr"] == 0.25
    assert values["train/grad_norm"] == 0.5


def test_a_step_is_logged_every_so_often_and_at_both_ends(module):
    run = Metered(module, every=4, max_steps=10)
    for step in range(1, 11):
        run.step(step, 1.0)
    assert [step for step, _ in run.logged] == [1, 4, 8, 10]


def test_tokens_per_second_leave_validation_and_what_is_paused_out(module, monkeypatch):
    monkeypatch.setattr(metrics_module, "peak_flops_of", lambda *_: 5000.0)
    run = Metered(module, every=2)
    run.step(1, 1.0, tokens=100)
    for step in (2, 3):
        run.clock.now_s += 1.0
        run.metrics.on_batch_end(torch.tensor(1.0), 100)
        if step == 3:
            run.metrics.on_validation_start()
            run.clock.now_s += 50.0
            run.metrics.on_validation_end(step, torch.tensor(1.0))
            with run.metrics.paused():
                run.clock.now_s += 50.0
            run.clock.now_s += 2.0
        run.metrics.on_step_end(2 * step, 0.25, torch.tensor(0.5))
    rates = [values.get("throughput/tokens_per_s") for _, values in run.logged if "train/loss" in values]
    assert rates == [None, 100.0, 100 / 3.0]  # counted anew since the last that was logged
    utilisation = [v["throughput/mfu"] for _, v in run.logged if "throughput/mfu" in v]
    flops_per_token = module.gpt.flops_per_token(module.gpt.config.block_size)
    assert utilisation == [100.0 * flops_per_token / 5000.0, 100 / 3.0 * flops_per_token / 5000.0]


def test_the_time_of_a_run_is_that_of_all_its_processes_with_validation(module):
    run = Metered(module)
    run.metrics.load_state_dict(run.metrics.state_dict() | {"trained_s": 7200.0})
    assert run.metrics.trained_s == 7200.0
    run.clock.now_s += 1800.0
    run.metrics.on_validation_start()
    run.clock.now_s += 1800.0
    run.metrics.on_validation_end(1, torch.tensor(1.0))
    assert run.metrics.trained_s == 3 * 3600.0
    assert run.step(1, 1.0)["throughput/trained_hours"] == 3.0


def test_an_unknown_gpu_has_no_mfu_and_a_run_without_scaler_no_loss_scale(module):
    run = Metered(module)
    run.clock.now_s += 1.0
    values = run.step(1, 1.0)
    assert "throughput/mfu" not in values
    assert "train/loss_scale" not in values
    run.training.scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    assert run.step(2, 1.0)["train/loss_scale"] == 64.0


def test_a_validation_is_logged_at_its_step(module):
    run = Metered(module)
    run.metrics.on_validation_start()
    run.metrics.on_validation_end(7, torch.tensor(2.5))
    assert run.logged == [(7, {"val/loss": 2.5, "val/perplexity": math.exp(2.5)})]


def test_the_best_validation_is_kept_with_its_step():
    record = ValidationRecord()
    for step, loss in ((10, 3.0), (20, 2.0), (30, 2.5)):
        record.add(step, loss)
    assert record.best == (20, 2.0)
    assert record.latest == (30, 2.5)
    assert record.sentence() == "step 30  validation loss 2.5000  perplexity 12.18  (best 2.0000 at step 20)"
    restored = ValidationRecord()
    restored.load_state_dict(record.state_dict())
    assert (restored.best, restored.latest) == (record.best, record.latest)


def test_perplexity_of_a_run_that_blew_up_is_infinite_and_no_error():
    assert perplexity(1e6) == math.inf
