"""The reference loop against a loop written out by hand for each case."""

import copy
from dataclasses import replace

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from nanogpt_lit.loops.contract import LoopSettings, Observer
from nanogpt_lit.loops.reference import train
from nanogpt_lit.module import LitNanoGPT
from nanogpt_lit.optim.adamw import AdamWConfig
from nanogpt_lit.optim.schedule import ScheduleConfig
from nanogpt_lit.parity.processes import run_together
from nanogpt_lit.run.guards import FiniteGuard

BATCHES = 10


class Diary(Observer):
    def __init__(self):
        self.losses, self.steps, self.validations = [], [], []

    def on_batch_end(self, loss, tokens):
        self.losses.append(float(loss))

    def on_step_end(self, step, lr, grad_norm):
        self.steps.append((step, lr, float(grad_norm)))

    def on_validation_end(self, step, loss):
        self.validations.append((step, float(loss)))


@pytest.fixture
def module(tiny_gpt):
    torch.manual_seed(0)
    return LitNanoGPT(tiny_gpt, AdamWConfig(lr=0.05), ScheduleConfig(warmup_steps=2, total_steps=20))


@pytest.fixture
def loader():
    windows = torch.randint(0, 11, (BATCHES * 2, 9), generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(windows[:, :-1].contiguous(), windows[:, 1:].contiguous()), batch_size=2)


def same_weights(first, second):
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_a_window_that_the_end_of_the_loader_cuts_short_is_stepped_and_the_next_begins_anew(module, loader):
    naive = copy.deepcopy(module)
    configured = naive.configure_optimizers()
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    losses, steps = [], []
    for window in ([0, 1, 2, 3], [4, 5, 6, 7], [8, 9], [0, 1, 2, 3]):
        batches = list(loader)
        for k in window:
            loss = naive(*batches[k])
            losses.append(loss.item())
            (loss / 4).backward()
        norm = torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 0.5)
        steps.append((len(steps) + 1, optimizer.param_groups[0]["lr"], norm.item()))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()

    diary = Diary()
    settings = LoopSettings(max_steps=4, accumulate_grad_batches=4, gradient_clip_val=0.5)
    train(module, loader, [], settings, [FiniteGuard(), diary])
    assert diary.losses == losses
    assert diary.steps == steps
    assert same_weights(module, naive)


def test_without_clipping_the_norm_is_measured_and_the_gradients_are_left_alone(module, loader):
    naive = copy.deepcopy(module)
    optimizer = naive.configure_optimizers()["optimizer"]
    naive(*next(iter(loader))).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for g in optimizer.param_groups for p in g["params"]])
    optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"] = 0.05 / 3, 0.05 / 3
    optimizer.step()

    diary = Diary()
    train(module, loader, [], LoopSettings(max_steps=1), [diary])
    assert diary.steps == [(1, 0.05 / 3, norm.item())]
    assert same_weights(module, naive)


def test_16_mixed_scales_skips_the_step_that_overflows_and_holds_the_schedule(module, loader):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=100)
    before = copy.deepcopy(module)
    scales, held = [], []

    class Scales(Observer):
        def on_train_start(self, parts):
            self.parts = parts

        def on_step_end(self, step, lr, grad_norm):
            scales.append(self.parts.loss_scale())
            held.append((lr, same_weights(module, before)))

    train(module, loader, [], LoopSettings(max_steps=2, precision="16-mixed"), [FiniteGuard(), Scales()], scaler)
    assert scales == [2.0**39, 2.0**38]
    assert held == [(0.05 / 3, True)] * 2


def test_autocast_computes_in_the_precision_that_is_asked_for(module, loader):
    losses = {}
    for precision, dtype in (("32-true", None), ("bf16-mixed", torch.bfloat16), ("16-mixed", torch.float16)):
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None), torch.no_grad():
            expected = module(*next(iter(loader))).item()
        diary = Diary()
        train(copy.deepcopy(module), loader, [], LoopSettings(max_steps=1, precision=precision), [diary])
        assert diary.losses == [expected]
        losses[precision] = expected
    assert len(set(losses.values())) == 3


def test_validation_reads_its_first_batches_in_eval_mode_and_once_more_at_the_end(tiny_gpt, loader):
    torch.manual_seed(0)
    module = LitNanoGPT(
        replace(tiny_gpt, dropout=0.5), AdamWConfig(lr=0.05), ScheduleConfig(warmup_steps=2, total_steps=20)
    )
    expected = []

    class ByHand(Diary):
        def on_validation_end(self, step, loss):
            super().on_validation_end(step, loss)
            module.eval()
            with torch.no_grad():
                losses = [module(*batch) for _, batch in zip(range(3), loader, strict=False)]
            module.train()
            expected.append(float(sum(2 * loss for loss in losses) / 6))

    diary = ByHand()
    settings = LoopSettings(max_steps=5, val_check_interval=2, limit_val_batches=3, seed=5)
    train(module, loader, loader, settings, [diary])
    assert [step for step, _ in diary.validations] == [2, 4, 5]
    assert [loss for _, loss in diary.validations] == expected
    assert module.training


def test_the_seed_decides_dropout_and_nothing_before_it_matters(tiny_gpt, loader):
    runs = []
    for drawn_before, seed in ((0, 5), (3, 5), (0, 6)):
        torch.manual_seed(0)
        module = LitNanoGPT(replace(tiny_gpt, dropout=0.5), AdamWConfig(), ScheduleConfig(total_steps=20))
        torch.rand(drawn_before)
        diary = Diary()
        train(module, loader, [], LoopSettings(max_steps=2, seed=seed), [diary])
        runs.append(diary.losses)
    assert runs[0] == runs[1] != runs[2]


def test_an_empty_loader_is_refused(module):
    with pytest.raises(ValueError, match="the training loader is empty"):
        train(module, [], [], LoopSettings(max_steps=1))


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"max_steps": 0}, "trainer.max_steps=0 must be at least 1"),
        ({"max_steps": 1, "accumulate_grad_batches": 0}, "trainer.accumulate_grad_batches=0"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        LoopSettings(**wrong)


def test_a_precision_of_lightnings_own_is_refused(module):
    with pytest.raises(ValueError, match=r"trainer\.precision=bf16-true .* 32-true, bf16-mixed, 16-mixed"):
        train(module, [], [], LoopSettings(1, precision="bf16-true"))


def train_with_every_second_batch(module, windows, settings):
    loader = [(window[:, :-1], window[:, 1:]) for window in windows[torch.distributed.get_rank() :: 2]]
    diary = Diary()
    train(module, loader, loader[:2], settings, [diary])
    return diary, module.state_dict()


def test_two_processes_take_the_step_that_one_takes_with_twice_the_accumulation(module):
    torch.set_num_threads(1)  # as each of the two has
    windows = torch.randint(0, 11, (8, 2, 9), generator=torch.Generator().manual_seed(1))
    naive, diary = copy.deepcopy(module), Diary()
    loader = [(window[:, :-1], window[:, 1:]) for window in windows]
    clip = {"gradient_clip_val": 0.5, "val_check_interval": 100}
    train(naive, loader, loader[:4], LoopSettings(max_steps=4, accumulate_grad_batches=2, **clip), [diary])

    shares = run_together(2, train_with_every_second_batch, module, windows, LoopSettings(max_steps=4, **clip))
    # Halving is exact and a sum of two has one order: the same bits.
    for of_rank, weights in shares:
        assert of_rank.steps == diary.steps
        assert of_rank.validations[0] == pytest.approx(diary.validations[0], abs=1e-6)  # four losses, in another order
        for name, tensor in naive.state_dict().items():
            assert torch.equal(tensor, weights[name]), name
    assert [
        loss for pair in zip(*(of_rank.losses for of_rank, _ in shares), strict=True) for loss in pair
    ] == diary.losses
