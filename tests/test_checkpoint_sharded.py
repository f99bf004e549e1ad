"""Folders of shards, read beside PyTorch's own reader."""

import os
import pickle

import pytest
import torch
from small_runs import different, fit, small_run
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from nanogpt_lit.checkpoint.convert import convert
from nanogpt_lit.checkpoint.lightning_format import read_values
from nanogpt_lit.errors import UserError
from nanogpt_lit.untrusted.pickled import Name, pickled_tree

FSDP2 = "--trainer.strategy=ModelParallelStrategy", "--trainer.devices=1"
SHARDED = "--trainer.strategy.save_distributed_checkpoint=true"


@pytest.mark.slow
def test_a_sharded_run_becomes_the_file_that_the_whole_one_becomes(text, tmp_path):
    for name, more in (("whole", []), ("sharded", [SHARDED])):
        assert fit(*small_run(text, tmp_path / name, *FSDP2, *more)) == 0
        convert(tmp_path / name / "version_0/checkpoints/last.ckpt", tmp_path / f"{name}.safetensors")
    assert not different(tmp_path / "whole.safetensors", tmp_path / "sharded.safetensors")


@pytest.fixture
def folder(tmp_path):
    state = {
        "state_dict": {"a.b": torch.arange(6.0).reshape(2, 3)},
        "optimizer_0": {"groups": [{"lr": 0.1, "of": (1, 2)}]},
    }
    dcp.save(state, checkpoint_id=tmp_path / "folder", no_dist=True)
    torch.save({"global_step": 1}, tmp_path / "folder" / "meta.pt")
    return tmp_path / "folder"


def test_values_are_those_that_pytorchs_own_reader_finds(folder, tmp_path):
    dcp_to_torch_save(folder, tmp_path / "theirs.pt")
    theirs, ours = torch.load(tmp_path / "theirs.pt", weights_only=True), read_values(folder)
    assert ours == theirs | {"state_dict": ours["state_dict"]}
    assert torch.equal(ours["state_dict"]["a.b"], theirs["state_dict"]["a.b"])


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_no_code_in_an_index_or_beside_it_runs(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert pickled_tree(pickle.dumps(Bomb())).by == Name(os.mkdir.__module__, "mkdir")
    whole = (folder / ".metadata").read_bytes()
    for name, content in ((".metadata", pickle.dumps(Bomb())), ("meta.pt", pickle.dumps(Bomb()))):
        (folder / ".metadata").write_bytes(whole)
        (folder / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{folder} is damaged, or is not a checkpoint that Lightning wrote"):
            convert(folder, tmp_path / "out.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder"]


@pytest.mark.parametrize("damage", ["cut short", "flipped", "elsewhere", "too large"])
def test_a_damaged_folder_is_one_sentence(folder, damage, tmp_path):
    (shard,) = folder.glob("*.distcp")
    index = folder / ".metadata"
    if damage == "cut short":
        shard.write_bytes(shard.read_bytes()[:-200])
    elif damage == "flipped":
        content = bytearray(shard.read_bytes())
        content[content.index(torch.arange(6.0).numpy().tobytes()) + 5] ^= 1
        shard.write_bytes(content)
    elif damage == "elsewhere":
        outside = f"../{'x' * (len(shard.name) - 3)}"  # as long, as the index counts bytes
        index.write_bytes(index.read_bytes().replace(shard.name.encode(), outside.encode()))
        shard.replace(folder / outside)
    else:
        stored = pickle.loads(index.read_bytes())
        stored.state_dict_metadata["state_dict.a.b"].size = torch.Size([2**40, 3])
        index.write_bytes(pickle.dumps(stored))
    with pytest.raises(UserError, match=f"{folder} is damaged"):
        convert(folder, tmp_path / "out.safetensors")
