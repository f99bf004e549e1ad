"""What is moved to host memory changes no bit of a run: in every loop, with all that a loop does, and across a stop."""

import functools
import itertools
import math
from dataclasses import replace

import pytest
import torch
from three_loops import prepared_data

from nanogpt_lit.gpt.gpt2 import GPTConfig
from nanogpt_lit.loops import reference
from nanogpt_lit.loops.contract import LoopSettings, Observer
from nanogpt_lit.memory import host, host_optimizer, host_weights
from nanogpt_lit.memory.host import Mark
from nanogpt_lit.memory.techniques import MemoryConfig
from nanogpt_lit.optim.adamw import AdamWConfig
from nanogpt_lit.optim.schedule import ScheduleConfig
from nanogpt_lit.parity.processes import run_together
from nanogpt_lit.parity.record import compare
from nanogpt_lit.parity.runs import LOOPS, OVERFLOWS, Case, quiet
from nanogpt_lit.run.observers import always
from nanogpt_lit.run.resume import Resume, capture

STEPS = 6
TECHNIQUES = {
    "optimizer state on the host": {"optimizer_state": "host"},
    "weights on the host": {"weights": "host"},
    "weights streamed": {"weights": "streamed"},
    "weights streamed, block inputs on the host": {
        "weights": "streamed", "recompute": "full", "block_inputs": "host",
    },
    "all at once": {"optimizer_state": "host", "recompute": "full", "block_inputs": "host", "recompute_every": 2},
}  # fmt: skip


@pytest.fixture(autouse=True)
def _small_buckets(monkeypatch):
    """A parameter is cut into several slices, and a step takes more buckets than there are slots."""
    quiet()
    torch.set_num_threads(1)
    monkeypatch.setattr(host_optimizer, "BUCKET_ELEMENTS", 1024)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepared_data(tmp_path_factory.mktemp("offload"))


def case(precision="32-true", clip=0.05, implementation="fused", **rest):
    return Case(
        LoopSettings(STEPS, 3, clip, precision, val_check_interval=7, limit_val_batches=2, seed=7),
        GPTConfig(block_size=8, vocab_size=257, n_layer=2, n_head=2, n_embd=8, dropout=0.1),
        AdamWConfig(lr=0.01, implementation=implementation),
        ScheduleConfig(warmup_steps=2, total_steps=STEPS),
        **rest,
    )


def with_memory(case, **memory):
    return replace(case, module_options={"memory": MemoryConfig(**memory)})


GRID = {
    "float32": case(),
    "float32, nothing clipped, for-loop": case(clip=None, implementation="for-loop"),
    "bfloat16, foreach": case("bf16-mixed", implementation="foreach"),
    "float16, steps skipped": case("16-mixed", scaler=OVERFLOWS),
    "float16, steps skipped, foreach, nothing clipped": case("16-mixed", None, "foreach", scaler=OVERFLOWS),
}


@pytest.mark.parametrize("name", GRID)
def test_a_run_has_the_bits_of_the_plain_one_with_each_technique_and_in_each_loop(name, data):
    k = list(GRID).index(name)
    chunks = {"loss_chunk_tokens": 5 if k % 2 else None}
    plain = LOOPS["reference"](with_memory(GRID[name], **chunks), data).entries
    assert sum("exp_avg" in entry.quantity for entry in plain) > 20  # moments are compared too
    # In the next case each technique meets the next loop: over the grid, all three.
    loops = itertools.islice(itertools.cycle(LOOPS), k, None)
    for (technique, memory), loop in zip(TECHNIQUES.items(), loops, strict=False):
        found = LOOPS[loop](with_memory(GRID[name], **chunks, **memory), data).entries
        assert compare(plain, found) is None, (loop, technique)


class LateMark(Mark):
    def __init__(self, lane, end):
        super().__init__()
        self.lane, self.end = lane, end

    def hold_computation(self):
        self.lane.run_until(self.end)

    wait = hold_computation


class LateLane:
    """Copies as late as it is allowed to: only when somebody waits for them, where a processor's are at once."""

    def __init__(self, device):
        self.queue, self.done, self.late = [], 0, 0

    def copy(self, source, target, after):
        if not isinstance(after, LateMark):  # else what it holds may still be on its way elsewhere
            target.fill_(math.nan)
        self.queue.append((source, target, after))
        return LateMark(self, len(self.queue))

    def send(self, source, target):
        return self.copy(source, target, after=Mark())

    def run_until(self, end):
        while self.done < end:
            source, target, after = self.queue[self.done]
            self.queue[self.done] = None
            self.done += 1
            self.late += 1
            after.wait()
            target.copy_(source)


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_whatever_is_copied_is_waited_for(technique, data, monkeypatch):
    """As on a GPU, where copies run beside everything else; on a CPU nothing would be too early."""
    base = case("bf16-mixed")
    plain = LOOPS["reference"](with_memory(base), data).entries
    made = functools.cache(lambda device: (LateLane(device), LateLane(device)))
    for user in (host, host_optimizer, host_weights):
        monkeypatch.setattr(user, "lanes", made)
    found = LOOPS["reference"](with_memory(base, **TECHNIQUES[technique]), data).entries
    assert compare(plain, found) is None
    assert sum(lane.late for lane in made(torch.device("cpu"))) > 100


class Keep(Observer):
    """Takes the run down after a step, as a checkpoint does."""

    def __init__(self, step):
        self.at, self.state = step, None

    def on_train_start(self, training):
        self.training = training

    def on_step_end(self, step, lr, grad_norm):
        if step == self.at:
            self.state = capture(self.training, data={})


def run_from(case, loader, until, start=None):
    module, keep = case.make_module(), Keep(until)
    scaler = torch.amp.GradScaler("cpu", **case.scaler)
    settings = replace(case.settings, max_steps=until, val_check_interval=None)
    going_on = [] if start is None else [Resume(start)]
    reference.train(module, loader, [], settings, [*going_on, *always(), keep], scaler)
    return module, keep.state


@pytest.mark.parametrize("technique", TECHNIQUES)
@pytest.mark.parametrize("onto", [True, False], ids=["from the GPU to the host", "from the host to the GPU"])
def test_a_run_is_taken_up_with_its_state_where_it_is_now_wanted(technique, onto):
    base = case("16-mixed", scaler=OVERFLOWS)
    ways = [with_memory(base), with_memory(base, **TECHNIQUES[technique])]
    before, after = ways if onto else reversed(ways)
    windows = torch.randint(0, 257, (STEPS * 3, 2, 9), generator=torch.Generator().manual_seed(1))
    batches = [(window[:, :-1], window[:, 1:]) for window in windows]

    straight, _ = run_from(before, batches, STEPS)
    _, state = run_from(before, batches[:9], 3)
    taken_up, _ = run_from(after, batches[9:], STEPS, state)
    for (name, expected), found in zip(straight.named_parameters(), taken_up.parameters(), strict=True):
        assert torch.equal(expected, found), name


def in_each_process(cases, data):
    torch.set_num_threads(1)
    quiet()
    plain, *others = (LOOPS["reference"](case, data).entries for case in cases)
    return [compare(plain, found) for found in others]


def test_two_processes_exchange_gradients_that_are_on_the_host(data):
    base = replace(case("bf16-mixed"), processes=2)
    data.position = None
    names = ("optimizer state on the host", "weights streamed")
    cases = [with_memory(base), *(with_memory(base, **TECHNIQUES[name]) for name in names)]
    assert run_together(2, in_each_process, cases, data) == [[None, None]] * 2
