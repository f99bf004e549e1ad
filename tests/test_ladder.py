import itertools

import pytest
import yaml

from nanogpt_lit.memory.ladder import Rung, at_least, ladder, next_technique
from nanogpt_lit.memory.techniques import MemoryConfig

PLAIN = Rung("mine", MemoryConfig(), batch_size=4, accumulate_grad_batches=4)


def rungs(own=PLAIN, block_size=1024, casts_weights=True):
    return list(ladder(own, block_size, casts_weights))


def test_each_rung_keeps_the_techniques_of_those_above():
    fields = [{k: v for k, v in vars(r.memory).items() if v != vars(MemoryConfig())[k]} for r in rungs()]
    for less, more in itertools.pairwise(fields):
        assert less.keys() - {"recompute_every"} <= more.keys()


def test_the_ladder_begins_with_nothing_and_ends_with_single_sequences():
    assert rungs()[0].memory == MemoryConfig()
    assert [(r.batch_size, r.accumulate_grad_batches) for r in rungs()][-3:] == [(4, 4), (2, 8), (1, 16)]


def test_tokens_per_step_are_the_same_on_every_rung():
    assert {rung.batch_size * rung.accumulate_grad_batches for rung in rungs()} == {16}


def test_ones_own_setting_is_on_the_ladder_once():
    assert sum(PLAIN.same_training(rung) for rung in rungs()) == 1
    own = Rung("mine", MemoryConfig(loss_chunk_tokens=100, recompute="full"), 4, 4)
    assert rungs(own)[0] == own
    assert sum(own.same_training(rung) for rung in rungs(own)) == 1


def test_weights_that_are_not_cast_cannot_be_recast():
    assert not any(rung.memory.recast_weights for rung in rungs(casts_weights=False))


@pytest.mark.parametrize("own", [PLAIN, Rung("mine", MemoryConfig(recompute="selective", recompute_every=3), 4, 4)])
def test_the_lines_of_a_rung_turn_ones_yaml_into_it(own):
    for rung in rungs(own):
        changes = yaml.safe_load("\n".join(rung.yaml(own))) or {}
        memory = MemoryConfig(**{**vars(own.memory), **changes.get("model", {}).get("memory", {})})
        assert memory == rung.memory
        assert changes.get("data", {}).get("batch_size", own.batch_size) == rung.batch_size
        accumulate = changes.get("trainer", {}).get("accumulate_grad_batches", own.accumulate_grad_batches)
        assert accumulate == rung.accumulate_grad_batches


def test_only_the_order_of_sums_and_the_processor_change_bits():
    plain, *others = rungs()
    assert plain.same_bits(plain)
    for rung in others:
        exact = rung.memory.loss_chunk_tokens is None and rung.batch_size == 4 and rung.memory.weights == "device"
        assert rung.same_bits(plain) == exact


def test_a_chunk_is_smaller_than_the_batch():
    assert max(rung.memory.loss_chunk_tokens or 0 for rung in rungs(block_size=64)) == 64


RECOMPUTE = [("none", 1), ("selective", 1), ("selective", 2), ("full", 1), ("full", 2), ("full", 5)]
SETTINGS = [
    MemoryConfig(chunk, recast, recompute, every, inputs, state, weights)
    for chunk, recast, (recompute, every), inputs, state, weights in itertools.product(
        (None, 99), (False, True), RECOMPUTE, ("device", "host"), ("device", "host"), ("device", "host", "streamed")
    )
    if inputs == "device" or recompute == "full"
]


@pytest.mark.parametrize("idle", [(), ("recast_weights",), ("optimizer_state", "weights")], ids=str)
def test_from_any_setting_the_ladder_goes_up_technique_by_technique_to_its_end(idle):
    for memory in SETTINGS:
        names = []
        while (found := next_technique(memory, idle)) is not None:
            name, more = found
            assert at_least(more, memory), name
            assert not at_least(memory, more), name
            assert all(getattr(more, field) == getattr(memory, field) for field in idle)
            names.append(name)
            memory = more
        assert len(names) == len(set(names))
        assert (memory.recompute, memory.recompute_every, memory.block_inputs) == ("full", 1, "host")
        assert memory.weights == "streamed" or "weights" in idle
        assert memory.loss_chunk_tokens is not None
