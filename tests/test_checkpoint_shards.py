"""Checkpoints of networks that are sharded over processes: exact on any other number, whole or refused."""

import errno
import json
import os
import shutil
import sys
from contextlib import redirect_stderr
from copy import deepcopy
from io import StringIO

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from nanogpt_lit.checkpoint import shards
from nanogpt_lit.checkpoint.disk import BestEffortSaver
from nanogpt_lit.checkpoint.newest import latest_of
from nanogpt_lit.checkpoint.run_file import load_run, load_stored_network, save_run, step_of, verify_run
from nanogpt_lit.checkpoint.sharded_network import load_into, unread_run
from nanogpt_lit.checkpoint.state import RunState
from nanogpt_lit.checkpoint.tensor_file import TensorFile, write_tensors
from nanogpt_lit.doctor.run import check_checkpoints, largest_checkpoint
from nanogpt_lit.errors import UserError
from nanogpt_lit.gpt.gpt2 import GPTConfig
from nanogpt_lit.gpt.networks import described
from nanogpt_lit.loops.sharded import shard
from nanogpt_lit.module import LitNanoGPT
from nanogpt_lit.parity.processes import run_together
from nanogpt_lit.parity.record import leaves, same
from nanogpt_lit.runtime.processes import rank

pytestmark = pytest.mark.slow  # most start processes

# Of 5 rows of positions the third of three processes gets one, and of a vector of 1 x 8 two get nothing.
CONFIG = GPTConfig(block_size=5, vocab_size=11, n_layer=2, n_head=2, n_embd=8)


def network(processes):
    """A network, sharded where there are several processes, and its optimizer."""
    torch.manual_seed(processes)
    module = LitNanoGPT(**described(CONFIG))
    if processes:
        mesh = init_device_mesh("cpu", (processes, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
        shard(module, mesh)
    return module, module.configure_optimizers()["optimizer"]


def take_a_step(module, optimizer, seed):
    tokens = torch.randint(0, 11, (2, 5), generator=torch.Generator().manual_seed(seed))
    module(tokens, tokens).backward()
    optimizer.step()
    optimizer.zero_grad()


def state_of(module, optimizer, step):
    return RunState(
        weights=module.state_dict(),
        hyper_parameters=dict(module.hparams),
        data={"tokenizer": {"tokenizer.json": "{}"}, "seed": 3},
        optimizer=optimizer.state_dict(),
        schedule={"last_epoch": step},
        scaler=None,
        random=[{"cpu": torch.arange(3, dtype=torch.uint8)}],
        step=step,
        batches=step,
        processes=1,
        accumulate_grad_batches=1,
    )


def whole(tree):
    """Copies of all leaves of a state, each tensor whole; all processes together."""
    return {name: deepcopy(getattr(leaf, "full_tensor", lambda leaf=leaf: leaf)()) for name, leaf in leaves("", tree)}


def of_run(module, optimizer):
    return whole({"weights": module.state_dict(), "optimizer": optimizer.state_dict()})


def as_of_run(state):
    return dict(leaves("", {"weights": state.weights, "optimizer": state.optimizer}))


def different(first, second):
    assert first.keys() == second.keys()
    return [name for name, value in first.items() if not same(value, second[name])]


def train_and_save(processes, folder):
    """Two steps, saved as best and last, then a third, saved as last. The states that were saved."""
    module, optimizer = network(processes)
    saver, states = BestEffortSaver(), []
    for step in (1, 2, 3):
        take_a_step(module, optimizer, step)
        saver.let_go()
        for name in ("best", "last")[step == 3 :]:
            saver.save(folder / f"{name}.safetensors", state_of(module, optimizer, step))
        states.append(of_run(module, optimizer))
    saver.save(folder.with_name("elsewhere") / "kept.safetensors", state_of(module, optimizer, 3))
    return states


def go_on(processes, path, save_as):
    """What a sharded network holds after reading a checkpoint; then it takes a step and saves."""
    module, optimizer = network(processes)
    rest = unread_run(path)
    load_into(rest, module, optimizer)
    assert (rest.weights, rest.optimizer, rest.step, rest.data["seed"]) == ({}, {}, 3, 3)
    read = of_run(module, optimizer)
    take_a_step(module, optimizer, 4)
    save_run(save_as, state_of(module, optimizer, 4))
    return read


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A folder of checkpoints by two processes, and the states that they had."""
    folder = tmp_path_factory.mktemp("sharded") / "checkpoints"
    states, others = run_together(2, train_and_save, 2, folder)
    assert not different(states[2], others[2])
    return folder, states


@pytest.fixture
def folder(kept, tmp_path):
    return shutil.copytree(kept[0], tmp_path / "copy")


def test_a_sharded_checkpoint_is_read_whole_as_one_file_is(kept):
    folder, (_, second, third) = kept
    assert [step_of(folder / f"{name}.safetensors") for name in ("last", "previous", "best")] == [3, 2, 2]
    assert not different(as_of_run(load_run(folder / "last.safetensors")), third)
    assert not different(as_of_run(load_run(folder / "best.safetensors")), second)
    assert not different(as_of_run(load_run(folder.with_name("elsewhere") / "kept.safetensors")), third)
    weights = dict(leaves("", {"weights": load_stored_network(folder / "best.safetensors").weights}))
    assert not different(weights, {name: second[name] for name in second if name.startswith("weights ")})


def test_the_doctor_sees_a_checkpoint_with_its_shards_as_one(folder):
    assert [finding.level for finding in check_checkpoints(folder)] == ["ok"] * 3
    (shard_folder,) = folder.glob("step_3-*")
    assert largest_checkpoint(folder) == sum(path.stat().st_size for path in shard_folder.iterdir())
    (shard_folder / "0.safetensors").unlink()
    assert sorted(finding.level for finding in check_checkpoints(folder)) == ["ok", "ok", "wrong"]


def test_the_state_of_another_optimizer_is_refused(kept):
    module = network(0)[0]
    optimizer = torch.optim.AdamW(module.parameters())
    with pytest.raises(UserError, match=r"last\.safetensors holds the state of another optimizer"):
        load_into(unread_run(kept[0] / "last.safetensors"), module, optimizer)


def test_each_process_writes_its_part_and_best_and_last_of_one_step_share_theirs(kept):
    folder, _ = kept
    assert verify_run(folder / "previous.safetensors") == 2
    folders = sorted(path for path in folder.iterdir() if path.is_dir())
    assert [path.name.partition("-")[0] for path in folders] == ["step_2", "step_3"]  # that of the first is gone
    for shard_folder in folders:
        sizes = [(shard_folder / f"{rank}.safetensors").stat().st_size for rank in (0, 1)]
        assert len(list(shard_folder.iterdir())) == 2
        assert max(sizes) < 1.2 * min(sizes)


def test_other_numbers_of_processes_go_on_from_it_and_one_device_goes_on_from_them(kept, tmp_path):
    folder, (_, _, third) = kept
    path = folder / "last.safetensors"
    for state in run_together(3, go_on, 3, path, tmp_path / "of_three.safetensors"):
        assert not different(state, third)
    module, optimizer = network(0)
    state = load_run(path)
    module.load_state_dict(state.weights)
    optimizer.load_state_dict(state.optimizer)
    assert not different(of_run(module, optimizer), third)
    save_run(tmp_path / "of_one.safetensors", state_of(module, optimizer, 3))
    for state in run_together(2, go_on, 2, tmp_path / "of_one.safetensors", tmp_path / "of_two.safetensors"):
        assert not different(state, third)
    take_a_step(module, optimizer, 4)
    for name in ("of_three", "of_two"):
        after = as_of_run(load_run(tmp_path / f"{name}.safetensors"))
        for key, value in of_run(module, optimizer).items():
            # Gradients are added up over the processes, in another order than by one: some roundings of float32.
            assert torch.allclose(torch.as_tensor(after[key]), torch.as_tensor(value), rtol=1e-4, atol=1e-6), key


def read_by_all(processes, path):
    module, optimizer = network(processes)
    with pytest.raises(UserError) as refused:
        load_into(unread_run(path), module, optimizer)
    return str(refused.value)


def with_index(path, change):
    """The checkpoint with its index changed, and all its checksums right."""
    with TensorFile(path) as file:
        tensors, metadata = file.read(file.names), file.metadata
    index = json.loads(metadata[shards.SHARDS])
    change(index)
    texts = {name: metadata[name] for name in ("nanogpt_lit",)} | {shards.SHARDS: json.dumps(index)}
    with path.open("wb") as file:
        write_tensors(file, tensors, texts)


def test_a_shard_that_is_not_as_it_was_written_is_refused_in_one_sentence_by_all_processes(folder):
    last = folder / "last.safetensors"
    (of_last,) = folder.glob("step_3-*")
    shard = of_last / "1.safetensors"
    content = shard.read_bytes()
    flipped = content[:-5] + bytes([content[-5] ^ 1]) + content[-4:]
    shard.write_bytes(flipped)
    assert [f"{shard} is damaged: " in said for said in run_together(2, read_by_all, 2, last)] == [True, True]
    (of_best,) = folder.glob("step_2-*")
    for damaged, said in (
        (flipped, f"{shard} is damaged: "),
        (content[:-9], f"{shard} is damaged: "),
        (content[:5], f"{shard} is not a checkpoint of nanogpt_lit, or only the beginning of one"),
        ((of_best / shard.name).read_bytes(), f"{shard} is a shard of another checkpoint than {last}"),
        (None, f"{last} needs {shard}, which is not there"),
    ):
        shard.unlink() if damaged is None else shard.write_bytes(damaged)
        for read in (load_run, verify_run):
            with pytest.raises(UserError) as refused:
                read(last)
            assert said in str(refused.value)
    shard.write_bytes(content)
    assert verify_run(last) == 3


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index["tensors"]["gpt.transformer.wte.weight"]["parts"].pop(),
        lambda index: index["tensors"]["gpt.transformer.wte.weight"]["parts"][0][1].__setitem__(0, 9),
        lambda index: index["tensors"]["gpt.transformer.wte.weight"]["parts"][0].__setitem__(2, [2**40, 8]),
        lambda index: index["tensors"]["gpt.transformer.wte.weight"].__setitem__("shape", [2**40, 8]),
        lambda index: index.pop("files"),
        lambda index: index.__setitem__("tensors", 5),
    ],
)
def test_an_index_that_does_not_describe_its_shards_is_refused(change, folder):
    with_index(folder / "best.safetensors", change)
    with pytest.raises(UserError, match=r"best\.safetensors is a checkpoint without all that nanogpt_lit keeps"):
        load_run(folder / "best.safetensors")


def test_no_index_leads_out_of_its_folder(folder):
    for change in (
        lambda index: index.__setitem__("folder", "../elsewhere"),
        lambda index: index["files"].__setitem__("/etc/passwd", ""),
    ):
        copy = shutil.copy(folder / "best.safetensors", folder / "copy.safetensors")
        with_index(copy, change)
        with pytest.raises(UserError, match="a plain file name in that folder works"):
            load_run(copy)


def save_under_watch(processes, folder, moments):
    """Saves three steps. Of the third, keeps a copy of the folder before each change of it: what a kill would leave."""
    taken = busy = 0

    def on_event(event, arguments):
        nonlocal taken, busy
        opens = event == "open" and str(arguments[0]).endswith(".partial") and "w" in str(arguments[1])
        changes = event in ("os.rename", "os.link", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree")
        if busy or not (opens or changes) or not str(arguments[0]).startswith(str(folder)):
            return
        busy, taken = 1, taken + 1
        while True:  # another process may take a file away from under a copy
            copy = moments / f"{rank()}_{taken}"
            try:
                shutil.copytree(folder, copy / "checkpoints")
                break
            except (OSError, shutil.Error):
                shutil.rmtree(copy)
        busy = 0

    module, optimizer = network(processes)
    saver = BestEffortSaver()
    for step in (1, 2, 3):
        take_a_step(module, optimizer, step)
        saver.let_go()
        for name in ("best", "last"):
            saver.save(folder / f"{name}.safetensors", state_of(module, optimizer, step))
        if step == 2:
            sys.addaudithook(on_event)


def test_a_kill_at_any_moment_of_a_save_leaves_what_was_saved_before(tmp_path):
    folder, moments = tmp_path / "run" / "checkpoints", tmp_path / "moments"
    run_together(2, save_under_watch, 2, folder, moments)
    steps = {"0": [], "1": []}
    for moment in sorted(moments.iterdir(), key=lambda path: int(path.name[2:])):
        newest = latest_of(moment)
        assert newest.remarks == [], moment.name
        steps[moment.name[0]].append(newest.step)
        shards.sweep_shards(moment / "checkpoints")
        assert latest_of(moment).step == newest.step
    # The second process only writes its part, and until the index is there the checkpoint is the one before.
    assert set(steps["1"]) == {2}
    assert steps["0"] == sorted(steps["0"])
    assert set(steps["0"]) == {2, 3}
    assert len(steps["0"]) > 12
    assert sorted(path.name.partition("-")[0] for path in folder.iterdir() if path.is_dir()) == ["step_2", "step_3"]


def save_on_a_full_disk(processes, folder):
    """The second process's disk is full at the second step. What the processes said, and whether they knew."""
    module, optimizer = network(processes)
    saver, durable_file, failed = BestEffortSaver(), shards.durable_file, []

    def full(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with redirect_stderr(StringIO()) as said:
        for step in (1, 2, 3):
            take_a_step(module, optimizer, step)
            saver.let_go()
            shards.durable_file = full if step == 2 and rank() == 1 else durable_file
            for name in ("best", "last"):
                saver.save(folder / f"{name}.safetensors", state_of(module, optimizer, step))
            failed.append(saver.failing)
            if step == 2:
                assert latest_of(folder.parent).step == 1
                assert len([path for path in folder.iterdir() if path.is_dir()]) == 1
        shards.durable_file = full if rank() == 1 else durable_file
        saver.let_go()
        saver.save(folder / "last.safetensors", state_of(module, optimizer, 4))
        with pytest.raises(UserError, match=r"the run ended at step 4 and \S*last\.safetensors could not be saved"):
            saver.insist(0.3)
    return failed, said.getvalue()


def test_a_disk_that_is_full_for_one_process_is_full_for_all_and_said_once(tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    (failed, said), (others, silent) = run_together(2, save_on_a_full_disk, 2, folder)
    assert failed == others == [False, True, False]
    assert said.count("could not be saved at step 2: [Errno 28]") == said.count("is saved again, at step 3") == 1
    assert silent == ""
    assert latest_of(tmp_path / "run").step == 3


def save_what_is_not_finite(processes, folder):
    module, optimizer = network(processes)
    if rank() == 1:
        next(module.parameters()).to_local().data.fill_(float("inf"))
    with pytest.raises(UserError, match=r"gpt\.\S+ holds numbers that are not finite"):
        BestEffortSaver().save(folder / "last.safetensors", state_of(module, optimizer, 1))


def test_numbers_that_are_not_finite_in_one_process_are_saved_by_none(tmp_path):
    run_together(2, save_what_is_not_finite, 2, tmp_path)
    assert not list(tmp_path.iterdir())
