"""Lightning's folders of shards, read beside PyTorch's own reader."""

import os
import pickle

import pytest
import torch
from faults import STEPS, make_loader, make_module
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from nanogpt_lit.checkpoint.convert import convert
from nanogpt_lit.checkpoint.lightning_format import read_values
from nanogpt_lit.checkpoint.run_file import load_run
from nanogpt_lit.errors import UserError
from nanogpt_lit.parity.record import leaves
from nanogpt_lit.untrusted.imports import pickled_tree


@pytest.mark.slow
def test_the_shards_of_a_trainer_become_a_file_with_its_weights_and_moments(tmp_path):
    module = make_module()
    options = {"accelerator": "cpu", "devices": 1, "max_steps": STEPS, "logger": False, "enable_progress_bar": False}
    trainer = Trainer(**options, strategy=ModelParallelStrategy(1, 1), enable_checkpointing=False)
    trainer.fit(module, make_loader(STEPS, 1))
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    assert (tmp_path / "x.ckpt").is_dir()
    convert(tmp_path / "x.ckpt", tmp_path / "x.safetensors")
    state = load_run(tmp_path / "x.safetensors")
    assert (state.step, state.batches) == (STEPS, STEPS)
    theirs = {"weights": module.state_dict(), "moments": trainer.optimizers[0].state_dict()["state"]}
    ours = dict(leaves("", {"weights": state.weights, "moments": state.optimizer["state"]}))
    for name, value in leaves("", theirs):
        assert torch.equal(ours.pop(name), getattr(value, "full_tensor", lambda value=value: value)()), name
    assert not ours


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
    made = pickled_tree(pickle.dumps(Bomb()))
    assert (made.name, made.arguments) == ("mkdir", ("exploded",))
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
