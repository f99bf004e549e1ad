"""Files that were damaged, or written to harm: the answer is right, or one sentence of ours; never a traceback.

The examples are the same in every run (derandomize), and few: a longer search is `max_examples` away.
"""

import json
import shutil
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_networks
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from small_networks import new_tokenizer, trained

from nanogpt_lit.accelerate_config.accelerate_file import read_accelerate_file
from nanogpt_lit.accelerate_config.from_accelerate import to_trainer
from nanogpt_lit.checkpoint.accelerate_format import (
    BESIDE,
    OPTIMIZER,
    RANDOM,
    SCHEDULE,
    WEIGHTS,
    read_folder,
    write_folder,
)
from nanogpt_lit.checkpoint.convert import convert, load_network, read, read_ckpt
from nanogpt_lit.checkpoint.lightning_format import to_lightning
from nanogpt_lit.checkpoint.run_file import DESCRIPTION, load_run, open_run, save_run
from nanogpt_lit.checkpoint.state import RunState
from nanogpt_lit.checkpoint.tensor_file import write_tensors
from nanogpt_lit.cli.settings import SettingsCLI
from nanogpt_lit.data.prepare import PrepareConfig, prepare, stale_reason
from nanogpt_lit.data.shards import MANIFEST, TokenShards, read_manifest
from nanogpt_lit.data.tokenizer import TOKENIZER_JSON, BytePairTokenizer, ByteTokenizer, CharTokenizer
from nanogpt_lit.data.tokenizer_files import read_tokenizer_files, tokenizer_from_files
from nanogpt_lit.errors import UserError
from nanogpt_lit.gpt.gpt2 import GPT, GPTConfig
from nanogpt_lit.parity.record import leaves, same


def examples(count):
    shared = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=count, derandomize=True, deadline=None, database=None, suppress_health_check=shared)


def answer(read):
    """What `read` returns, or None where it refuses in one sentence of ours."""
    try:
        return read()
    except (ValueError, OSError) as error:
        refused = error
    # An OSError is told by its own text (nanogpt_lit/__main__.py); a ValueError must be ours to be told.
    assert isinstance(refused, (OSError, UserError)), repr(refused)
    assert len(str(refused).splitlines()) == 1, str(refused)
    return None


@st.composite
def damages(draw):
    """A function from bytes to other bytes: a flipped bit, a file cut short, something appended, or zeros."""
    kind, where, bit = draw(st.sampled_from(["flip", "flip", "cut", "append", "zeros"])), draw(st.floats(0, 1)), 0
    bit = draw(st.integers(0, 7))

    def damage(content):
        at = min(int(where * len(content)), len(content) - 1)
        match kind:
            case "flip":
                return content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :]
            case "cut":
                return content[:at]
            case "append":
                return content + bytes([bit]) * (at + 1)
        return content[:at] + bytes(len(content) - at - 1) + b"\1"

    return damage


# Anything that JSON can say, with the values that have a meaning somewhere.
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.sampled_from([-1, 0, 1, 2**40, 1.5, float("nan"), "", "x", "../x", "a\0b", "float32"])
    | st.sampled_from([{"$tensor": "x"}, {"$pairs": [[1]]}, {"$number": "x"}, {"$tuple": 3}]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["x", "$tensor"]), inner, max_size=2),
    max_leaves=3,
)


@st.composite
def changes(draw):
    """A function from nested JSON to the same with one value replaced, or left out."""
    seed, value, left_out = draw(st.integers(0, 10**6)), draw(VALUES), draw(st.integers(0, 3)) == 0

    def change(document):
        document = deepcopy(document)
        places = []

        def walk(node):
            for key in list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
                places.append((node, key))
                walk(node[key])

        walk(document)
        node, key = places[seed % len(places)]
        if left_out:
            del node[key]
        else:
            node[key] = value
        return document

    return change


# What is read, and what may come of it.

REFUSED, SAME, OTHER_NUMBERS, ANYTHING = range(4)
"""What reading a damaged file may give beside a refusal: nothing, the same as the whole file, the same but for numbers
in their range, or anything. Formats without checksums cannot tell other numbers (SECURITY.md)."""


@dataclass(frozen=True)
class Subject:
    path: Path
    read: Callable[[Path], Any]
    """What is read comes apart by `leaves`."""
    may: dict[str, int]
    """By the names of the files that are damaged; "" is the path itself."""


def shards_as_read(config):
    def read_shards(folder):
        """Both splits, and what the manifest says of them, as a run would read them."""
        stale_reason(config, folder)
        found = {split: manifest["tokens"] for split, manifest in read_manifest(folder)["splits"].items()}
        for split in ("train", "val"):
            shards = TokenShards.open(folder, split)
            shards.check_vocabulary(tokenizer_from_files(read_tokenizer_files(folder)).vocab_size)
            found[f"{split} tokens"] = torch.from_numpy(shards.read(0, len(shards)))
        return found

    return read_shards


def some_state():
    torch.manual_seed(0)
    config = {"block_size": 4, "vocab_size": 257, "n_layer": 1, "n_head": 1, "n_embd": 4}
    weights = {f"gpt.{name}": tensor for name, tensor in GPT(GPTConfig(**config)).state_dict().items()}
    optimizer = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(3)}}, "param_groups": [{"lr": 0.1}]}
    random = [{"cpu": torch.get_rng_state()}]
    data = {"tokenizer": ByteTokenizer().files(), "seed": 1, "block_size": 4, "batch_size": 1}
    schedule = {"last_epoch": 3, "skipped_steps": 0}
    return RunState(weights, {"gpt": config}, data, optimizer, schedule, None, random, 3, 3, 1, 1)


def llm_c_model():
    T, V, L, H, C = 4, 7, 1, 1, 4
    header = np.zeros(256, dtype="<i4")
    header[:8] = 20240326, 3, T, V, L, H, C, 8
    numbers = 8 * C + T * C + L * (12 * C * C + 13 * C) + 2 * C
    return header.tobytes() + np.full(numbers, 0.1, dtype="<f4").tobytes()


@pytest.fixture(scope="module")
def subjects(tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    (root / "text.txt").write_text("A line of text, and another one.\n" * 60)
    config = PrepareConfig(str(root / "text.txt"), "byte", val_fraction=0.2)
    prepare(config, root / "shards", show_progress=False)
    state = some_state()
    save_run(root / "x.safetensors", state)
    torch.save(to_lightning(state), root / "lightning.ckpt")
    write_folder(root / "accelerate", state)
    for kind in ("bpe", "byte"):
        tokenizer = new_tokenizer(kind)
        network = trained(tokenizer, steps=0, n_layer=1, n_head=1, n_embd=8, block_size=8)
        small_networks.saved(root / f"{kind}.safetensors", network, tokenizer)
    convert(root / "bpe.safetensors", root / "hf", to="hf")
    convert(root / "byte.safetensors", root / "ckpt.pt")
    (root / "model.bin").write_bytes(llm_c_model())
    (root / "x.gguf").write_bytes(b"GGUF" + bytes([3, 0, 0, 0] + [255] * 16))
    of_shards = {"train_000000.bin": OTHER_NUMBERS, MANIFEST: SAME, TOKENIZER_JSON: SAME}
    # accelerate writes neither its weights nor what we put beside them with a checksum.
    of_accelerate = {BESIDE: ANYTHING, WEIGHTS: ANYTHING, OPTIMIZER: SAME, SCHEDULE: SAME, RANDOM.format(0): SAME}
    of_hugging_face = {"config.json": ANYTHING, "model.safetensors": ANYTHING, "tokenizer.json": ANYTHING}
    return {
        "shards": Subject(root / "shards", shards_as_read(config), of_shards),
        "checkpoint": Subject(root / "x.safetensors", lambda path: vars(load_run(path)), {"": REFUSED}),
        "Lightning's": Subject(root / "lightning.ckpt", lambda path: vars(read_ckpt(path)), {"": SAME}),
        "accelerate's": Subject(root / "accelerate", lambda path: vars(read_folder(path)), of_accelerate),
        "Hugging Face's": Subject(root / "hf", lambda path: vars(read(path)[1]), of_hugging_face),
        "nanoGPT's": Subject(root / "ckpt.pt", lambda path: vars(read(path, "byte")[1]), {"": SAME}),
        "llm.c's": Subject(root / "model.bin", lambda path: vars(read(path, "byte")[1]), {"": ANYTHING}),
        "GGUF": Subject(root / "x.gguf", lambda path: vars(read(path)[1]), {"": REFUSED}),
    }


def copy_of(path, tmp_path):
    copy = tmp_path / path.name
    shutil.rmtree(copy, ignore_errors=True)
    return shutil.copytree(path, copy) if path.is_dir() else Path(shutil.copy(path, copy))


def check(subject, copy, may):
    """Read the copy. may: what that may give"""
    found = answer(lambda: subject.read(copy))
    if found is None or may == ANYTHING:
        return
    assert may != REFUSED
    found, right = dict(leaves("", found)), dict(leaves("", subject.read(subject.path)))
    assert found.keys() == right.keys()
    different = [name for name, value in right.items() if not same(found[name], value)]
    if may == SAME:
        assert not different
    for name in different:
        assert found[name].shape == right[name].shape
        assert found[name].max() < ByteTokenizer().vocab_size


# A zip archive that says it is one of several disks, for which Python's reader has an error of its own.
OF_SEVERAL_DISKS = lambda content: content.replace(b"PK\x06\x07" + bytes(4), b"PK\x06\x07\1\0\0\0")  # noqa: E731


@pytest.mark.parametrize(
    "name",
    ["shards", "checkpoint", "Lightning's", "accelerate's", "Hugging Face's", "nanoGPT's", "llm.c's", "GGUF"],
)
@given(damage=damages())
@example(damage=OF_SEVERAL_DISKS)
@examples(16)
def test_a_damaged_file_is_refused_or_reads_as_far_as_it_can_be_told(name, damage, subjects, tmp_path):
    subject = subjects[name]
    for file, may in subject.may.items():
        copy = copy_of(subject.path, tmp_path)
        whole = (copy / file).read_bytes()
        (copy / file).write_bytes(damage(whole))
        check(subject, copy, may if (copy / file).read_bytes() != whole else SAME)


@pytest.mark.parametrize(
    ("name", "file"), [("shards", MANIFEST), ("Hugging Face's", "config.json"), ("Hugging Face's", "tokenizer.json")]
)
@given(change=changes())
@examples(30)
def test_json_that_was_written_to_harm_is_refused_or_read(name, file, change, subjects, tmp_path):
    subject = subjects[name]
    copy = copy_of(subject.path, tmp_path)
    (copy / file).write_text(json.dumps(change(json.loads((copy / file).read_text()))))
    check(subject, copy, subject.may[file])


@given(change=changes())
@examples(30)
def test_a_file_of_nanogpts_that_was_written_to_harm_is_refused_or_read(change, subjects, tmp_path):
    checkpoint = torch.load(subjects["nanoGPT's"].path, weights_only=True)
    tensors = checkpoint.pop("model"), checkpoint.pop("optimizer")
    path = tmp_path / "ckpt.pt"
    torch.save({**change(checkpoint), "model": tensors[0], "optimizer": tensors[1]}, path)
    answer(lambda: read(path, "byte"))


TOKENIZERS = [
    ByteTokenizer(),
    CharTokenizer("the quick"),
    BytePairTokenizer(
        "x", {bytes([byte]): byte for byte in range(256)} | {b"th": 256}, r"\S+|\s+", {"<|endoftext|>": 257}
    ),
]


@given(change=changes(), which=st.integers(0, 2))
@examples(45)
def test_a_rewritten_tokenizer_is_refused_or_decodes_what_it_encodes(change, which):
    files = TOKENIZERS[which].files()
    files[TOKENIZER_JSON] = json.dumps(change(json.loads(files[TOKENIZER_JSON])))

    def round_trip():
        tokenizer = tokenizer_from_files(files)
        return tokenizer.decode(tokenizer.encode("the the"))

    assert answer(round_trip) in (None, "the the")


def rewritten_run(subjects, path, change):
    """A checkpoint with another description, and the right checksums: who writes a file writes them too."""
    with open_run(subjects["checkpoint"].path) as file:
        description, tensors = change(json.loads(file.metadata[DESCRIPTION])), file.read(file.names)
    with path.open("w+b") as out:
        write_tensors(out, tensors, {DESCRIPTION: json.dumps(description)})
    return path


@given(change=changes())
@examples(40)
def test_a_checkpoint_written_to_harm_is_refused_or_read(change, subjects, tmp_path):
    path = rewritten_run(subjects, tmp_path / "written.safetensors", change)
    answer(lambda: load_run(path))
    answer(lambda: load_network(path))


@pytest.mark.parametrize("change", [{"step": "x"}, {"batches": -4}], ids=str)
def test_a_checkpoint_whose_counts_cannot_be_is_refused(change, subjects, tmp_path):
    path = rewritten_run(subjects, tmp_path / "written.safetensors", lambda description: description | change)
    assert answer(lambda: load_run(path)) is None


# YAML, and accelerate's.

CONFIG = {
    "seed_everything": 1,
    "trainer": {
        "max_steps": 3,
        "precision": "32-true",
        "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": "x", "name": "y"}},
    },
    "model": {"gpt": {"n_layer": 1}, "optim": {"lr": 0.1}},
    "data": {"source": "x.txt", "tokenizer": "byte"},
}


def rewritten(document):
    """Bytes of YAML: the document with another value somewhere, or with its bytes damaged."""
    as_bytes = lambda value: yaml.safe_dump(value).encode()  # noqa: E731
    return changes().map(lambda change: as_bytes(change(document))) | damages().map(
        lambda damage: damage(as_bytes(document))
    )


@given(content=rewritten(CONFIG))
@examples(8)
def test_a_changed_or_damaged_yaml_is_parsed_or_refused_in_one_line(content, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    answer(lambda: SettingsCLI(args=[f"--config={path}"]))


ACCELERATE = {
    "compute_environment": "LOCAL_MACHINE",
    "distributed_type": "FSDP",
    "mixed_precision": "bf16",
    "num_processes": 2,
    "fsdp_config": {"fsdp_version": 2, "fsdp_reshard_after_forward": True, "fsdp_offload_params": False},
    "downcast_bf16": "no",
    "use_cpu": False,
}


@given(content=rewritten(ACCELERATE))
@examples(80)
def test_a_changed_or_damaged_accelerate_file_is_translated_or_refused(content, tmp_path):
    path = tmp_path / "default_config.yaml"
    path.write_bytes(content)
    answer(lambda: to_trainer(read_accelerate_file(path)))
