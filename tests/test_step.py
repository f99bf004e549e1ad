"""The traced step against the loops that really run, and against PyTorch's own memory tracker."""

import gc
import itertools
import math

import pytest
import small_networks
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from nanogpt_lit.gpt.gpt2 import GPTConfig
from nanogpt_lit.gpt.networks import described
from nanogpt_lit.loops import reference
from nanogpt_lit.loops.contract import LoopSettings
from nanogpt_lit.memory.techniques import MemoryConfig
from nanogpt_lit.module import LitNanoGPT
from nanogpt_lit.optim.adamw import AdamWConfig
from nanogpt_lit.plan import step as traced_step
from nanogpt_lit.plan.allocator import Event, replay
from nanogpt_lit.plan.cuda_paths import cuda_paths
from nanogpt_lit.plan.step import StepShape, long_run, repeated, trace_steps
from nanogpt_lit.plan.trace import MemoryTrace
from nanogpt_lit.tune.trials import MODERN

GPT = GPTConfig(block_size=64, vocab_size=300, n_layer=2, n_head=2, n_embd=64)
B, T = 4, 64


def module(**memory):
    return LitNanoGPT(GPT, memory=MemoryConfig(**memory))


def batches():
    while True:
        yield torch.zeros(B, T, dtype=torch.int64), torch.zeros(B, T, dtype=torch.int64)


class Phases(Callback):
    """Tells a trace what Lightning's Trainer is doing.

    On real tensors of a processor, in float32: its attention keeps what CUDA's does, but for the shape of the row sums.
    """

    def __init__(self, trace):
        self.trace = trace

    def on_train_batch_start(self, *args):
        self.trace.phase = "forward"

    def on_before_backward(self, *args):
        self.trace.phase = "backward"

    def on_before_optimizer_step(self, *args):
        self.trace.phase = "optimizer"


@pytest.mark.parametrize("accumulate", [1, 3])
def test_lightnings_trainer_peaks_where_the_plan_says(accumulate, tmp_path):
    shape = StepShape(B, T, 300, accumulate, zeroes_after_forward=True, validates=False)
    planned = trace_steps(module, shape)
    lit = module()
    with MemoryTrace(vocab_size=300) as trace:
        trace.label_module(lit)
        trainer = Trainer(
            accelerator="cpu", devices=1, max_steps=3, accumulate_grad_batches=accumulate, gradient_clip_val=1.0,
            logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            callbacks=[Phases(trace)], default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(lit, batches())
    agree(planned, trace)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_reference_loop_peaks_where_the_plan_says(accumulate):
    planned = trace_steps(module, StepShape(B, T, 300, accumulate, validates=False))
    lit = module()
    with MemoryTrace(vocab_size=300) as trace:
        trace.label_module(lit)
        trace.phase = "forward"  # one phase for all of the loop: only the peak over all is compared
        settings = LoopSettings(max_steps=3, accumulate_grad_batches=accumulate, gradient_clip_val=1.0)
        reference.train(lit, itertools.islice(batches(), 3 * accumulate), [], settings)
    assert trace.peak.bytes - workspace(trace) == pytest.approx(planned.peak.bytes - workspace(planned), rel=0.01)


def workspace(trace):
    return trace.peak.bytes_by_category.get("workspace", 0)


def agree(planned, trace):
    """Single numbers (losses, norms, counts) live longer here and there: 1 percent of this tiny network."""
    assert trace.peak.bytes - workspace(trace) == pytest.approx(planned.peak.bytes - workspace(planned), rel=0.01)
    assert trace.peak.phase == planned.peak.phase


def modern():
    return LitNanoGPT(**described(small_networks.modern(GPT)), optim=AdamWConfig(**MODERN["optim"]))


@pytest.mark.parametrize("module", [module, modern])
@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_pytorchs_memory_tracker_agrees_on_the_peak(precision, module):
    dtype = {"32-true": None, "16-mixed": torch.float16}[precision]
    with FakeTensorMode(), cuda_paths():
        lit = module()
        optimizer = lit.configure_optimizers()["optimizer"]
        tokens = torch.zeros(B, T, dtype=torch.int64)
        tracker = MemTracker()
        tracker.track_external(lit, optimizer, tokens)
        with tracker:
            for _ in range(2):
                with torch.autocast("cpu", dtype, enabled=dtype is not None, cache_enabled=False):
                    loss = lit(tokens, tokens)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                tracker.reset_mod_stats()
        (theirs,) = (sizes["Total"] for sizes in tracker.get_tracker_snapshot("peak").values())
    ours = trace_steps(module, StepShape(B, T, 300, precision=precision, clips=False, validates=False))
    assert ours.peak.bytes - workspace(ours) == pytest.approx(theirs, rel=0.01)


def test_accumulation_costs_the_gradients_and_no_more():
    once, often = (trace_steps(module, StepShape(B, T, 300, n)).peaks["forward"] for n in (1, 4))
    gradients = 4 * sum(p.numel() for p in module().parameters())
    assert often.bytes - once.bytes == pytest.approx(gradients, rel=0.02)


def test_gradients_that_are_freed_after_the_forward_pass_are_there_in_it():
    early, late = (
        trace_steps(module, StepShape(B, T, 300, zeroes_after_forward=late)).peaks["forward"].bytes_by_category
        for late in (False, True)
    )
    assert early.get("gradients", 0) == 0
    assert late["gradients"] >= 4 * sum(p.numel() for p in module().parameters())


def test_foreach_takes_a_copy_of_the_weights_at_the_step_and_fused_none():
    temporaries = {
        implementation: trace_steps(
            lambda implementation=implementation: LitNanoGPT(GPT, AdamWConfig(implementation=implementation)),
            StepShape(B, T, 300),
        ).peaks["optimizer"].bytes_by_category["temporaries"]
        for implementation in ("fused", "foreach", "for-loop")
    }  # fmt: skip
    weights = 4 * sum(p.numel() for p in module().parameters())
    assert temporaries["fused"] < 0.1 * weights
    assert temporaries["foreach"] >= 0.9 * weights  # matrices and vectors are taken in turn
    assert temporaries["for-loop"] < temporaries["foreach"] / 2  # of one tensor at a time


def test_techniques_take_away_what_they_say():
    shape = StepShape(B, T, 300, 2, "16-mixed")
    plain, chunked, recast, full = (
        trace_steps(lambda memory=memory: module(**memory), shape).peaks["backward"].bytes_by_category
        for memory in (
            {}, {"loss_chunk_tokens": 32}, {"recast_weights": True}, {"loss_chunk_tokens": 32, "recompute": "full"},
        )
    )  # fmt: skip
    assert chunked.get("logits", 0) < plain["logits"] / 4
    assert recast["casts"] < plain["casts"]
    assert full["activations"] < chunked["activations"]


@pytest.mark.parametrize(
    ("precision", "bytes_per_weight"), [("32-true", 4), ("16-mixed", 4), ("bf16-mixed", 4), ("bf16-true", 2)]
)
def test_weights_have_the_size_of_the_precision(precision, bytes_per_weight):
    trace = trace_steps(module, StepShape(B, T, 300, precision=precision))
    count = sum(p.numel() for p in module().parameters())
    assert trace.parameters == count
    assert trace.peak.bytes_by_category["weights"] == pytest.approx(count * bytes_per_weight, rel=0.05)


def test_validation_is_part_of_the_plan():
    wide = StepShape(B, T, 300, precision="16-mixed")
    trace = trace_steps(lambda: module(recompute="full"), wide)
    assert trace.peaks["validation"].bytes_by_category["logits"] >= B * T * 300 * (2 + 4 + 4)
    assert "validation" not in trace_steps(module, StepShape(B, T, 300, validates=False)).peaks


def test_a_network_of_any_size_is_traced_without_its_memory():
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2**18, 2**18, bias=False)  # 256 GiB

        def forward(self, tokens, targets):
            return self.layer(torch.zeros(1, 2**18)).sum()

        def configure_optimizers(self):
            return {"optimizer": torch.optim.AdamW(self.parameters(), fused=True)}

    trace = trace_steps(Wide, StepShape(1, 1, 2))
    assert trace.peak.bytes == pytest.approx(4 * 2**38, rel=0.01)  # weights, gradients, two moments


def test_a_trace_is_the_same_whenever_the_garbage_collector_runs():
    class Cyclic(LitNanoGPT):
        def forward(self, tokens, targets):
            loss = super().forward(tokens, targets)
            itself = [torch.zeros(1000)]
            itself.append(itself)
            return loss

    def traced(*thresholds):
        before = gc.get_threshold()
        gc.set_threshold(*thresholds)
        try:
            trace = trace_steps(lambda: Cyclic(GPT), StepShape(B, T, 300, 2))
            at_first = list(trace.events)
            gc.collect()
            return at_first, trace.events
        finally:
            gc.set_threshold(*before)

    never, always = traced(0), traced(5, 1, 1)
    assert never == always
    assert never[0] == never[1]


def test_a_precision_that_is_not_traced_is_refused():
    with pytest.raises(ValueError, match=r"trainer\.precision=64-true .* 16-mixed"):
        StepShape(1, 1, 1, precision="64-true")


def test_clipping_holds_no_more_than_a_norm_per_tensor():
    clipped, not_clipped = (
        trace_steps(module, StepShape(B, T, 300, clips=clips)).peaks["optimizer"].bytes for clips in (True, False)
    )
    assert abs(clipped - not_clipped) <= 512 * math.ceil(len(list(module().parameters())))


# Steady.


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
    assert sum(event[1] for event in run) == 5


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


@pytest.mark.parametrize("implementation", ["foreach", "fused"])
def test_a_plan_is_of_so_many_steps_that_more_reserve_nothing(implementation, monkeypatch):
    """foreach takes more in its seventh step: on PyTorch's own allocator too (docs/fake_gpu.json)."""
    gpt = GPTConfig(block_size=512, vocab_size=50304, n_layer=6, n_head=6, n_embd=384)
    shape = StepShape(4, 512, 50304, 2, zeroes_after_forward=True)
    optim = AdamWConfig(implementation=implementation)
    trace = trace_steps(lambda: LitNanoGPT(gpt, optim=optim), shape)
    planned = replay(long_run(trace, 2)).reserved
    monkeypatch.setattr(traced_step, "MORE_STEPS", 40)
    assert replay(long_run(trace, 2)).reserved == planned


def totals(events):
    total = 0
    for _, size, _ in events:
        total += size
        yield total
