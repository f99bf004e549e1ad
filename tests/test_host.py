"""Page-locks that a system refuses, sources that are kept until they are copied, and what a plan knows of both."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from nanogpt_lit.gpt.gpt2 import GPTConfig
from nanogpt_lit.memory import host
from nanogpt_lit.memory.host import HELD, Lane, Mark, empty_on_host, page_lock
from nanogpt_lit.memory.techniques import MemoryConfig
from nanogpt_lit.module import LitNanoGPT
from nanogpt_lit.plan.step import StepShape, trace_steps

CUDA = torch.device("cuda")
SHARES_A_PAGE, NO_MORE = 712, 2


class Runtime:
    """Of CUDA. Keeps an error for the next kernel, as the real one does."""

    def __init__(self, answers, monkeypatch):
        self.answers, self.asked, self.kept = list(answers), 0, None
        monkeypatch.setattr(torch.cuda, "cudart", lambda: self)
        monkeypatch.setattr(torch, "zeros", self.launch)
        monkeypatch.setattr(host, "_refusals", [])

    def cudaHostRegister(self, address, size, flags):  # noqa: N802 - CUDA's name
        self.asked += 1
        answer = self.answers.pop(0)
        self.kept = answer or self.kept
        return answer

    def cudaHostUnregister(self, address):  # noqa: N802
        return 0

    def cudaGetErrorString(self, error):  # noqa: N802
        return "out of memory"

    def launch(self, *shape, device):
        kept, self.kept = self.kept, None
        if kept:
            raise torch.AcceleratorError("CUDA error: out of memory")


def test_a_refused_page_lock_leaves_no_error_to_the_next_kernel_and_is_said_once(monkeypatch, capsys):
    runtime = Runtime([0, NO_MORE], monkeypatch)
    for _ in range(4):
        page_lock(torch.ones(8), CUDA)
        assert runtime.kept is None
    assert runtime.asked == 2  # then it is left alone
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "the system page-locks no more host memory (out of memory); what is left is copied more slowly"
    )


def test_a_tensor_that_shares_a_page_is_left_as_it_is_and_the_next_one_is_locked(monkeypatch, capsys):
    runtime = Runtime([SHARES_A_PAGE, 0], monkeypatch)
    for _ in range(2):
        page_lock(torch.ones(8), CUDA)
    assert (runtime.asked, runtime.kept) == (2, None)
    assert capsys.readouterr().err == ""


def test_rooms_are_pageable_once_the_system_has_refused_one(monkeypatch, capsys):
    asked, empty_like = [], torch.empty_like

    def refuse(like, pin_memory=False, **options):
        if pin_memory:
            asked.append(like)
            raise torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be ...")
        return empty_like(torch.ones(4), **options)

    monkeypatch.setattr(torch, "empty_like", refuse)
    monkeypatch.setattr(host, "_refusals", [])
    of_the_device = SimpleNamespace(is_cuda=True)
    rooms = [empty_on_host(of_the_device) for _ in range(3)]
    assert [room.device.type for room in rooms] == ["cpu"] * 3
    assert len(asked) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_what_stays_on_the_host_is_not_locked(monkeypatch):
    runtime = Runtime([], monkeypatch)
    page_lock(torch.ones(8), torch.device("cpu"))
    assert runtime.asked == 0


class Event:
    def __init__(self):
        self.waits = 0

    def synchronize(self):
        self.waits += 1


class Stream:
    def __init__(self):
        self.events = []

    def wait_event(self, event): ...

    def record_event(self):
        self.events.append(Event())
        return self.events[-1]


def test_of_what_leaves_the_device_the_last_are_kept_and_the_copy_of_an_older_one_is_over(monkeypatch):
    lane = Lane(torch.device("cpu"))
    lane._stream = stream = Stream()
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(Mark, "now", classmethod(lambda cls, device: Mark()))
    for sent in range(1, 7):
        source = torch.full((3,), float(sent))
        lane.send(source, torch.empty(3))
        assert [kept[0].item() for kept, _ in lane._held] == [
            float(n) for n in range(max(1, sent - HELD + 1), sent + 1)
        ]
        assert [event.waits for event in stream.events] == [1] * max(0, sent - HELD) + [0] * min(HELD, sent)


def test_where_copies_are_made_at_once_nothing_is_kept():
    lane, target = Lane(torch.device("cpu")), torch.empty(3)
    lane.send(torch.ones(3), target)
    assert target.sum() == 3
    assert not lane._held


GPT = GPTConfig(block_size=64, vocab_size=512, n_layer=4, n_head=4, n_embd=64)
SHAPE = StepShape(2, 64, 512, accumulate_grad_batches=2, precision="bf16-mixed")


def traced(shape=SHAPE, **memory):
    return trace_steps(lambda: LitNanoGPT(GPT, memory=MemoryConfig(**memory)), shape)


def count():
    return LitNanoGPT(GPT).gpt.parameter_count(non_embedding=False)


@pytest.mark.parametrize("weights", ["device", "host"])
def test_the_plan_counts_the_moments_as_page_locked_where_they_travel(weights):
    trace = traced(optimizer_state="host", weights=weights)
    rooms = 4 * 2**20 if weights == "host" else 0
    if weights == "device":
        assert trace.page_locked_peak_bytes == 8 * count()
    else:  # the optimizer is at home; gradients and copies need room for a moment
        assert 0 < trace.page_locked_peak_bytes < rooms


def test_the_plan_counts_what_is_streamed_in_the_dtype_in_which_it_travels():
    matrices = sum(p.numel() for name, p in LitNanoGPT(GPT).gpt.transformer.h.named_parameters() if p.dim() == 2)
    head = 512 * 64
    in_16_bits = traced(weights="streamed").page_locked_peak_bytes
    in_32_bits = traced(StepShape(2, 64, 512, accumulate_grad_batches=2), weights="streamed").page_locked_peak_bytes
    assert 2 * (matrices + head) < in_16_bits < 2 * (matrices + head) + 2**19
    assert 4 * (matrices + head) < in_32_bits


def test_the_plan_counts_the_inputs_of_blocks_as_page_locked():
    one = 2 * 64 * 64 * 4
    trace = traced(recompute="full", block_inputs="host")
    assert trace.page_locked_peak_bytes == 4 * one  # a power of two


def test_nothing_is_page_locked_where_nothing_leaves_the_device():
    assert traced().page_locked_peak_bytes == 0


def test_positions_are_made_where_they_are_looked_up():
    sent = []

    def watch(func, args, kwargs, result):
        if func is torch.ops.aten._to_copy.default and args[0].dtype == torch.int64:
            sent.append((args[0].shape, args[0].device.type, result.device.type))

    class Watch:
        weight, phase = 1, ""
        add = staticmethod(watch)

    trace_steps(lambda: LitNanoGPT(GPT, memory=MemoryConfig(weights="host")), SHAPE, roofline=Watch())
    assert sent == [((2, 64), "cpu", "meta")] * 2  # the tokens of two micro-batches, and no positions
