"""Checkpoints to the two frameworks and back, read by the frameworks themselves."""

import itertools
import os
import pickle
from dataclasses import replace
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from lightning.pytorch import Trainer
from torch.amp import GradScaler
from torch.utils.data import DataLoader, TensorDataset

from nanogpt_lit.__main__ import main
from nanogpt_lit.checkpoint.convert import convert
from nanogpt_lit.checkpoint.run_file import load_run, save_run
from nanogpt_lit.data.tokenizer import ByteTokenizer
from nanogpt_lit.gpt.gpt2 import GPTConfig
from nanogpt_lit.loops.contract import LoopSettings, Observer, optimizer_and_schedule
from nanogpt_lit.loops.lightning import MixedPrecision
from nanogpt_lit.loops.reference import train
from nanogpt_lit.module import LitNanoGPT
from nanogpt_lit.optim.adamw import AdamWConfig
from nanogpt_lit.optim.schedule import ScheduleConfig
from nanogpt_lit.parity.record import leaves, same
from nanogpt_lit.run.guards import FiniteGuard
from nanogpt_lit.run.resume import Resume, capture

STEPS, B, T = 4, 2, 8


def new_module(**changes):
    torch.manual_seed(1)
    config = {"block_size": T, "vocab_size": 11, "n_layer": 1, "n_head": 2, "n_embd": 8, "dropout": 0.1, **changes}
    return LitNanoGPT(GPTConfig(**config), AdamWConfig(lr=0.05), ScheduleConfig(warmup_steps=2, total_steps=10))


def batches(first=0):
    windows = torch.randint(0, 11, (10 * B, T + 1), generator=torch.Generator().manual_seed(1))[first * B :]
    return DataLoader(TensorDataset(windows[:, :-1].contiguous(), windows[:, 1:].contiguous()), batch_size=B)


def new_scaler():
    return GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-12, growth_interval=2)


class Catch(Observer):
    def on_train_start(self, training):
        self.training = training


@pytest.fixture(scope="module")
def trained():
    """The parts of a run in float16 after 4 steps, some of them skipped."""
    catch = Catch()
    settings = LoopSettings(STEPS, precision="16-mixed", seed=5)
    train(new_module(), batches(), [], settings, [FiniteGuard(), catch], new_scaler())
    assert 0 < catch.training.schedule.skipped_steps < STEPS
    return catch.training


@pytest.fixture
def state(trained):
    data = {"tokenizer": ByteTokenizer().files(), "seed": 7, "block_size": T, "batch_size": B}
    run = capture(trained, data)
    validations = {"latest": (4, 2.5), "best": (2, 2.25)}
    elastic = {"sequences": B, "validation_sequences": 1}
    return replace(run, tokens=STEPS * B * T, validations=validations, elastic=elastic)


@pytest.fixture
def checkpoint(state, tmp_path):
    save_run(tmp_path / "run.safetensors", state)
    return tmp_path / "run.safetensors"


def different(first, second):
    a, b = dict(leaves("", vars(first))), dict(leaves("", vars(second)))
    assert a.keys() == b.keys()
    return [path for path, value in a.items() if not same(value, b[path])]


@pytest.mark.parametrize("name", ["x.ckpt", "folder"])
def test_nothing_is_lost_on_the_way_to_a_framework_and_back(checkpoint, tmp_path, name):
    there = tmp_path / name
    convert(checkpoint, there)
    convert(there, tmp_path / "back.safetensors")
    first, second = load_run(checkpoint), load_run(tmp_path / "back.safetensors")
    # Lightning's counters may have come along on the way.
    assert not different(replace(first, lightning=None), replace(second, lightning=None))


def test_a_stock_trainer_goes_on_from_the_ckpt(checkpoint, tmp_path):
    convert(checkpoint, tmp_path / "x.ckpt")
    here = new_module()
    scaler = new_scaler()
    trainer = Trainer(
        max_steps=STEPS, accelerator="cpu", devices=1, plugins=[MixedPrecision("16-mixed", "cpu", scaler)],
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(here, batches(), ckpt_path=tmp_path / "x.ckpt", weights_only=True)
    assert trainer.global_step == STEPS
    expected = load_run(checkpoint)
    assert all(torch.equal(tensor, expected.weights[name]) for name, tensor in here.state_dict().items())
    moments = dict(leaves("", trainer.optimizers[0].state_dict()))
    assert all(same(moments[path], value) for path, value in leaves("", expected.optimizer))
    assert trainer.lr_scheduler_configs[0].scheduler.state_dict() == expected.schedule
    assert scaler.state_dict() == expected.scaler

    loaded = LitNanoGPT.load_from_checkpoint(tmp_path / "x.ckpt", weights_only=True)
    assert loaded.gpt.config == here.gpt.config
    assert all(map(torch.equal, loaded.parameters(), here.parameters()))


def test_a_ckpt_of_a_stock_trainer_is_gone_on_from_by_plain_pytorch(tmp_path):
    ours, theirs = new_module(dropout=0.0), new_module(dropout=0.0)
    trainer = Trainer(
        max_steps=STEPS, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(theirs, batches())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    convert(tmp_path / "x.ckpt", tmp_path / "x.safetensors")
    train(ours, batches(STEPS), [], LoopSettings(STEPS + 3), [Resume(load_run(tmp_path / "x.safetensors"))])

    undisturbed = new_module(dropout=0.0)
    train(undisturbed, batches(), [], LoopSettings(STEPS + 3))
    assert all(map(torch.equal, ours.parameters(), undisturbed.parameters()))


class AcceleratesOwn:
    """A script with accelerate's own checkpoints, as its documentation has it."""

    def __init__(self):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        self.accelerator = Accelerator(cpu=True)
        self.accelerator.scaler = new_scaler()
        self.raw = new_module()
        optimizer, self.schedule = optimizer_and_schedule(self.raw)
        self.module, self.optimizer = self.accelerator.prepare(self.raw, optimizer)
        self.accelerator.register_for_checkpointing(self.schedule)

    def step(self, first):
        for tokens, targets in batches(first):
            with self.accelerator.accumulate(self.module):
                with torch.autocast("cpu", torch.float16, cache_enabled=False):
                    loss = self.module(tokens, targets)
                self.accelerator.backward(loss)
                self.optimizer.step()
                self.schedule.step()
                self.optimizer.zero_grad()
            return


def test_accelerates_own_load_state_goes_on_from_the_folder_and_comes_back(checkpoint, tmp_path):
    convert(checkpoint, tmp_path / "folder")
    script = AcceleratesOwn()
    script.accelerator.load_state(tmp_path / "folder")
    expected = load_run(checkpoint)
    assert all(torch.equal(tensor, expected.weights[name]) for name, tensor in script.raw.state_dict().items())
    assert script.schedule.state_dict() == expected.schedule
    assert script.accelerator.scaler.state_dict() == expected.scaler
    assert torch.equal(torch.get_rng_state(), expected.random[0]["cpu"])
    assert script.accelerator.step == STEPS

    # One step more there, one step more here.
    script.step(STEPS)
    script.accelerator.save_state(tmp_path / "later")
    (tmp_path / "later" / "nanogpt_lit.json").write_bytes((tmp_path / "folder" / "nanogpt_lit.json").read_bytes())
    convert(tmp_path / "later", tmp_path / "later.safetensors")

    class Save(Catch):
        def on_train_end(self):
            state = capture(self.training, expected.data)
            self.end = replace(state, tokens=5 * B * T, validations=expected.validations)

    save = Save()
    settings = LoopSettings(STEPS + 1, precision="16-mixed", seed=5)
    train(new_module(), batches(STEPS), [], settings, [Resume(load_run(checkpoint)), FiniteGuard(), save], new_scaler())
    assert not different(save.end, load_run(tmp_path / "later.safetensors"))


def own_loop(folder, schedule_is_saved):
    """Somebody's own loop with accelerate, 4 steps of two micro-batches, and the folder of its save_state."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    optimizer, schedule = optimizer_and_schedule(raw := new_module(dropout=0.0))
    module, optimizer = accelerator.prepare(raw, optimizer)
    if schedule_is_saved:
        accelerator.register_for_checkpointing(schedule)
    for tokens, targets in itertools.islice(batches(), 2 * STEPS):
        with accelerator.accumulate(module):
            accelerator.backward(module(tokens, targets))
            optimizer.step()
            if accelerator.sync_gradients:
                schedule.step()
            optimizer.zero_grad()
    accelerator.save_state(folder)


YAML = f"""
trainer: {{max_steps: 10, accumulate_grad_batches: 2, default_root_dir: ROOT}}
model:
  gpt: {{n_layer: 1, n_head: 2, n_embd: 8, vocab_size: 257}}
  optim: {{lr: 0.05}}
  schedule: {{warmup_steps: 2}}
data: {{tokenizer: byte, block_size: {T}, batch_size: {B}, seed: 7}}
"""


@pytest.mark.parametrize("schedule_is_saved", [True, False])
def test_a_folder_of_somebodys_own_loop_goes_on_with_its_yaml(schedule_is_saved, tmp_path, monkeypatch, capsys):
    own, yaml, out = tmp_path / "own", tmp_path / "run.yaml", tmp_path / "out.safetensors"
    monkeypatch.setitem(globals(), "new_module", partial(new_module, vocab_size=257))
    own_loop(own, schedule_is_saved)
    yaml.write_text(YAML.replace("ROOT", str(tmp_path)))
    assert main(["convert", str(own), str(out)]) == 2
    assert f"give the YAML of its run: convert {own} TO --config FILE.yaml" in capsys.readouterr().err
    assert main(["convert", str(own), str(out), "--config", str(yaml)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{out}: step 4, {2 * STEPS * B * T} tokens"

    settings = LoopSettings(STEPS + 1, accumulate_grad_batches=2)
    ours, undisturbed = new_module(dropout=0.0), new_module(dropout=0.0)
    train(ours, batches(2 * STEPS), [], settings, [Resume(load_run(out))])
    train(undisturbed, batches(), [], settings)
    assert all(map(torch.equal, ours.parameters(), undisturbed.parameters()))

    out.unlink()
    assert main(["convert", str(own), str(out), "--config", str(yaml), "--model.gpt.n_embd=16"]) == 2
    assert "of shape (24,), and the network that it describes has (48,)" in capsys.readouterr().err
    torch.save({"state": {}, "param_groups": [{"params": list(range(15))}]}, own / "optimizer.bin")
    assert main(["convert", str(own), str(out), "--config", str(yaml)]) == 2
    assert "holds an optimizer that is not ours" in capsys.readouterr().err
    assert not out.exists()


def test_a_ckpt_of_a_stock_trainer_has_as_many_tokens_as_the_yaml_says_of_a_step(tmp_path, capsys):
    trainer = Trainer(
        max_steps=STEPS, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(new_module(dropout=0.0, vocab_size=257), batches())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    (tmp_path / "run.yaml").write_text(YAML.replace("ROOT", str(tmp_path)))
    for name, more, said in (
        ("a", [], "step 4, and no word of how many tokens a step has; --config FILE.yaml says it"),
        ("b", ["--config", str(tmp_path / "run.yaml")], f"step 4, {STEPS * B * T} tokens"),
    ):
        assert main(["convert", str(tmp_path / "x.ckpt"), str(tmp_path / f"{name}.safetensors"), *more]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == f"{tmp_path / name}.safetensors: {said}"


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize("file", ["x.ckpt", "optimizer.bin", "custom_checkpoint_0.pkl", "random_states_0.pkl"])
def test_no_pickle_of_either_framework_runs_code(checkpoint, tmp_path, monkeypatch, file):
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "folder"
    convert(checkpoint, source)
    if file.endswith(".ckpt"):
        source = tmp_path / file
        torch.save({"state_dict": Bomb()}, source)
    else:
        torch.save(Bomb(), source / file)
    with pytest.raises(ValueError, match=file):
        convert(source, tmp_path / "out.safetensors")
    (tmp_path / "plain.safetensors").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match="not a checkpoint"):
        convert(tmp_path / "plain.safetensors", tmp_path / "out.safetensors")
    assert not (tmp_path / "exploded").exists()
    assert not (tmp_path / "out.safetensors").exists()


def test_the_command_says_what_it_wrote_and_refuses_in_one_sentence(checkpoint, tmp_path, capsys):
    assert main(["convert", str(checkpoint), str(tmp_path / "x.ckpt")]) == 0
    shape = "1 layers, 2 heads, 8 channels, block 8, vocabulary 11"
    assert capsys.readouterr().out.splitlines() == [
        f"{checkpoint}: a checkpoint of nanogpt_lit; {shape}",
        f"{tmp_path / 'x.ckpt'}: step 4, 64 tokens",
    ]
    for target, sentence in (
        ("x.ckpt", "x.ckpt exists already"),
        ("x.bin", "x.bin names no format; FILE.safetensors is nanogpt_lit's, FILE.ckpt Lightning's"),
    ):
        assert main(["convert", str(checkpoint), str(tmp_path / target)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert sentence in line


def test_a_folder_without_what_accelerate_has_no_place_for_is_refused_by_the_name_of_what_is_missing(
    checkpoint, tmp_path
):
    for missing, sentence in (
        ("nanogpt_lit.json", "give the YAML of its run: convert .* TO --config"),
        ("custom_checkpoint_0.pkl", "holds no state of the schedule"),
        ("random_states_0.pkl", "random_states_0.pkl is missing"),
        ("model.safetensors", "model.safetensors cannot be read"),
        ("optimizer.bin", "optimizer.bin is damaged, missing"),
    ):
        folder = tmp_path / missing.partition(".")[0]
        convert(checkpoint, folder)
        (folder / missing).unlink()
        with pytest.raises(ValueError, match=sentence):
            convert(folder, tmp_path / "out.safetensors")
