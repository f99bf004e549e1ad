"""Files that were damaged, or written to harm: the answer is right, or one sentence of ours; never a traceback.

The examples are the same in every run (derandomize), and few: a longer search is `max_examples` away.
"""

import json
import shutil
import zipfile
from copy import deepcopy

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
from nanogpt_lit.data.tokenizer import TOKENIZER_JSON, ByteTokenizer
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


# Shards.


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """(the request, the folder of its shards)"""
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "text.txt").write_text("A line of text, and another one.\n" * 60)
    config = PrepareConfig(str(folder / "text.txt"), "byte", val_fraction=0.2)
    prepare(config, folder / "shards", show_progress=False)
    return config, folder / "shards"


def copy_of(shards, tmp_path):
    folder = tmp_path / "copy"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(shards, folder)
    return folder


def all_tokens(folder):
    """Both splits, as a run would read them."""
    read = {}
    for split in ("train", "val"):
        shards = TokenShards.open(folder, split)
        shards.check_vocabulary(tokenizer_from_files(read_tokenizer_files(folder)).vocab_size)
        read[split] = shards.read(0, len(shards)).tolist()
    return read


@pytest.mark.parametrize("name", ["train_000000.bin", MANIFEST, TOKENIZER_JSON])
@given(damage=damages())
@examples(12)
def test_damaged_shards_are_refused_or_read_the_same(name, damage, prepared, tmp_path):
    config, shards = prepared
    folder = copy_of(shards, tmp_path)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(damage(content))
    answer(lambda: stale_reason(config, folder))
    found, right = answer(lambda: all_tokens(folder)), all_tokens(shards)
    if found is not None and found != right:
        # A token that became another valid one: told by the manifest's sha256 alone (SECURITY.md). Nothing else moved.
        assert name.endswith(".bin")
        assert {split: len(tokens) for split, tokens in found.items()} == {s: len(t) for s, t in right.items()}
        assert max(max(tokens) for tokens in found.values()) < ByteTokenizer().vocab_size


@given(change=changes())
@examples(30)
def test_a_rewritten_manifest_is_refused_or_reads_the_same(change, prepared, tmp_path):
    config, shards = prepared
    folder = copy_of(shards, tmp_path)
    manifest = change(json.loads((folder / MANIFEST).read_text()))
    (folder / MANIFEST).write_text(json.dumps(manifest))
    answer(lambda: stale_reason(config, folder))
    found, right = answer(lambda: all_tokens(folder)), all_tokens(shards)
    if found is not None:
        assert found == right
        said = read_manifest(folder)["splits"]  # what the user is told that there is
        assert all(said[split]["tokens"] == len(tokens) for split, tokens in right.items())


@pytest.fixture(scope="module")
def tokenizer_descriptions():
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"th": 256}
    from nanogpt_lit.data.tokenizer import BytePairTokenizer, CharTokenizer

    return [
        tokenizer.files()
        for tokenizer in (
            ByteTokenizer(),
            CharTokenizer("the quick"),
            BytePairTokenizer("x", ranks, r"\S+|\s+", {"<|endoftext|>": 257}),
        )
    ]


@given(change=changes(), which=st.integers(0, 2))
@examples(45)
def test_a_rewritten_tokenizer_is_refused_or_decodes_what_it_encodes(change, which, tokenizer_descriptions):
    files = dict(tokenizer_descriptions[which])
    files[TOKENIZER_JSON] = json.dumps(change(json.loads(files[TOKENIZER_JSON])))

    def round_trip():
        tokenizer = tokenizer_from_files(files)
        return tokenizer.decode(tokenizer.encode("the the"))

    assert answer(round_trip) in (None, "the the")


# Checkpoints.


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    config = {"block_size": 4, "vocab_size": 257, "n_layer": 1, "n_head": 1, "n_embd": 4}
    weights = {f"gpt.{name}": tensor for name, tensor in GPT(GPTConfig(**config)).state_dict().items()}
    optimizer = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(3)}}, "param_groups": [{"lr": 0.1}]}
    random = [{"cpu": torch.get_rng_state()}]
    data = {"tokenizer": ByteTokenizer().files(), "seed": 1, "block_size": 4, "batch_size": 1}
    schedule = {"last_epoch": 3, "skipped_steps": 0}
    return RunState(weights, {"gpt": config}, data, optimizer, schedule, None, random, 3, 3, 1, 1)


@pytest.fixture(scope="module")
def saved(state, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "x.safetensors"
    save_run(path, state)
    return path


@given(damage=damages())
@examples(60)
def test_a_changed_checkpoint_is_refused(damage, saved, tmp_path):
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(damage(saved.read_bytes()))
    assert answer(lambda: load_run(path)) is None


@given(change=changes())
@examples(40)
def test_a_checkpoint_written_to_harm_is_refused_or_read(change, saved, tmp_path):
    """Its checksums are right: who writes a file writes them too."""
    path = tmp_path / "written.safetensors"
    with open_run(saved) as file:
        description = change(json.loads(file.metadata[DESCRIPTION]))
        tensors = file.read(file.names)
    with path.open("w+b") as out:
        write_tensors(out, tensors, {DESCRIPTION: json.dumps(description)})
    answer(lambda: load_run(path))
    answer(lambda: load_network(path))


@pytest.mark.parametrize("change", [{"step": "x"}, {"batches": -4}], ids=str)
def test_a_checkpoint_whose_counts_cannot_be_is_refused(change, saved, tmp_path):
    path = tmp_path / "written.safetensors"
    with open_run(saved) as file:
        description, tensors = json.loads(file.metadata[DESCRIPTION]) | change, file.read(file.names)
    with path.open("w+b") as out:
        write_tensors(out, tensors, {DESCRIPTION: json.dumps(description)})
    assert answer(lambda: load_run(path)) is None


@given(damage=damages())
@examples(30)
def test_a_damaged_file_of_lightnings_is_refused_or_converts_to_the_same(damage, state, tmp_path):
    path = tmp_path / "lightning.ckpt"
    checkpoint = to_lightning(state)
    torch.save(checkpoint, path)
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    found = answer(lambda: read_ckpt(path))
    if found is not None:
        assert all(torch.equal(tensor, found.weights[name]) for name, tensor in state.weights.items())
        assert found.step == state.step
        assert zipfile.is_zipfile(path)


@pytest.fixture(scope="module")
def accelerates_folder(state, tmp_path_factory):
    folder = tmp_path_factory.mktemp("accelerate") / "folder"
    write_folder(folder, state)
    return folder


@pytest.mark.parametrize("name", [BESIDE, WEIGHTS, OPTIMIZER, SCHEDULE, RANDOM.format(0)])
@given(damage=damages())
@examples(12)
def test_a_damaged_folder_of_accelerates_is_refused_or_converts_to_the_same(name, damage, accelerates_folder, tmp_path):
    folder = copy_of(accelerates_folder, tmp_path)
    (folder / name).write_bytes(damage((folder / name).read_bytes()))
    found, right = answer(lambda: read_folder(folder)), read_folder(accelerates_folder)
    if found is None:
        return
    a, b = dict(leaves("", vars(found))), dict(leaves("", vars(right)))
    different = [path for path in a.keys() | b.keys() if path not in a or path not in b or not same(a[path], b[path])]
    # accelerate writes neither with a checksum: another number in them is told by nobody (SECURITY.md).
    assert not different or name in (WEIGHTS, BESIDE), different


# Models of others. Most of these formats have no checksums: other weights in them are read as they are.


@pytest.fixture(scope="module")
def hugging_face_folder(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("hugging_face"), new_tokenizer("bpe")
    network = trained(tokenizer, steps=0, n_layer=1, n_head=1, n_embd=8, block_size=8)
    convert(small_networks.saved(folder / "x.safetensors", network, tokenizer), folder / "hf", to="hf")
    return folder / "hf"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@given(damage=damages())
@examples(12)
def test_a_damaged_folder_of_hugging_face_is_refused_or_read(name, damage, hugging_face_folder, tmp_path):
    folder = copy_of(hugging_face_folder, tmp_path)
    (folder / name).write_bytes(damage((folder / name).read_bytes()))
    answer(lambda: read(folder))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
@given(change=changes())
@examples(30)
def test_a_folder_of_hugging_face_that_was_written_to_harm_is_refused_or_read(
    name, change, hugging_face_folder, tmp_path
):
    folder = copy_of(hugging_face_folder, tmp_path)
    (folder / name).write_text(json.dumps(change(json.loads((folder / name).read_text()))))
    answer(lambda: read(folder))


@pytest.fixture(scope="module")
def nanogpts_file(hugging_face_folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("nanogpt") / "ckpt.pt"
    tokenizer = ByteTokenizer()
    network = trained(tokenizer, steps=0, n_layer=1, n_head=1, n_embd=8, block_size=8)
    convert(small_networks.saved(path.with_suffix(".safetensors"), network, tokenizer), path)
    return path


@given(damage=damages())
@example(damage=lambda content: content.replace(b"PK\x06\x07" + bytes(4), b"PK\x06\x07\1\0\0\0"))  # of several disks
@examples(30)
def test_a_damaged_file_of_nanogpts_is_refused_or_read_the_same(damage, nanogpts_file, tmp_path):
    path = tmp_path / "ckpt.pt"
    path.write_bytes(damage(nanogpts_file.read_bytes()))
    found = answer(lambda: read(path, "byte"))
    if found is not None:
        right = read(nanogpts_file, "byte")[1].weights
        assert all(torch.equal(tensor, found[1].weights[name]) for name, tensor in right.items())


@given(change=changes())
@examples(30)
def test_a_file_of_nanogpts_that_was_written_to_harm_is_refused_or_read(change, nanogpts_file, tmp_path):
    checkpoint = torch.load(nanogpts_file, weights_only=True)
    tensors = checkpoint.pop("model"), checkpoint.pop("optimizer")
    path = tmp_path / "ckpt.pt"
    torch.save({**change(checkpoint), "model": tensors[0], "optimizer": tensors[1]}, path)
    answer(lambda: read(path, "byte"))


@given(damage=damages())
@examples(20)
def test_a_damaged_model_of_llm_c_is_refused_or_read(damage, tmp_path):
    T, V, L, H, C = 4, 7, 1, 1, 4
    header = np.zeros(256, dtype="<i4")
    header[:8] = 20240326, 3, T, V, L, H, C, 8
    numbers = 8 * C + T * C + L * (12 * C * C + 13 * C) + 2 * C
    path = tmp_path / "model.bin"
    path.write_bytes(damage(header.tobytes() + np.full(numbers, 0.1, dtype="<f4").tobytes()))
    answer(lambda: read(path, "byte"))


@given(damage=damages())
@examples(20)
def test_a_damaged_gguf_file_is_named(damage, tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(damage(b"GGUF" + bytes([3, 0, 0, 0] + [255] * 16)))
    assert answer(lambda: read(path)) is None


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
