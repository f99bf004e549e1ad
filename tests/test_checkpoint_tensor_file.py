import hashlib
import json
import math
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from nanogpt_lit.checkpoint.tensor_file import TensorFile, flatten, unflatten, write_tensors
from nanogpt_lit.parity.record import leaves, same

TENSORS = {
    "weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "transposed": torch.arange(12, dtype=torch.float32).reshape(3, 4).T,
    "half": torch.randn(5).bfloat16(),
    "bytes": torch.tensor([1, 2, 3], dtype=torch.uint8),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "flag": torch.tensor([True, False]),
    "empty": torch.empty(0, 4),
    "count": torch.tensor([1, 2**40]),
}


@pytest.fixture
def path(tmp_path):
    with (tmp_path / "x.safetensors").open("wb") as file:
        write_tensors(file, TENSORS, {"about": "a test"})
    return tmp_path / "x.safetensors"


def test_a_file_that_is_replaced_while_it_is_opened_is_read_as_the_new_one(path, monkeypatch):
    with (path.parent / "next").open("wb") as file:
        write_tensors(file, {"scalar": torch.tensor(1.0)}, {"about": "the next"})

    def opened_late(name, **options):
        if (path.parent / "next").exists():
            (path.parent / "next").replace(path)
        return safe_open(name, **options)

    monkeypatch.setattr("nanogpt_lit.checkpoint.tensor_file.safe_open", opened_late)
    with TensorFile(path) as file:
        assert file.metadata["about"] == "the next"
        assert file.read(file.names) == {"scalar": torch.tensor(1.0)}


def test_the_library_of_the_format_reads_it(path):
    loaded = load_file(path)
    assert loaded.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor), name
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["about"] == "a test"


def test_every_tensor_begins_at_a_multiple_of_its_element(path):
    """Readers that map the file view it in place; older ones refuse a tensor that lies between two elements."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    assert end % 8 == 0
    assert not [n for n, t in TENSORS.items() if header[n]["data_offsets"][0] % t.element_size()]


def test_the_checksums_are_those_of_sha256sum(path, tmp_path):
    with safe_open(path, framework="pt") as file:
        digests = json.loads(file.metadata()["sha256_tensors"])
    assert digests["bytes"] == hashlib.sha256(bytes([1, 2, 3])).hexdigest()


def test_our_reader_gives_the_same_tensors_and_lets_the_file_go(path):
    with TensorFile(path) as file:
        loaded = file.read(file.names)
    path.unlink()  # on Windows a file that is still mapped cannot go
    assert all(torch.equal(loaded[name], tensor) for name, tensor in TENSORS.items())


def test_a_flipped_bit_is_noticed_wherever_it_is(path):
    content = bytearray(path.read_bytes())
    for position in range(0, len(content), 3):
        content[position] ^= 1 << position % 8
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.safetensors is (damaged|not a checkpoint)"), TensorFile(path) as file:
            file.read(file.names)
        content[position] ^= 1 << position % 8


def test_every_truncation_is_noticed_and_so_is_more_at_the_end(path):
    content = path.read_bytes()
    for cut in (content[:n] for n in range(0, len(content), 7)):
        path.write_bytes(cut)
        with pytest.raises(ValueError, match=r"x\.safetensors is (damaged|not a checkpoint)"), TensorFile(path) as file:
            file.read(file.names)
    path.write_bytes(content + b"0")
    with pytest.raises(ValueError, match="damaged"), TensorFile(path) as file:
        file.read(file.names)


MEASURE = """
import resource, sys, torch
from nanogpt_lit.checkpoint.tensor_file import write_tensors
tensors = {str(n): torch.ones(5_000_000) for n in range(5)}
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with open(sys.argv[1], "wb") as file:
    write_tensors(file, tensors, {})
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss has another unit elsewhere")
def test_writing_holds_no_second_copy_of_the_tensors(tmp_path):
    answer = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "x")], capture_output=True, text=True, check=True
    )
    assert int(answer.stdout) < 10_000  # KiB; the tensors are 100 MB, one of them 20 MB
    assert (tmp_path / "x").stat().st_size > 100_000_000


# Checkpoint tree.


PLAIN = st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False)
ANY_TENSOR = st.lists(st.floats(width=32, allow_nan=False), max_size=3).map(torch.tensor)
STATES = st.recursive(
    PLAIN | ANY_TENSOR,
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
