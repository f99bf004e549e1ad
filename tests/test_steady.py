import pytest

from nanogpt_lit.module import LitNanoGPT
from nanogpt_lit.plan import step as traced_step
from nanogpt_lit.plan.allocator import Event, replay
from nanogpt_lit.plan.steady import long_run, repeated
from nanogpt_lit.plan.step import StepShape, trace_steps


def test_a_stretch_that_frees_all_it_takes_is_repeated_with_new_blocks():
    events = [Event(0, 8), Event(1, 5), Event(1, -5), Event(0, -8)]
    assert repeated(events, 1, 3, 2) == [
        Event(0, 8), Event(1, 5), Event(1, -5), Event(2, 5), Event(2, -5), Event(3, 5), Event(3, -5), Event(0, -8),
    ]  # fmt: skip


def test_what_a_stretch_leaves_is_what_its_repetition_releases():
    # Each step takes its gradients (7) and frees those of the step before.
    events = [Event(0, 7), Event(1, 7), Event(0, -7), Event(1, -7)]
    assert repeated(events, 1, 3, 2) == [
        Event(0, 7), Event(1, 7), Event(0, -7), Event(2, 7), Event(1, -7), Event(3, 7), Event(2, -7), Event(3, -7),
    ]  # fmt: skip


def test_what_is_left_once_does_not_pile_up():
    events = [Event(0, 8), Event(1, 5), Event(0, -8)]
    run = repeated(events, 1, 2, 3)
    assert sum(size for _, size in run) == 5


@pytest.mark.parametrize("zeroes_after_forward", [True, False])
def test_a_continued_trace_reserves_what_a_longer_trace_does(zeroes_after_forward, monkeypatch, tiny_gpt):
    shape = StepShape(
        8, 8, 11, accumulate_grad_batches=4, precision="16-mixed", zeroes_after_forward=zeroes_after_forward
    )
    continued = long_run(trace_steps(lambda: LitNanoGPT(tiny_gpt), shape), 4)
    assert min(totals(continued)) >= 0
    monkeypatch.setattr(traced_step, "TRACED_STEPS", 5)
    monkeypatch.setattr(traced_step, "TRACED_MICRO_BATCHES", 4)
    traced = trace_steps(lambda: LitNanoGPT(tiny_gpt), shape)
    assert replay(continued).reserved == replay(traced.events).reserved
    # Single blocks of 512 bytes live a little longer in one of them.
    assert replay(continued).allocated == pytest.approx(replay(traced.events).allocated, rel=0.01)


def totals(events):
    total = 0
    for event in events:
        total += event.bytes
        yield total
