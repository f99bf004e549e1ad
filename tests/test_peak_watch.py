"""The planned peak beside the measured one. The card is played: its device says cuda, its peaks are given."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from trainings import training_of

from nanogpt_lit.gpt.gpt2 import GPTConfig
from nanogpt_lit.memory.ladder import Rung
from nanogpt_lit.memory.techniques import MemoryConfig
from nanogpt_lit.module import LitNanoGPT
from nanogpt_lit.plan import peak_watch
from nanogpt_lit.plan.allocator import MIB
from nanogpt_lit.plan.plan import measure
from nanogpt_lit.plan.step import StepShape
from nanogpt_lit.run import metrics as metrics_module
from nanogpt_lit.run.metrics import StepMetrics
from nanogpt_lit.runtime import gpus
from nanogpt_lit.runtime.gpus import GPUS

CARD = torch.device("cuda")
MEMORY = MemoryConfig(loss_chunk_tokens=16, recompute="selective")
GPT = GPTConfig(block_size=32, vocab_size=257, n_layer=2, n_head=2, n_embd=32)
SHAPE = {
    "accumulate_grad_batches": 2, "precision": "16-mixed", "gradient_clip_val": 1.0, "val_check_interval": 2,
}  # fmt: skip


class Run:
    """A loop that trains nothing, with a meter as every loop's."""

    def __init__(self, monkeypatch, capsys, **shape):
        self.peaks = (0.0, 0.0)
        monkeypatch.setattr(metrics_module, "peaks_mib", lambda device: self.peaks)
        monkeypatch.setattr(metrics_module, "peak_flops_of", lambda *_: None)
        monkeypatch.setattr(gpus, "GpuHealth", lambda device: SimpleNamespace(curves=dict))
        # The network is on the processor here; weights that the test asks for are told to be on the card.
        monkeypatch.setattr(peak_watch, "on_gpu_mib", lambda tensors: self.on_card.get(len(tensors) > 0, 0.0))
        self.on_card = {}
        self.capsys = capsys
        self.module = LitNanoGPT(GPT, memory=MEMORY)
        training = training_of(self.module, device="cuda", **(SHAPE | shape))
        self.optimizer, self.steps = training.optimizer, 0
        self.metrics = StepMetrics(lambda values, step: self.logged.append(values), 1)
        self.metrics.on_train_start(training)

    def step(self, steps=1, peaks=None):
        """Returns the values that were logged last, and what was said. Several steps are logged as one."""
        self.logged = []
        for k in range(steps):
            self.steps += 1
            for _ in range(2):
                self.metrics.on_batch_end(torch.tensor(1.0), tokens=4 * 32)
            self.peaks = peaks or self.peaks if k == steps - 1 else self.peaks
            self.metrics._every = 1 if k == steps - 1 else 10**9
            self.metrics.on_step_end(self.steps, 0.1, torch.tensor(1.0))
        return self.logged[-1], self.capsys.readouterr().err


@pytest.fixture
def run(monkeypatch, capsys):
    return Run(monkeypatch, capsys)


@pytest.fixture(scope="module")
def planned():
    shape = StepShape(4, 32, 257, 2, "16-mixed")
    rung = Rung("", MEMORY, 4, 2)
    return measure(lambda memory: LitNanoGPT(GPT, memory=memory), rung, shape, GPUS[0])


def test_the_planned_peak_is_drawn_beside_the_measured_ones(run, planned):
    values, err = run.step(peaks=(10.0, planned.reserved_mib))
    assert values["memory/planned_mib"] == planned.reserved_mib
    assert values["memory/peak_reserved_mib"] == planned.reserved_mib
    assert values["memory/peak_allocated_mib"] == 10.0
    assert err == ""


def test_it_is_planned_once_and_not_while_the_clock_runs(run, monkeypatch):
    calls = []
    monkeypatch.setattr(peak_watch, "measure", lambda *a: calls.append(run.metrics._counting_since_s) or 1 / 0)
    run.step(3)
    assert calls == [None]


def test_expandable_segments_are_planned_as_such(run, planned, monkeypatch):
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:64, expandable_segments: True")
    monkeypatch.setattr(peak_watch, "measure", lambda *_: replace(planned, reserved_mib=99.0))
    assert run.step()[0]["memory/planned_mib"] == planned.expandable_reserved_mib


def test_a_difference_within_5_percent_is_none(run, planned):
    _, err = run.step(10, peaks=(planned.allocated_mib, 1.04 * planned.reserved_mib))
    assert err == ""


def test_more_than_planned_is_one_line_at_once_and_never_again(run, planned):
    peaks = (planned.allocated_mib + 50, planned.reserved_mib + 60)
    run.on_card = {True: planned.categories_mib["weights"], False: planned.categories_mib["optimizer"]}
    _, err = run.step(peaks=peaks)
    assert len(err.splitlines()) == 1
    assert f"reserved {planned.reserved_mib + 60:,.0f} MiB, {planned.reserved_mib:,.0f} were planned" in err
    assert "comes and goes with a step" in err
    assert run.step(10)[1] == ""


def test_less_than_planned_is_said_only_after_the_peak_may_have_come(run, planned):
    peaks = (0.5 * planned.allocated_mib, 0.5 * planned.reserved_mib)
    assert run.step(2, peaks)[1] == ""
    assert run.step(4, peaks)[1].count("\n") == 1


@pytest.mark.parametrize(
    ("weights", "passing", "gaps", "name"),
    [(50, 0, 0, "the weights"), (0, 50, 0, "comes and goes"), (0, 0, 50, "gaps between blocks")],
)
def test_the_category_at_fault_is_named(run, planned, weights, passing, gaps, name):
    of_plan = planned.categories_mib
    run.on_card = {True: of_plan["weights"] + weights, False: of_plan["optimizer"]}
    allocated = planned.allocated_mib + weights + passing
    _, err = run.step(peaks=(allocated, planned.reserved_mib + weights + passing + gaps))
    assert name in err
    assert err.rstrip().endswith("MiB")


def test_the_optimizer_is_named_when_its_state_is_not_where_it_was_planned(monkeypatch, capsys, planned):
    run = Run(monkeypatch, capsys)
    # Its state fills on the card: there are tensors in it now.
    state = {p: {"exp_avg": p.detach()} for p in run.module.parameters()}
    run.optimizer.state.update(state)
    sizes = iter([planned.categories_mib["weights"], planned.categories_mib["optimizer"] + 50])
    monkeypatch.setattr(peak_watch, "on_gpu_mib", lambda tensors: next(sizes))
    _, err = run.step(peaks=(planned.allocated_mib + 50, planned.reserved_mib + 50))
    assert "in the optimizer's state: 50 for 0 MiB" in err


@pytest.mark.parametrize(("gpu", "says"), [(GPUS[0], True), (replace(GPUS[0], name="Voodoo 2"), False)])
def test_the_first_steps_say_once_what_they_make_of_the_planned_time(run, planned, monkeypatch, gpu, says):
    monkeypatch.setattr(peak_watch, "gpu_here", lambda: gpu)
    clock = {"s": 0.0}
    run.metrics._clock = lambda: clock["s"]
    run.metrics._start()
    clock["s"] += 60.0
    assert run.step(peaks=(10.0, planned.reserved_mib))[1] == ""  # the first step warms up
    clock["s"] += 8.0
    _, err = run.step(4)
    were_planned = f"{planned.step_s:.3g}"  # tiny kernels: bound by their launches, at any clock
    line = f"time: 2 s per step, {were_planned} were planned\n"
    assert err == (line if says else "")
    clock["s"] += 8.0
    assert run.step(4)[1] == ""


def test_a_run_whose_steps_are_done_in_pieces_is_not_compared(run, planned):
    run.module.fallback = {"sequences": 2}
    assert run.step(10, peaks=(10.0, 2 * planned.reserved_mib))[1] == ""


def test_a_plan_that_fails_is_one_line_and_the_run_goes_on(monkeypatch, capsys):
    run = Run(monkeypatch, capsys, precision="transformer-engine")
    values, err = run.step(peaks=(10.0, 20.0))
    assert "memory/planned_mib" not in values
    assert values["memory/peak_reserved_mib"] == 20.0
    assert err.startswith("memory/planned_mib is left out, because planning failed: UserError: trainer.precision=")
    assert len(err.splitlines()) == 1
    assert run.step(10)[1] == ""


def test_planning_draws_no_random_number_and_leaves_the_network_alone(run):
    before = torch.get_rng_state(), {name: p.clone() for name, p in run.module.named_parameters()}
    run.step()
    assert torch.equal(torch.get_rng_state(), before[0])
    for name, p in run.module.named_parameters():
        assert torch.equal(p, before[1][name])
        assert p.grad is None


@pytest.mark.parametrize(("device", "rank", "strategy"), [("cpu", 0, "single"), ("cuda", 1, "ddp"), ("cuda", 0, None)])
def test_nothing_is_planned_without_a_card_beside_the_first_process_or_of_a_strategy_unknown(
    device, rank, strategy, monkeypatch
):
    monkeypatch.setattr(peak_watch, "measure", lambda *a: pytest.fail("planned"))
    monkeypatch.setattr(metrics_module, "peak_flops_of", lambda *_: None)
    monkeypatch.setattr(gpus, "GpuHealth", lambda device: SimpleNamespace(curves=dict))
    metrics = StepMetrics(lambda *_: None, 1)
    training = training_of(LitNanoGPT(GPT), device=device, processes=2)
    metrics.on_train_start(replace(training, rank=rank, strategy=strategy))
    metrics.on_batch_end(torch.tensor(0.5), tokens=4 * 32)
    assert metrics._peak_watch is None


def spread(strategy, **options):
    """What the first of two devices plans, and whether its steps' time is held against the plan."""
    training = training_of(LitNanoGPT(GPT, memory=MEMORY), device="cuda", processes=2, **SHAPE)
    training = replace(training, strategy=strategy, strategy_options=options, zeroes_after_forward=True)
    said = []
    watch = metrics_module.peak_watch_of(training)
    watch._report = said.append
    watch.plan(4 * 32)
    for _ in range(3):
        watch.end_step()
    watch.compare_time(1.0, 1)
    return watch.planned_mib, said


def by_hand(strategy, **options):
    shape = StepShape(
        4, 32, 257, 2, "16-mixed", strategy=strategy, devices=2 if strategy != "single" else 1,
        strategy_options=tuple(options.items()), zeroes_after_forward=True,
    )  # fmt: skip
    return measure(lambda memory: LitNanoGPT(GPT, memory=memory), Rung("", MEMORY, 4, 2), shape, GPUS[0])


@pytest.mark.parametrize(
    ("strategy", "options"), [("ddp", {}), ("ddp", {"gradient_as_bucket_view": True}), ("fsdp2", {})]
)
def test_a_run_of_several_devices_plans_what_its_strategy_lets_this_one_hold(strategy, options, monkeypatch):
    def in_this_process(command, input, **more):
        assert "from nanogpt_lit.plan.peak_watch import answer" in command[2]
        return SimpleNamespace(returncode=0, stdout=f"a remark\n{peak_watch.answer(input)}\n")

    monkeypatch.setattr(peak_watch.subprocess, "run", in_this_process)
    monkeypatch.setattr(peak_watch, "gpu_here", lambda: GPUS[0])
    planned_mib, said = spread(strategy, **options)
    assert planned_mib == by_hand(strategy, **options).reserved_mib
    assert said == []
    allocated = [by_hand(*kind).allocated_mib for kind in (("single",), (strategy,))]
    assert allocated[0] < allocated[1] if strategy == "ddp" else allocated[0] > allocated[1]


@pytest.mark.long
def test_the_process_that_plans_leaves_the_groups_of_the_run_alone(monkeypatch):
    from torch import distributed

    distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.HashStore())
    try:
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setattr(peak_watch, "gpu_here", lambda: GPUS[0])
        planned_mib, said = spread("fsdp2")
        assert said == []
        assert distributed.get_world_size() == 1
    finally:
        distributed.destroy_process_group()
    assert planned_mib == by_hand("fsdp2").reserved_mib


def test_a_plan_that_fails_in_its_own_process_is_one_line_too(monkeypatch):
    answer = SimpleNamespace(returncode=1, stdout="", stderr="Traceback\n  line\nValueError: no such thing\n")
    monkeypatch.setattr(peak_watch.subprocess, "run", lambda *a, **more: answer)
    planned_mib, said = spread("ddp")
    assert planned_mib is None
    assert said == ["memory/planned_mib is left out, because planning failed: RuntimeError: ValueError: no such thing"]


def test_what_is_on_the_card_is_counted_once():
    class OnCard(torch.Tensor):
        is_cuda = True

    tensor = torch.zeros(MIB // 4).as_subclass(OnCard)
    assert peak_watch.on_gpu_mib([tensor, tensor.view(2, -1).as_subclass(OnCard), torch.zeros(10), 3]) == 1.0
