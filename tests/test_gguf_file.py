"""GGUF files that are cut short, lie about their sizes, or hold what no network has: one sentence for each."""

import random
import re
import struct

import gguf
import numpy as np
import pytest
from small_networks import new_tokenizer, saved, trained

from nanogpt_lit.__main__ import main
from nanogpt_lit.checkpoint import gguf_format
from nanogpt_lit.checkpoint.convert import convert
from nanogpt_lit.checkpoint.gguf_file import GGUFFile, Header
from nanogpt_lit.errors import UserError
from nanogpt_lit.gpt.llama import LlamaConfig

SHAPE = {"steps": 0, "n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 16}
U32, U64 = struct.Struct("<I").pack, struct.Struct("<Q").pack
STRING, ARRAY, UINT8, UINT32, INT32, FLOAT32 = 8, 9, 0, 4, 5, 6


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The content of a file of a small network."""
    folder = tmp_path_factory.mktemp("gguf")
    tokenizer = new_tokenizer("byte")
    source = saved(folder / "x.safetensors", trained(tokenizer, kind=LlamaConfig, **SHAPE), tokenizer)
    convert(source, folder / "x.gguf")
    return (folder / "x.gguf").read_bytes()


def text(content):
    return U64(len(content)) + content.encode()


def changed(whole, **values):
    """The file with other values in its metadata, given as a kind and a value in bytes; None leaves a key out."""
    header, count = header_of(whole), struct.unpack_from("<Q", whole, 16)[0]
    data = whole[aligned(len(header)) :]
    for key, value in values.items():
        key = text(key.replace("__", "."))
        place = header.find(key)
        if place < 0:
            place, after, count = 24, 24, count + 1
        else:
            after, count = place + len(key) + 4 + 4, count - (value is None)  # what is replaced here has 32 bits
        header = header[:place] + (b"" if value is None else key + value) + header[after:]
    header = header[:16] + U64(count) + header[24:]
    return header.ljust(aligned(len(header)), b"\0") + data


def aligned(place):
    return -(-place // 32) * 32


def header_of(content):
    """The file up to the end of its last tensor's description."""
    place = content.rindex(text("output_norm.weight")) + len(text("output_norm.weight"))
    dimensions = struct.unpack_from("<I", content, place)[0]
    return content[: place + 4 + 8 * dimensions + 4 + 8]


def refused(path, content, capsys):
    path.write_bytes(content)
    assert main(["convert", str(path), str(path.with_suffix(".safetensors"))]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize("share", [0.001, 0.2, 0.5, 0.9, 0.999])
def test_one_that_is_cut_short_is_called_so(tmp_path, whole, capsys, share):
    line = refused(tmp_path / "x.gguf", whole[: int(share * len(whole))], capsys)
    assert "is a damaged GGUF file, or the beginning of one" in line


COUNTS = {
    "tensors without end": (lambda w: w[:8] + U64(2**60) + w[16:], "ends at byte"),
    "values without end": (lambda w: w[:16] + U64(2**60) + w[24:], "ends at byte"),
    "a text without end": (lambda w: w[:24] + U64(2**63) + w[32:], "ends at byte"),
    "an array of bytes without end": (
        lambda w: w[:16] + U64(1) + text("x") + U32(ARRAY) + U32(UINT8) + U64(2**62), "ends at byte",
    ),
    "an array of texts without end": (
        lambda w: w[:16] + U64(1) + text("x") + U32(ARRAY) + U32(STRING) + U64(2**62), "ends at byte",
    ),
    "arrays in arrays": (
        lambda w: w[:16] + U64(1) + text("x") + (U32(ARRAY) + U32(ARRAY) + U64(1)) * 99, "an array of values of type 9",
    ),
    "a value of no type": (lambda w: w[:16] + U64(1) + text("x") + U32(77), "a value of type 77"),
    "big-endian": (lambda w: w[:4] + w[4:8][::-1] + w[8:], "in version 50331648; 2 and 3"),
    "no alignment": (lambda w: changed(w, general__alignment=U32(UINT32) + U32(0)), "general.alignment=0"),
    "one of several": (
        lambda w: changed(w, split__count=U32(UINT32) + U32(3)), "one of 3 parts of a model; `llama-gguf-split",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", COUNTS)
def test_what_a_header_says_is_compared_with_the_file(tmp_path, whole, capsys, name):
    change, said = COUNTS[name]
    assert re.search(said, refused(tmp_path / "x.gguf", change(whole), capsys))


def written(path, tensors, architecture="llama", **offsets):
    """A file with these tensors alone; their offsets may be moved."""
    writer = gguf.GGUFWriter(path, architecture)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    content = path.read_bytes()
    for name, change in offsets.items():
        place = content.index(text(name)) + len(text(name)) + 4 + 8 + 4  # after its dimensions and type
        content = content[:place] + U64(change) + content[place + 8 :]
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("offsets", "said"),
    [
        ({"b": 2**40}, "b ends at byte 1,099,511,"),
        ({"b": 2**64 - 32}, "b ends at byte"),
        ({"b": 0}, "two tensors lie in one place"),
    ],
)
def test_tensors_that_lie_outside_the_file_or_in_each_other_are_refused(tmp_path, offsets, said):
    written(tmp_path / "x.gguf", {"a": np.ones(64, np.float32), "b": np.ones(64, np.float32)}, **offsets)
    with pytest.raises(UserError, match=said):
        GGUFFile(tmp_path / "x.gguf")


VALUES = {
    "no layers": ({"llama__block_count": U32(UINT32) + U32(0)}, "llama.block_count=0, which is no size"),
    "layers without end": ({"llama__block_count": U32(UINT32) + U32(2**30)}, "n_layer=1073741824 and holds"),
    "heads of keys without end": (
        {"llama__attention__head_count_kv": U32(UINT32) + U32(2**30 + 1)}, "n_kv_head=1073741825 does not divide",
    ),
    "a block without end": ({"llama__context_length": U32(UINT32) + U32(2**30)}, "for 1,073,741,824 tokens at a time"),
    "layers in words": (
        {"llama__block_count": U32(STRING) + text("many")}, "block_count='many', which is no size",
    ),
    "not said": ({"llama__block_count": None}, "lacks llama.block_count, which says the network's shape"),
    "other heads": ({"llama__attention__head_count": U32(UINT32) + U32(4)}, "of shape|rope.dimension_count"),
    "other channels": ({"llama__embedding_length": U32(UINT32) + U32(16)}, "of shape"),
    "part of each head": (
        {"llama__rope__dimension_count": U32(UINT32) + U32(2)}, "rope.dimension_count=2, and this network",
    ),
    "an end that is none": ({"tokenizer__ggml__eos_token_id": U32(UINT32) + U32(9999)}, "a tokenizer that is not as"),
}  # fmt: skip


@pytest.mark.parametrize("name", VALUES)
def test_a_shape_that_is_none_is_refused(tmp_path, whole, capsys, name):
    values, said = VALUES[name]
    assert re.search(said, refused(tmp_path / "x.gguf", changed(whole, **values), capsys))


def test_whatever_is_changed_in_a_header_is_read_or_refused(tmp_path, whole):
    """Each way out of the reader is a UserError; any other exception is a defect and fails the test."""
    draw, path, outcomes = random.Random(1), tmp_path / "x.gguf", set()
    end = len(header_of(whole))
    for _ in range(200):
        content = bytearray(whole)
        for _ in range(draw.randrange(1, 4)):
            place = draw.randrange(4, end)
            content[place] = draw.choice([0, 1, 255, content[place] ^ (1 << draw.randrange(8))])
        path.write_bytes(content)
        try:
            gguf_format.read(path)
            outcomes.add("read")
        except UserError:
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


OTHERS = {
    "an array of numbers": U32(ARRAY) + U32(UINT32) + U64(2) + U32(1) + U32(2),
    "an array of texts": U32(ARRAY) + U32(STRING) + U64(2) + text("a") + text("b"),
    "a text": U32(STRING) + text("words"),
    "below zero": U32(INT32) + struct.pack("<i", -1),
    "no number": U32(FLOAT32) + struct.pack("<f", float("nan")),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_value_of_another_type_is_refused_or_does_not_matter(tmp_path, whole, other):
    outcomes = set()
    (tmp_path / "whole.gguf").write_bytes(whole)
    for key, value in GGUFFile(tmp_path / "whole.gguf").metadata.items():
        place = whole.index(text(key)) + len(text(key))
        start, header = Header(whole), header_of(whole)
        start.place = place
        assert start.value(start.number("<u4")) == value
        header = header[:place] + OTHERS[other] + header[start.place :]
        content = header.ljust(aligned(len(header)), b"\0") + whole[aligned(len(header_of(whole))) :]
        (tmp_path / "x.gguf").write_bytes(content)
        try:
            gguf_format.read(tmp_path / "x.gguf")
            outcomes.add("read")
        except UserError:
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "F16", "BF16"])
def test_each_type_is_read_as_the_package_gguf_reads_it(tmp_path, kind):
    numbers = np.random.default_rng(1).normal(size=(4, 64)).astype(np.float32)
    as_kind = gguf.GGMLQuantizationType[kind]
    content = gguf.quants.quantize(numbers, as_kind)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("x", content, raw_dtype=as_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GGUFFile(tmp_path / "x.gguf")
    assert np.array_equal(file.read()["x"].numpy(), gguf.quants.dequantize(content, as_kind))
    assert (file.rounded is None) == (kind in ("F16", "BF16"))
    assert np.abs(file.read()["x"].numpy() - numbers).max() < 0.3
