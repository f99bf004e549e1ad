"""Prepared folders against a naive loop over the same documents, and against kills at every step."""

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

if os.name == "posix":
    import termios

from nanogpt_lit.data import encoder, prepare, shard_writer
from nanogpt_lit.data.encoder import Split
from nanogpt_lit.data.prepare import PrepareConfig, stale_reason, summary, training_text
from nanogpt_lit.data.shards import TokenShards, read_manifest
from nanogpt_lit.data.tokenizer import EOT, ByteTokenizer, GPT2Tokenizer
from nanogpt_lit.data.tokenizer_files import read_tokenizer_files, tokenizer_from_files


def run(config: PrepareConfig, folder: Path) -> dict[str, Any]:
    return prepare.prepare(config, folder, show_progress=False)


def tokens_of(folder: Path, side: str) -> np.ndarray:
    shards = TokenShards.open(folder, side)
    return shards.read(0, len(shards))


def hashes(manifest: dict[str, Any]) -> list[str]:
    return [shard["sha256"] for side in ("train", "val") for shard in manifest["splits"][side]["shards"]]


def make_documents(n: int) -> list[str]:
    rng = random.Random(1)
    words = ["the", "quick", "şəki", "日本", "fox\n", "def", "", "x1", "'s", "🙂", "<|endoftext|>", "jumps\n\n"]
    return ["".join(f"{rng.choice(words)} " for _ in range(rng.randrange(1, 300))) for _ in range(n)]


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in make_documents(200)), encoding="utf-8")
    return path


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("encoder", "documents"):
        monkeypatch.setattr(f"nanogpt_lit.data.{module}.PIECE_CHARS", 500)
    monkeypatch.setattr(encoder, "available_cpus", lambda: 4)
    monkeypatch.setattr(shard_writer, "SHARD_TOKENS", 3001)


def test_shards_are_those_of_a_naive_loop_over_the_documents(tmp_path: Path, jsonl: Path, small_batches: None) -> None:
    folder = tmp_path / "shards"
    config = PrepareConfig(str(jsonl), "gpt2", val_fraction=0.1)
    manifest = run(config, folder)
    gpt2 = GPT2Tokenizer()
    split = Split.plan(config.open_source(), 0.1)
    expected: dict[str, list[int]] = {"train": [], "val": []}
    for document, text in zip(config.open_source().documents(), make_documents(200), strict=True):
        [(side, _)] = split.parts(document)
        expected[side] += [50256, *gpt2._encoding.encode_ordinary(text)]
    for side in ("train", "val"):
        tokens = tokens_of(folder, side)
        assert tokens.tolist() == expected[side]
        assert manifest["splits"][side]["tokens"] == len(expected[side])
        assert [shard["tokens"] for shard in manifest["splits"][side]["shards"][:-1]] == [3001] * (len(tokens) // 3001)


def test_decoded_shards_are_the_documents_behind_end_of_text(tmp_path: Path, small_batches: None) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    documents = [text.replace(EOT, "") for text in make_documents(30)]
    for i, text in enumerate(documents):
        (corpus / f"{i:02}.txt").write_bytes(text.encode())
    for tokenizer in ("byte", "char", "gpt2", "bpe:300"):
        folder = tmp_path / tokenizer.replace(":", "-")
        run(PrepareConfig(str(corpus), tokenizer, val_fraction=0.1), folder)
        restored = tokenizer_from_files(read_tokenizer_files(folder))
        sides = [restored.decode(tokens_of(folder, side)).split(EOT) for side in ("train", "val")]
        assert [side[0] for side in sides] == ["", ""]
        assert sorted(sides[0][1:] + sides[1][1:]) == sorted(documents)
        assert sides[0][1:] == [text for text in documents if text in sides[0]]  # in order


def test_one_file_is_cut_like_nanogpts_shakespeare(tmp_path: Path) -> None:
    path = tmp_path / "input.txt"
    text = "".join(f"{i:06} to be or not to be\n" for i in range(30_000))
    path.write_text(text, encoding="utf-8")
    manifest = run(PrepareConfig(str(path), "char", val_fraction=0.1), tmp_path / "shards")
    tokenizer = tokenizer_from_files(read_tokenizer_files(tmp_path / "shards"))
    head, tail = (tokenizer.decode(tokens_of(tmp_path / "shards", side)) for side in ("train", "val"))
    assert head.removeprefix(EOT) + tail.removeprefix(EOT) == text
    assert tail.startswith(f"{EOT}027001")
    assert [manifest["splits"][side]["documents"] for side in ("train", "val")] == [1, 1]


def test_the_manifest_says_what_the_shards_are(tmp_path: Path, jsonl: Path) -> None:
    folder = tmp_path / "shards"
    config = PrepareConfig(str(jsonl), "byte", val_fraction=0.1)
    manifest = run(config, folder)
    assert manifest == read_manifest(folder) == run(config, folder)
    assert manifest["request"] == config.request(config.open_source())
    assert manifest["source"] == str(jsonl)
    assert manifest["tokenizer"] == {"name": "byte", "vocab_size": 257, "sha256": ByteTokenizer().sha256}
    assert manifest["dtype"] == "uint16"
    splits = manifest["splits"].values()
    assert sum(split["documents"] for split in splits) == 200
    assert sum(split["bytes"] for split in splits) == sum(len(text.encode()) for text in make_documents(200))
    assert sorted(path.name for path in folder.iterdir()) == [
        "manifest.json",
        "tokenizer.json",
        "train_000000.bin",
        "val_000000.bin",
    ]
    assert "(byte, 200 documents)" in summary(manifest, folder)


@pytest.mark.parametrize("tokenizer", ["gpt2", "bpe:300"])
def test_the_same_input_twice_gives_identical_shards(tmp_path: Path, jsonl: Path, tokenizer: str) -> None:
    config = PrepareConfig(str(jsonl), tokenizer, val_fraction=0.1)
    assert hashes(run(config, tmp_path / "a")) == hashes(run(config, tmp_path / "b"))


@pytest.mark.skipif(os.name != "posix", reason="pseudo-terminals are POSIX's")
def test_learning_a_vocabulary_shows_our_bar_on_a_terminal_and_none_that_counts_to_0(
    tmp_path: Path, jsonl: Path
) -> None:
    program = (
        "from pathlib import Path\nfrom nanogpt_lit.data.prepare import PrepareConfig, prepare\n"
        f"prepare(PrepareConfig({str(jsonl)!r}, 'bpe:300', val_fraction=0.1), Path({str(tmp_path / 'shards')!r}))"
    )
    leader, terminal = os.openpty()
    termios.tcsetwinsize(terminal, (24, 80))
    process = subprocess.Popen([sys.executable, "-c", program], stderr=terminal)
    os.close(terminal)
    (limit := threading.Timer(60, process.kill)).start()
    shown = b""
    with contextlib.suppress(OSError):  # the terminal ends with the process
        while piece := os.read(leader, 4096):
            shown += piece
    limit.cancel()
    os.close(leader)
    assert process.wait(timeout=60) == 0
    assert "learn bpe:300" in shown.decode()
    assert "0 / 0" not in " ".join(shown.decode().split())
    assert "Compute merges" not in shown.decode()


def test_a_change_of_anything_that_decides_the_content_is_noticed(tmp_path: Path, jsonl: Path) -> None:
    folder = tmp_path / "shards"
    config = PrepareConfig(str(jsonl), "byte", val_fraction=0.1)
    assert stale_reason(config, folder) == f"{folder} holds no prepared shards"
    run(config, folder)
    assert stale_reason(config, folder) is None
    assert "another tokenizer: byte, now gpt2" in str(
        stale_reason(PrepareConfig(str(jsonl), "gpt2", val_fraction=0.1), folder)
    )
    assert "another val_fraction" in str(stale_reason(PrepareConfig(str(jsonl), "byte", val_fraction=0.2), folder))
    with jsonl.open("a", encoding="utf-8") as file:
        file.write('\n{"text": "more"}')
    assert "another source" in str(stale_reason(config, folder))
    before = read_manifest(folder)
    assert run(config, folder) != before  # made again over the old one
    assert stale_reason(config, folder) is None
    assert [path.name for path in tmp_path.iterdir() if "shards" in path.name and path != folder] == [".shards.lock"]


@pytest.mark.parametrize("name", ["train_000000.bin", "val_000000.bin", "tokenizer.json", "manifest.json"])
def test_a_damaged_or_missing_file_is_noticed_and_made_again(tmp_path: Path, jsonl: Path, name: str) -> None:
    folder = tmp_path / "shards"
    config = PrepareConfig(str(jsonl), "byte", val_fraction=0.1)
    first = run(config, folder)
    with (folder / name).open("r+b") as file:
        file.truncate(40)
    assert stale_reason(config, folder) is not None
    assert run(config, folder) == first
    if name != "manifest.json":  # without it the folder could be anybody's
        (folder / name).unlink()
        assert stale_reason(config, folder) is not None
        assert run(config, folder) == first


def test_what_is_not_ours_is_never_replaced(tmp_path: Path, jsonl: Path) -> None:
    folder = tmp_path / "shards"
    config = PrepareConfig(str(jsonl), "byte", val_fraction=0.1)
    folder.mkdir()
    run(config, folder)  # into an empty folder
    (folder / "notes.txt").write_text("mine", encoding="utf-8")
    other = PrepareConfig(str(jsonl), "char", val_fraction=0.1)
    with pytest.raises(ValueError, match=r"files that this program did not write \(notes\.txt\)"):
        run(other, folder)
    assert stale_reason(config, folder) is None
    nanogpt = tmp_path / "nanogpt"
    nanogpt.mkdir()
    (nanogpt / "train_0.bin").write_bytes(b"12")  # a name like ours, no manifest
    with pytest.raises(ValueError, match="did not write"):
        run(config, nanogpt)
    with pytest.raises(ValueError, match=r"data\.shards_dir=.*train_0\.bin is no folder"):
        run(config, nanogpt / "train_0.bin")


def test_shards_are_not_written_into_their_own_source(tmp_path: Path, jsonl: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.shards_dir=.* lies inside data\.source"):
        run(PrepareConfig(str(tmp_path), "byte"), tmp_path / "shards")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "holds no text"),
        (b"\n\n", "holds no text"),
        (b"a" * 600_000 + b"\xff", r"not UTF-8 text \(byte 600,000\)"),
        (b"a", "nothing is left for train"),
        (None, "does not exist"),
    ],
)
def test_bad_input_is_refused_and_nothing_is_left(tmp_path: Path, data: bytes | None, said: str) -> None:
    path = tmp_path / ("a.jsonl" if data == b"\n\n" else "a.txt")
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(ValueError, match=said):
        run(PrepareConfig(str(path), "byte", val_fraction=0.1), tmp_path / "shards")
    assert {found.name for found in tmp_path.iterdir()} <= {path.name, ".shards.lock"}


@pytest.mark.skipif(os.name == "nt", reason="links take a privilege there")
def test_a_folder_that_cannot_be_made_is_refused_by_its_key(tmp_path: Path, jsonl: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name, said in (("loop", "loop: Too many levels of symbolic links"), ("text.jsonl/x", "Not a directory")):
        (tmp_path / "text.jsonl").touch()
        with pytest.raises(ValueError, match=rf"data\.shards_dir=.*{said}"):
            run(PrepareConfig(str(jsonl), "byte"), tmp_path / name)


def test_a_wrong_configuration_is_refused_at_construction() -> None:
    with pytest.raises(ValueError, match=r"data\.tokenizer=morse"):
        PrepareConfig(tokenizer="morse")
    with pytest.raises(ValueError, match=r"data\.val_fraction=0\.9"):
        PrepareConfig(val_fraction=0.9)


def test_a_full_disk_is_noticed_before_and_during_writing(
    tmp_path: Path, jsonl: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = PrepareConfig(str(jsonl), "byte", val_fraction=0.1)
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=jsonl.stat().st_size))  # 2 bytes per byte
        with pytest.raises(ValueError, match=r"data\.shards_dir=.*shards needs about .* GB free"):
            run(config, tmp_path / "shards")
    with monkeypatch.context() as patch:

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr(shard_writer.ShardWriter, "write", full)
        with pytest.raises(ValueError, match=r"data\.shards_dir=.*cannot be written \(No space left on device\)"):
            run(config, tmp_path / "shards")
    assert {path.name for path in tmp_path.iterdir()} == {jsonl.name, ".shards.lock"}


def test_a_vocabulary_is_trained_on_a_bounded_even_sample_of_the_train_side(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    texts = [f"{i:05} " + "x" * 94 for i in range(5000)]
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
    config = PrepareConfig(str(path), val_fraction=0.1)
    split = Split.plan(config.open_source(), 0.1)
    sample = list(training_text(config.open_source(), split, budget=50_000))
    # The file is 12 bytes per line larger than its text, and a tenth of it is held out: somewhat less than asked for.
    assert 35_000 < sum(map(len, sample)) <= 50_000
    numbers = [int(text[:5]) for text in sample]
    assert np.histogram(numbers, bins=10, range=(0, 5000))[0].min() > 25
    held_out = {"".join(p) for d in config.open_source().documents() for side, p in split.parts(d) if side == "val"}
    assert not held_out & set(sample)


CHILD = """
import os, sys
from pathlib import Path
from nanogpt_lit.data import prepare, shard_writer
shard_writer.SHARD_TOKENS = 50_000
source, tokenizer, folder, die_at = sys.argv[1:]
changes = 0

def watch(event, args):
    global changes
    opens = event == "open" and "shards" in str(args[0]) and "w" in str(args[1])
    if opens or event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir"):
        changes += 1
        if changes == int(die_at):
            os._exit(9)  # as abrupt as kill -9: no handler, no cleanup, nothing flushed

write = prepare._prepare
prepare._prepare = lambda *args: (print("WROTE", flush=True), write(*args))
sys.addaudithook(watch)
prepare.prepare(prepare.PrepareConfig(source, tokenizer, val_fraction=0.1), Path(folder), show_progress=False)
print(changes)
"""


def start(source: Path, tokenizer: str, folder: Path, die_at: int = 0) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(CHILD), str(source), tokenizer, str(folder), str(die_at)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def check_after_kill(source: Path, folder: Path, byte_manifest: dict[str, Any], char_manifest: dict[str, Any]) -> None:
    """Whatever moment the change from `byte` to `char` was killed at."""
    old, new = (PrepareConfig(str(source), kind, val_fraction=0.1) for kind in ("byte", "char"))
    where = folder if folder.exists() else folder.with_name("shards.old")
    if stale_reason(new, where) is None:
        assert read_manifest(where) == char_manifest
    else:
        assert stale_reason(old, where) is None  # the previous one is whole, here or one rename away
        assert read_manifest(where) == byte_manifest
    assert run(new, folder) == read_manifest(folder) == char_manifest
    assert stale_reason(new, folder) is None
    assert sorted(path.name for path in folder.parent.iterdir()) == [".shards.lock", "shards"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Any], dict[str, Any], int]:
    """A source, a folder prepared with `byte`, the manifests of byte and char, and the steps of changing to char."""
    root = tmp_path_factory.mktemp("finished")
    source = root / "a.jsonl"
    source.write_text("\n".join(json.dumps({"text": text}) for text in make_documents(200)), encoding="utf-8")
    (root / "work").mkdir()
    start(source, "byte", root / "work" / "shards").wait()
    byte_manifest = read_manifest(root / "work" / "shards")
    shutil.copytree(root / "work", root / "byte")
    n_changes = int(start(source, "char", root / "work" / "shards").communicate()[0].split()[-1])
    return source, root / "byte", byte_manifest, read_manifest(root / "work" / "shards"), n_changes


def test_death_at_any_change_of_the_disk_leaves_the_old_shards_or_the_new(
    tmp_path: Path,
    finished: tuple[Path, Path, dict[str, Any], dict[str, Any], int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shard_writer, "SHARD_TOKENS", 50_000)  # as in CHILD
    source, byte_folder, byte_manifest, char_manifest, n_changes = finished
    assert n_changes > 10

    def die(step: int) -> None:
        shutil.copytree(byte_folder, tmp_path / str(step))
        folder = tmp_path / str(step) / "shards"
        assert start(source, "char", folder, die_at=step).wait() == 9
        check_after_kill(source, folder, byte_manifest, char_manifest)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(die, range(1, n_changes + 1)))


def test_a_kill_at_any_time_leaves_the_old_shards_or_the_new(
    tmp_path: Path,
    finished: tuple[Path, Path, dict[str, Any], dict[str, Any], int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shard_writer, "SHARD_TOKENS", 50_000)  # as in CHILD
    source, byte_folder, byte_manifest, char_manifest, _ = finished
    for i, delay_s in enumerate((0.0, 0.005, 0.02)):
        shutil.copytree(byte_folder, tmp_path / str(i))
        child = start(source, "char", tmp_path / str(i) / "shards")
        assert child.stdout is not None
        assert child.stdout.readline() == "WROTE\n"  # it is about to write
        time.sleep(delay_s)
        child.kill()
        child.wait()
        check_after_kill(source, tmp_path / str(i) / "shards", byte_manifest, char_manifest)


def test_shards_left_between_the_two_renames_come_back(tmp_path: Path, jsonl: Path) -> None:
    config = PrepareConfig(str(jsonl), "byte", val_fraction=0.1)
    run(config, tmp_path / "shards")
    written_ns = (tmp_path / "shards" / "train_000000.bin").stat().st_mtime_ns
    (tmp_path / "shards").rename(tmp_path / "shards.old")
    (tmp_path / "shards.partial").mkdir()
    run(config, tmp_path / "shards")
    assert (tmp_path / "shards" / "train_000000.bin").stat().st_mtime_ns == written_ns
    assert {path.name for path in tmp_path.iterdir()} == {jsonl.name, ".shards.lock", "shards"}


def test_two_processes_prepare_once(tmp_path: Path, jsonl: Path) -> None:
    folder = tmp_path / "shards"
    children = [start(jsonl, "gpt2", folder) for _ in range(2)]
    output = [child.communicate()[0] for child in children]
    assert [child.returncode for child in children] == [0, 0]
    assert sum(text.count("WROTE") for text in output) == 1
    assert stale_reason(PrepareConfig(str(jsonl), "gpt2", val_fraction=0.1), folder) is None


@pytest.mark.skipif(sys.platform == "win32", reason="ru_maxrss is POSIX")
def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    line = b"the quick brown fox jumps over the lazy dog and does not stop there\n"
    with path.open("wb") as file:
        for _ in range(64):
            file.write(line * ((1 << 20) // len(line)))
    code = """
import resource, sys
from pathlib import Path
from nanogpt_lit.data.prepare import PrepareConfig, prepare
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
prepare(PrepareConfig(sys.argv[1], "byte", val_fraction=0.1), Path(sys.argv[2]), show_progress=False)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    command = [sys.executable, "-c", code, str(path), str(tmp_path / "shards")]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    mib = grown / (1 << 20 if sys.platform == "darwin" else 1 << 10)
    assert mib < 48  # the file is 64 MiB, its tokens 128; measured: 16 with 2 threads, which hold a few batches each
    assert stale_reason(PrepareConfig(str(path), "byte", val_fraction=0.1), tmp_path / "shards") is None
