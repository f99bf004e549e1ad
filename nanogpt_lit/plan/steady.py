"""A trace of two steps, continued: what is reserved grows until the allocator has seen a few more."""

from collections import defaultdict, deque

from nanogpt_lit.plan.allocator import Event
from nanogpt_lit.plan.trace import MemoryTrace

MORE_MICRO_BATCHES, MORE_STEPS = 2, 3
"""Beyond those traced. The reserved peaks of GPT-2 small at 4 x 1024 and 1 x 1024 and of smaller networks have all
settled after two more steps; 40 more add nothing."""


def long_run(trace: MemoryTrace, accumulate_grad_batches: int) -> list[Event]:
    """The events of a run of several steps, from the trace of two (`step.trace_steps`)."""
    events, marks = list(trace.events), trace.marks
    end = marks["step end"]
    more = min(accumulate_grad_batches - 2, MORE_MICRO_BATCHES)
    if more > 0:
        traced = len(events)
        events = repeated(events, marks["micro-batch"], marks["optimizer"], more)
        end += len(events) - traced
    return repeated(events, marks["step"], end, MORE_STEPS)


def repeated(events: list[Event], start: int, stop: int, times: int) -> list[Event]:
    """The events, with those of events[start:stop] happening `times` times more, to new blocks.

    What the stretch releases and did not allocate (the gradients of the step before, say) is in each repetition what
    the one before left over, matched by size and by age.
    """
    stretch = events[start:stop]
    born = {event.serial: event.bytes for event in stretch if event.bytes > 0}
    released = {event.serial: -event.bytes for event in stretch if event.bytes < 0}
    left_over: dict[int, deque[int]] = defaultdict(deque)
    for serial, size in born.items():
        if serial not in released:
            left_over[size].append(serial)
    takes_place_of: dict[int, int] = {}
    for serial in sorted(released.keys() - born.keys()):
        if left_over[released[serial]]:
            takes_place_of[serial] = left_over[released[serial]].popleft()
    piles_up = [serial for serials in left_over.values() for serial in serials]

    result = events[:stop]
    names = {serial: serial for serial in born}
    fresh = 1 + max(event.serial for event in events)
    for _ in range(times):
        before = names
        names = {serial: fresh + i for i, serial in enumerate(born)}
        fresh += len(born)
        now = names | {serial: before[other] for serial, other in takes_place_of.items()}
        result += [Event(now[serial], size) for serial, size in stretch if serial in now]
        # A run does not leak: what would be left once more in each repetition is replaced by the newest.
        result += [Event(before[serial], -born[serial]) for serial in piles_up]
    return result + [Event(names.get(serial, serial), size) for serial, size in events[stop:]]
