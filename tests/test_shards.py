import hashlib
import json
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nanogpt_lit.data.shard_file import HEADER_BYTES, ShardFile
from nanogpt_lit.data.shard_writer import ShardWriter
from nanogpt_lit.data.shards import (
    MANIFEST,
    WINDOWS_PER_MAPPING,
    TokenShards,
    read_manifest,
    ready_format,
)


def write_shard(path: Path, vocab_size: int, *tokens: np.ndarray) -> ShardWriter:
    writer = ShardWriter(path, vocab_size)
    for some in tokens:
        writer.write(some)
    writer.close()
    return writer


def write_ours(folder: Path, vocab_size: int, *shards: np.ndarray) -> None:
    folder.mkdir(exist_ok=True)
    listed = []
    for n, tokens in enumerate(shards):
        writer = write_shard(folder / f"train_{n:05d}.bin", vocab_size, tokens)
        listed.append({"file": f"train_{n:05d}.bin", "tokens": len(tokens), "sha256": writer.sha256})
    splits = {"train": {"tokens": sum(map(len, shards)), "documents": 1, "shards": listed}}
    (folder / MANIFEST).write_text(json.dumps({"format": 1, "source": "test", "splits": splits}))


def write_llmc(
    path: Path, tokens: np.ndarray, magic: int = 20240520, version: int = 1, count: int | None = None
) -> None:
    """As llm.c's dev/data/data_common.py writes it."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    path.write_bytes(header.tobytes() + tokens.tobytes())


@pytest.fixture
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 50257, size=1000)


# The writer ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("vocab_size", "itemsize"), [(256, 2), (65536, 2), (65537, 4), (128256, 4)])
def test_a_shard_is_the_documented_header_and_then_little_endian_tokens(tmp_path, vocab_size, itemsize):
    tokens = np.array([0, 1, 255, vocab_size - 1])
    writer = write_shard(tmp_path / "a.bin", vocab_size, tokens[:1], tokens[1:].astype(">u4"))
    data = (tmp_path / "a.bin").read_bytes()
    assert data[:8] == b"NGLSHARD"
    assert struct.unpack("<IIQI", data[8:28]) == (1, itemsize, 4, vocab_size)
    assert data[28:1024] == bytes(996)
    assert data[1024:] == b"".join(int(t).to_bytes(itemsize, "little") for t in tokens)
    assert writer.n_tokens == 4
    assert writer.sha256 == hashlib.sha256(data[1024:]).hexdigest()
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


@pytest.mark.parametrize("wrong", [[-1], [300], [1 << 16], [(1 << 32) + 5]])
def test_the_writer_refuses_ids_outside_the_vocabulary_rather_than_wrap_them(tmp_path, wrong):
    writer = ShardWriter(tmp_path / "a.bin", 300)
    writer.write(np.array([299]))
    with pytest.raises(ValueError, match=str(wrong[0])):
        writer.write(np.array(wrong, dtype=np.int64))
    writer.close()
    assert ShardFile.open(tmp_path / "a.bin").n_tokens == 1


def test_an_unfinished_shard_is_not_taken_for_one(tmp_path):
    writer = ShardWriter(tmp_path / "a.bin", 300)
    writer.write(np.ones(100_000, dtype=int))  # more than the file's buffer
    with pytest.raises(ValueError, match="neither our header"):
        ShardFile.open(tmp_path / "a.bin")
    writer.close()
    assert ShardFile.open(tmp_path / "a.bin").n_tokens == 100_000


# Reading -------------------------------------------------------------------------------------------------------------


def test_every_window_reads_across_file_boundaries_as_one_stream(tmp_path):
    stream = np.random.default_rng(0).integers(0, 500, size=40)
    write_ours(tmp_path, 500, stream[:7], stream[7:8], stream[8:30], stream[30:])
    shards = TokenShards.open(tmp_path, "train")
    assert len(shards) == 40
    assert shards.vocab_size == 500
    for length in range(41):
        for start in range(40 - length + 1):
            window = shards.read(start, length)
            assert window.dtype == np.int64
            assert window.tolist() == stream[start : start + length].tolist()
    assert shards.read_windows([3, 0, 25], 15).tolist() == [stream[s : s + 15].tolist() for s in (3, 0, 25)]
    for start, length in ((-1, 5), (38, 3), (40, 1)):
        with pytest.raises(IndexError):
            shards.read(start, length)


def test_files_are_mapped_anew_after_many_windows_so_that_pages_do_not_pile_up(tmp_path, monkeypatch):
    mapped = []
    map_ = ShardFile.map
    monkeypatch.setattr(ShardFile, "map", lambda file: mapped.append(file.path.name) or map_(file))
    write_ours(tmp_path, 500, np.arange(100), np.arange(100, 200))
    shards = TokenShards.open(tmp_path, "train")
    for n in range(3 * WINDOWS_PER_MAPPING):
        assert shards.read(95 + n % 3, 10)[0] == 95 + n % 3
    assert mapped == ["train_00000.bin", "train_00001.bin"] * 3


def test_shards_travel_to_another_process_without_their_mappings(tmp_path):
    write_ours(tmp_path, 500, np.arange(20_000) % 500)
    shards = TokenShards.open(tmp_path, "train")
    assert shards.read(0, 400)[-1] == 399
    sent = pickle.dumps(shards)
    assert len(sent) < 1000
    assert pickle.loads(sent).read(10, 3).tolist() == [10, 11, 12]


def test_nanogpts_train_and_val_are_read(tmp_path, tokens):
    tokens[:900].astype("<u2").tofile(tmp_path / "train.bin")
    tokens[900:].astype("<u2").tofile(tmp_path / "val.bin")
    assert ready_format(tmp_path) == "nanogpt"
    train, val = (TokenShards.open(tmp_path, split) for split in ("train", "val"))
    assert train.read(0, 900).tolist() == tokens[:900].tolist()
    assert val.read(0, 100).tolist() == tokens[900:].tolist()
    assert train.vocab_size is None


@pytest.mark.parametrize(("magic", "version", "dtype"), [(20240520, 1, "<u2"), (20240801, 7, "<u4")])
def test_llmcs_files_are_read_in_the_order_of_their_names(tmp_path, tokens, magic, version, dtype):
    write_llmc(tmp_path / "fineweb_train_000002.bin", tokens[600:900].astype(dtype), magic, version)
    write_llmc(tmp_path / "fineweb_train_000001.bin", tokens[:600].astype(dtype), magic, version)
    write_llmc(tmp_path / "fineweb_val_000000.bin", tokens[900:].astype(dtype), magic, version)
    assert ready_format(tmp_path) == "llm.c"
    assert TokenShards.open(tmp_path, "train").read(0, 900).tolist() == tokens[:900].tolist()
    assert TokenShards.open(tmp_path, "val").read(0, 100).tolist() == tokens[900:].tolist()


def test_an_llmc_file_with_nanogpts_name_is_known_by_its_magic(tmp_path, tokens):
    write_llmc(tmp_path / "train.bin", tokens.astype("<u2"))
    write_llmc(tmp_path / "val.bin", tokens.astype("<u2"))
    assert ready_format(tmp_path) == "llm.c"
    assert TokenShards.open(tmp_path, "train").read(0, 1000).tolist() == tokens.tolist()


def test_a_folder_of_text_is_not_ready(tmp_path):
    (tmp_path / "train.txt").write_text("words")
    (tmp_path / "retrained.bin").write_bytes(b"\0\1\2\3")
    assert ready_format(tmp_path) is None
    assert ready_format(tmp_path / "missing") is None
    with pytest.raises(ValueError, match="no token shards"):
        TokenShards.open(tmp_path, "train")


# Refusals ------------------------------------------------------------------------------------------------------------


def refused(folder: Path, *words: str, split: str = "train") -> None:
    """Opening fails with one sentence of ValueError that has these words."""
    with pytest.raises(ValueError, match=r"\.$") as error:
        TokenShards.open(folder, split)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(("change", "word"), [(-2, "truncated"), (-1, "truncated"), (2, "appended")])
def test_a_shard_of_another_size_than_its_header_says_is_refused(tmp_path, change, word):
    write_ours(tmp_path, 500, np.arange(100))
    with (tmp_path / "train_00000.bin").open("r+b") as file:
        file.truncate(HEADER_BYTES + 200 + change)
    refused(tmp_path, "train_00000.bin", word, "100 uint16")


@pytest.mark.parametrize(
    ("offset", "value", "words"),
    [
        (0, b"NOTSHARD", ["neither our header"]),
        (8, struct.pack("<I", 2), ["version 2"]),
        (12, struct.pack("<I", 4), ["4 bytes per token"]),
        (16, struct.pack("<Q", 0), ["appended"]),
        (24, struct.pack("<I", 0), ["damaged"]),
        (24, struct.pack("<I", 70000), ["2 bytes per token", "70000"]),
    ],
)
def test_a_damaged_header_is_refused(tmp_path, offset, value, words):
    write_ours(tmp_path, 500, np.arange(100))
    with (tmp_path / "train_00000.bin").open("r+b") as file:
        file.seek(offset)
        file.write(value)
    refused(tmp_path, "train_00000.bin", *words)


def test_a_shard_cut_inside_its_header_and_an_empty_one_are_refused(tmp_path):
    write_ours(tmp_path, 500, np.arange(100))
    shard = tmp_path / "train_00000.bin"
    shard.write_bytes(shard.read_bytes()[:30])
    refused(tmp_path, "inside its header")
    shard.write_bytes(b"")
    refused(tmp_path, "is empty")
    shard.unlink()
    refused(tmp_path, "train_00000.bin", "cannot be read")


def test_a_bare_file_of_an_odd_number_of_bytes_is_refused(tmp_path):
    (tmp_path / "train.bin").write_bytes(bytes(2001))
    refused(tmp_path, "train.bin", "2,001", "odd")


@pytest.mark.parametrize("dtype", [np.uint32, np.int64])
def test_a_bare_file_of_wider_tokens_is_refused(tmp_path, tokens, dtype):
    tokens.astype(dtype).tofile(tmp_path / "train.bin")
    refused(tmp_path, "train.bin", "wider than uint16")


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (b"<!DOCTYPE html><html><body>404</body></html>" * 20, "a web page"),
        ("Bir gün səhər tezdən yola düşdük.\n".encode() * 200, "text"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n", "text"),
        (b"PK\x03\x04" + bytes(100), "a zip archive"),
        (b"\x93NUMPY" + bytes(100), "a NumPy .npy file"),
    ],
)
@pytest.mark.parametrize("file", ["train.bin", "web_train_0.bin"])
def test_files_of_another_format_are_named(tmp_path, content, name, file):
    (tmp_path / file).write_bytes(content)
    (tmp_path / file.replace("train", "val")).write_bytes(content)
    refused(tmp_path, file, name)


def test_llmc_files_that_are_truncated_or_of_another_version_are_refused(tmp_path, tokens):
    path = tmp_path / "x_train_0.bin"
    write_llmc(path, tokens.astype("<u2"), count=1001)
    refused(tmp_path, path.name, "truncated")
    write_llmc(path, tokens.astype("<u2"), count=-5)
    refused(tmp_path, path.name)
    write_llmc(path, tokens.astype("<u2"), version=2)
    refused(tmp_path, path.name, "version 2")
    write_llmc(path, tokens.astype("<u4"))
    refused(tmp_path, path.name, "appended")
    path.write_bytes(path.read_bytes()[:100])
    refused(tmp_path, path.name, "inside its header")
    write_llmc(path, tokens.astype("<u2"))
    refused(tmp_path, "*val*.bin", split="val")


@pytest.mark.parametrize(
    ("manifest", "word"),
    [
        ("{", "JSON"),
        ("[]", "no manifest"),
        ('{"format": 2}', "no manifest"),
        ('{"format": 1}', "splits"),
        ('{"format": 1, "splits": {"train": {"tokens": 3, "shards": [{"tokens": 3}]}}}', "file"),
        ('{"format": 1, "splits": {"train": {"tokens": 3, "shards": [{"file": "../x", "tokens": 3}]}}}', "../x"),
        ('{"format": 1, "splits": {"train": {"tokens": 3, "shards": [{"file": "C:x", "tokens": 3}]}}}', "C:x"),
        ('{"format": 1, "splits": {"train": {"tokens": 3, "shards": [{"file": "a\\\\x", "tokens": 3}]}}}', "plain"),
        ('{"format": 1, "splits": {"train": {"tokens": 3, "shards": [{"file": "..", "tokens": 3}]}}}', "plain"),
        ('{"format": 1, "splits": {"val": {"tokens": 0, "shards": []}}}', "'train'"),
    ],
)
def test_a_manifest_that_readers_cannot_trust_is_refused(tmp_path, manifest, word):
    (tmp_path / MANIFEST).write_text(manifest)
    refused(tmp_path, MANIFEST, word)


def test_a_missing_manifest_is_an_error_that_says_so(tmp_path):
    with pytest.raises(ValueError, match=r"manifest\.json cannot be read"):
        read_manifest(tmp_path)


def test_a_shard_of_another_preparation_is_refused(tmp_path):
    write_ours(tmp_path, 500, np.arange(100))
    write_shard(tmp_path / "train_00000.bin", 500, np.arange(99))
    refused(tmp_path, "train_00000.bin", "99", "100", "another preparation")


def test_shards_of_two_vocabularies_are_refused(tmp_path):
    write_ours(tmp_path, 500, np.arange(100), np.arange(100))
    write_shard(tmp_path / "train_00001.bin", 600, np.arange(100))
    refused(tmp_path, "500", "600")


# Vocabularies --------------------------------------------------------------------------------------------------------


def test_a_model_with_a_smaller_vocabulary_than_the_header_says_is_refused(tmp_path):
    write_ours(tmp_path, 500, np.arange(10))
    shards = TokenShards.open(tmp_path, "train")
    shards.check_vocabulary(500)
    shards.check_vocabulary(512)
    with pytest.raises(ValueError, match=r"train_00000.bin needs a vocabulary of 500, its tokenizer has 499"):
        shards.check_vocabulary(499)


def test_foreign_files_are_scanned_once_and_again_when_they_change(tmp_path, tokens, monkeypatch):
    tokens[500] = 50256
    tokens.astype("<u2").tofile(tmp_path / "train.bin")
    cache = tmp_path / "cache" / "largest.json"
    with pytest.raises(ValueError, match=r"train.bin needs a vocabulary of 50257"):
        TokenShards.open(tmp_path, "train").check_vocabulary(50256, cache)

    scans = []
    scan = ShardFile.largest_token
    monkeypatch.setattr(ShardFile, "largest_token", lambda file: scans.append(file.path.name) or scan(file))
    TokenShards.open(tmp_path, "train").check_vocabulary(50257, cache)
    assert scans == []
    tokens[:900].astype("<u2").tofile(tmp_path / "train.bin")
    TokenShards.open(tmp_path, "train").check_vocabulary(50257, cache)
    assert scans == ["train.bin"]
    cache.write_text("damaged")
    TokenShards.open(tmp_path, "train").check_vocabulary(50257, cache)
    assert scans == ["train.bin"] * 2


def test_a_scan_sees_the_last_token_of_a_file_of_several_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr("nanogpt_lit.data.shard_file.SCAN_TOKENS", 64)
    tokens = np.ones(1000, dtype="<u2")
    tokens[999] = 700
    tokens.tofile(tmp_path / "train.bin")
    assert ShardFile.open(tmp_path / "train.bin", headerless=True).largest_token() == 700


@pytest.mark.parametrize("foreign", [False, True])
def test_an_id_that_appears_after_opening_never_leaves_a_read(tmp_path, foreign):
    if foreign:
        for n in range(2):
            write_llmc(tmp_path / f"train_{n:05d}.bin", np.arange(100, dtype="<u2"))
    else:
        write_ours(tmp_path, 500, np.arange(100), np.arange(100))
    shards = TokenShards.open(tmp_path, "train")
    shards.check_vocabulary(500)
    with (tmp_path / "train_00001.bin").open("r+b") as file:
        file.seek(HEADER_BYTES + 2 * 42)
        file.write(struct.pack("<H", 500))
    assert shards.read(100, 42).tolist() == list(range(42))
    with pytest.raises(ValueError, match=r"train_00001.bin holds token id 500 at position 42"):
        shards.read_windows([0, 130, 10], 30)


def test_a_file_that_shrank_after_opening_is_an_error_not_a_crash(tmp_path):
    write_ours(tmp_path, 500, np.arange(100))
    shards = TokenShards.open(tmp_path, "train")
    with (tmp_path / "train_00000.bin").open("r+b") as file:
        file.truncate(HEADER_BYTES + 20)
    with pytest.raises(ValueError, match="truncated"):
        shards.read(0, 50)


@pytest.mark.skipif(os.name != "posix", reason="Windows lets nobody cut a file that is mapped")
def test_a_file_that_is_cut_while_it_is_read_is_an_error_not_a_crash(tmp_path):
    write_ours(tmp_path, 500, np.arange(10_000) % 500)
    program = (
        "import os, sys; from pathlib import Path; from nanogpt_lit.data.shards import TokenShards; "
        "shards = TokenShards.open(Path(sys.argv[1]), 'train'); shards.read(0, 9_000); "
        "os.truncate(shards.files[0].path, 600); shards.read(0, 9_000)"
    )
    answer = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True)
    assert answer.returncode == 1  # -7 once, of SIGBUS
    assert "is 600 bytes, but 10,000 uint16 tokens" in answer.stderr


# Size ----------------------------------------------------------------------------------------------------------------

DRAW_FROM_BOTH_ENDS = """
import sys, time
from pathlib import Path
import psutil
from nanogpt_lit.data.shards import TokenShards

started_s = time.perf_counter()
shards = TokenShards.open(Path(sys.argv[1]), "train")
for batch in range(100):
    low = shards.read_windows([1025 * (4 * batch + b) for b in range(4)], 1025)
    high = shards.read_windows([len(shards) - 1025 * (4 * batch + b) for b in range(1, 5)], 1025)
    if batch == 0:
        ends = low[0, 0], high[0, -1]
elapsed_s = time.perf_counter() - started_s
print(len(shards), *ends, psutil.Process().memory_info().rss, elapsed_s)
"""


def write_sparse(path: Path, n_tokens: int) -> None:
    """An llm.c file that claims so many tokens and takes no room; skips the test where that cannot be."""
    write_llmc(path, np.zeros(0, dtype="<u2"), count=n_tokens)
    try:
        with path.open("r+b") as file:
            file.truncate(1024 + 2 * n_tokens)
    except OSError as error:
        pytest.skip(f"this file system has no sparse files: {error}")
    if getattr(path.stat(), "st_blocks", 1 << 20) * 512 > 1 << 20:
        pytest.skip("this file system has no sparse files")


def test_a_hundred_billion_tokens_open_and_serve_both_ends_in_little_memory_and_time(tmp_path):
    pytest.importorskip("psutil")
    n_tokens, n_files = 2_000_000_000, 50  # llm.c counts in int32, so its files stay below 2**31 tokens
    for n in range(n_files):
        write_sparse(tmp_path / f"big_train_{n:02d}.bin", n_tokens)
    for n, position, token in ((0, 0, 7), (n_files - 1, n_tokens - 1, 9)):
        with (tmp_path / f"big_train_{n:02d}.bin").open("r+b") as file:
            file.seek(1024 + 2 * position)
            file.write(struct.pack("<H", token))
    command = [sys.executable, "-c", DRAW_FROM_BOTH_ENDS, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    length, first, last, rss, elapsed_s = done.stdout.split()
    assert (int(length), int(first), int(last)) == (100_000_000_000, 7, 9)
    assert int(rss) < 200 << 20  # the whole process
    assert float(elapsed_s) < 10  # the aim is 1 s; a busy machine may take longer without anything being wrong
