import json
import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt_lit.checkpoint.tree import flatten, unflatten
from nanogpt_lit.parity.record import leaves, same

PLAIN = st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False)
TENSORS = st.lists(st.floats(width=32, allow_nan=False), max_size=3).map(torch.tensor)
STATES = st.recursive(
    PLAIN | TENSORS,
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.integers(), inner)
    | st.dictionaries(st.text() | st.sampled_from(["$tensor", "$tuple", "$pairs", "$number"]), inner),
    max_leaves=8,
)  # fmt: skip


def through_json(state):
    tensors = {}
    text = json.dumps(flatten(state, "state", tensors), allow_nan=False)
    return unflatten(json.loads(text), tensors)


def shape(state):
    """The state with its tensors left out: containers, keys and plain values."""
    if isinstance(state, dict):
        return {key: shape(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(map(shape, state))
    return "tensor" if isinstance(state, torch.Tensor) else (type(state), state)


@settings(max_examples=50, deadline=None)
@given(STATES)
def test_every_nested_state_comes_back_as_it_was(state):
    back = through_json(state)
    assert shape(back) == shape(state)
    tensors = [[value for _, value in leaves("", s) if isinstance(value, torch.Tensor)] for s in (state, back)]
    assert all(map(same, *tensors))


def test_numbers_that_json_lacks_come_back():
    back = through_json({"nan": math.nan, "up": math.inf, "down": -math.inf})
    assert math.isnan(back["nan"])
    assert (back["up"], back["down"]) == (math.inf, -math.inf)


def test_a_tensor_has_the_name_of_its_place():
    tensors = {}
    flatten({"state": {0: {"exp_avg": torch.zeros(1)}}, "list": [torch.ones(1)]}, "optimizer", tensors)
    assert list(tensors) == ["optimizer.state.0.exp_avg", "optimizer.list.0"]


def test_what_a_checkpoint_cannot_keep_is_refused_with_its_place():
    @dataclass
    class Thing:
        pass

    with pytest.raises(ValueError, match=r"callbacks\.Mine\.x holds a Thing"):
        flatten({"Mine": {"x": Thing()}}, "callbacks", {})
