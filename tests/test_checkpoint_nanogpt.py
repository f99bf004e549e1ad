"""nanoGPT's ckpt.pt, by hand in its layout, and (long) as its own train.py writes and reads it."""

import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from small_networks import new_tokenizer, saved, trained
from small_runs import accelerate, curves, fit
from torch import nn

from nanogpt_lit.__main__ import main
from nanogpt_lit.checkpoint.convert import convert
from nanogpt_lit.checkpoint.run_file import load_run
from nanogpt_lit.gpt.gpt2 import GPT, GPTConfig
from nanogpt_lit.loops.contract import LoopSettings, Observer
from nanogpt_lit.loops.reference import train
from nanogpt_lit.module import LitNanoGPT
from nanogpt_lit.run.resume import Resume

V, T, B, ACCUMULATE, STEPS, MORE = 257, 16, 4, 2, 6, 20
ROUNDING = 1e-5
"""Of a loss after up to 20 steps: the fused AdamW here and theirs round differently, and so do the products."""
CONFIG = {
    "learning_rate": 1e-2, "min_lr": 1e-3, "warmup_iters": 4, "lr_decay_iters": 40, "decay_lr": True,
    "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "grad_clip": 1.0,
    "gradient_accumulation_steps": ACCUMULATE, "batch_size": B, "block_size": T,
}  # fmt: skip


def their_lr(iteration):
    c = CONFIG
    if iteration < c["warmup_iters"]:
        return c["learning_rate"] * (iteration + 1) / (c["warmup_iters"] + 1)
    done = (iteration - c["warmup_iters"]) / (c["lr_decay_iters"] - c["warmup_iters"])
    return c["min_lr"] + 0.5 * (1 + math.cos(math.pi * done)) * (c["learning_rate"] - c["min_lr"])


class Theirs:
    """A run as nanoGPT makes it: its groups, its rate, its clipping, its order of things."""

    def __init__(self, bias):
        torch.manual_seed(1)
        self.gpt = GPT(GPTConfig(T, V, n_layer=2, n_head=2, n_embd=16, bias=bias, gelu="erf"))
        parameters = list(self.gpt.parameters())
        groups = [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.1},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
        self.random = torch.Generator().manual_seed(7)
        self.iteration = 0

    def steps(self, n):
        """The batches and the losses of n steps more."""
        batches, losses = [], []
        for _ in range(n):
            for group in self.optimizer.param_groups:
                group["lr"] = their_lr(self.iteration)
            for _ in range(ACCUMULATE):
                windows = torch.randint(0, V, (B, T + 1), generator=self.random)
                batch = windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
                loss = nn.functional.cross_entropy(self.gpt(batch[0]).flatten(0, 1), batch[1].flatten())
                (loss / ACCUMULATE).backward()
                batches.append(batch)
                losses.append(loss.item())
            nn.utils.clip_grad_norm_(self.gpt.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.iteration += 1
        return batches, losses

    def save(self, path, prefix="_orig_mod.", **changes):
        c = self.gpt.config
        sizes = {name: getattr(c, name) for name in ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size")}
        checkpoint = {
            "model": {prefix + name: tensor for name, tensor in self.gpt.state_dict().items()},
            "optimizer": self.optimizer.state_dict(),
            "model_args": {**sizes, "dropout": 0.0},
            "iter_num": self.iteration,
            "best_val_loss": torch.tensor(3.5),
            "config": CONFIG,
        }
        torch.save({**checkpoint, **changes}, path)
        return path


class Losses(Observer):
    def __init__(self):
        self.losses = []

    def on_batch_end(self, loss, tokens):
        self.losses.append(loss.item())


def going_on_here(checkpoint, batches, steps):
    """The losses of our run on these batches, from the checkpoint on."""
    start = load_run(checkpoint)
    module = LitNanoGPT(**{name: start.hyper_parameters[name] for name in ("gpt", "optim", "schedule")})
    settings = LoopSettings(
        start.step + steps, start.accumulate_grad_batches, gradient_clip_val=CONFIG["grad_clip"], seed=1
    )
    losses = Losses()
    train(module, batches, [], settings, [Resume(start), losses])
    return losses.losses


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_a_run_of_nanogpt_goes_on_here_with_its_next_losses(tmp_path, capsys, bias, prefix):
    theirs = Theirs(bias)
    theirs.steps(STEPS)
    source = theirs.save(tmp_path / "ckpt.pt", prefix)
    assert main(["convert", str(source), str(tmp_path / "x.safetensors"), "--tokenizer", "byte"]) == 0
    said = capsys.readouterr().out
    assert f"{source}: nanoGPT's checkpoint; 2 layers, 2 heads, 16 channels, block 16, vocabulary 257" in said
    run = load_run(tmp_path / "x.safetensors")
    assert (run.step, run.batches, run.tokens) == (STEPS, STEPS * ACCUMULATE, STEPS * ACCUMULATE * B * T)
    assert run.validations["best"] == (STEPS, 3.5)
    batches, losses = theirs.steps(MORE)
    assert np.allclose(going_on_here(tmp_path / "x.safetensors", batches, MORE), losses, rtol=0, atol=ROUNDING)


def test_the_options_that_convert_prints_go_on_in_every_loop(tmp_path, capsys, text):
    source = Theirs(True)
    source.steps(STEPS)
    source.save(tmp_path / "ckpt.pt")
    target = tmp_path / "x.safetensors"
    assert main(["convert", str(tmp_path / "ckpt.pt"), str(target), "--tokenizer", "byte"]) == 0
    printed = re.search(r"^go on with: fit (.+)$", capsys.readouterr().out, flags=re.M)[1].split()
    here = [
        f"--data.source={text}", "--data.tokenizer=byte", f"--data.shards_dir={tmp_path / 'shards'}",
        f"--data.batch_size={B}", f"--trainer.default_root_dir={tmp_path}", "--trainer.accelerator=cpu",
        "--data.val_fraction=0.1", "--trainer.enable_progress_bar=false", "--trainer.max_steps=8",
        "--trainer.log_every_n_steps=1", "--trainer.val_check_interval=4", "--trainer.limit_val_batches=1",
    ]  # fmt: skip
    rates = []
    for loop, name in ((fit, "version_0"), (accelerate, "accelerate_0")):
        assert loop(*printed, *here) == 0
        points = curves(tmp_path / name)
        assert sorted(step for tag, step in points if tag == "train/loss") == [7, 8]
        rates.append([points["train/lr", step] for step in (7, 8)])
    assert rates[0] == rates[1]


def test_a_run_of_ours_comes_back_from_nanogpt_s_layout_unchanged(tmp_path):
    theirs = Theirs(False)
    theirs.steps(STEPS)
    convert(theirs.save(tmp_path / "ckpt.pt"), tmp_path / "x.safetensors", tokenizer="byte")
    convert(tmp_path / "x.safetensors", tmp_path / "out.pt")
    before, after = (torch.load(tmp_path / name, weights_only=True) for name in ("ckpt.pt", "out.pt"))
    assert all(torch.equal(tensor, after["model"][name[10:]]) for name, tensor in before["model"].items())
    assert after["model_args"] == before["model_args"]
    assert after["iter_num"] == STEPS
    for number, moments in before["optimizer"]["state"].items():
        assert all(torch.equal(tensor, after["optimizer"]["state"][number][name]) for name, tensor in moments.items())
    theirs.optimizer.load_state_dict(after["optimizer"])  # as nanoGPT's --init_from=resume does


def test_a_network_with_the_tanh_approximation_goes_there_with_the_effect_measured(tmp_path, capsys):
    tokenizer = new_tokenizer("byte")
    source = saved(tmp_path / "x.safetensors", trained(tokenizer), tokenizer)
    assert main(["convert", str(source), str(tmp_path / "x.pt")]) == 0
    said = capsys.readouterr().out
    there, here = map(float, re.search(r"the loss is (\S+) there and (\S+) here", said).groups())
    assert abs(there - here) < 0.01
    assert "nanoGPT computes GELU exactly" in said
    assert "the tokenizer byte stays behind; --to hf carries it" in said


def test_what_nanogpt_lacks_is_refused_with_what_carries_it(tmp_path, capsys):
    tokenizer = new_tokenizer("byte")
    source = saved(tmp_path / "x.safetensors", trained(tokenizer, steps=0, tied_head=False), tokenizer)
    assert main(["convert", str(source), str(tmp_path / "x.pt")]) == 2
    assert "--to hf carries it" in capsys.readouterr().err
    assert not (tmp_path / "x.pt").exists()


ARGUMENTS = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": T, "vocab_size": V, "bias": True}


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)

    def __repr__(self):  # part of a test's name, which has to be the same in every process that collects it
        return "Bomb()"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"config": Bomb()}, "damaged checkpoint of nanoGPT .UnpicklingError"),
        ({"model_args": {"n_layer": 2}}, "damaged checkpoint of nanoGPT .KeyError"),
        ({"model_args": {**ARGUMENTS, "n_layer": 10**9}},
         "says n_layer=1000000000 and holds"),
        ({"model_args": {**ARGUMENTS, "n_embd": 32}},
         "of shape"),
        ({"model_args": {**ARGUMENTS, "bias": False}},
         "has transformer.h.0.attn.c_attn.bias, which"),
        ({"iter_num": -1}, "iter_num=-1"),
        ({"iter_num": "many"}, "iter_num='many'"),
        ({"optimizer": {"state": {0: {"step": 1, "exp_avg": torch.zeros(2), "exp_avg_sq": torch.zeros(2)}}}},
         "an optimizer that is not ours for its network"),
        ({"optimizer": {"state": {99: {"step": 1, "exp_avg": torch.zeros(2), "exp_avg_sq": torch.zeros(2)}}}},
         "an optimizer that is not ours for its network"),
        ({"optimizer": None}, "an optimizer that is not ours for its network"),
        ({"config": {"learning_rate": -1.0}}, "model.optim.lr"),
    ],
    ids=str,
)  # fmt: skip
def test_a_checkpoint_that_lies_or_would_run_code_is_refused_in_one_sentence(
    tmp_path, monkeypatch, capsys, change, sentence
):
    monkeypatch.chdir(tmp_path)
    Theirs(True).save(tmp_path / "ckpt.pt", **change)
    assert main(["convert", "ckpt.pt", "x.safetensors", "--tokenizer", "byte"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(sentence, line), line
    assert not (tmp_path / "exploded").exists()
    assert not (tmp_path / "x.safetensors").exists()


def nanogpt(folder, record, *options):
    command = [sys.executable, str(Path(__file__).with_name("nanogpt_by_its_own.py")), str(record)]
    options = [
        *options, "--dataset=bytes", "--device=cpu", "--compile=False", "--dtype=float32", "--n_layer=2", "--n_head=2",
        "--n_embd=32", f"--block_size={T}", f"--batch_size={B}", f"--gradient_accumulation_steps={ACCUMULATE}",
        "--learning_rate=0.01", "--min_lr=0.001", "--warmup_iters=4", "--lr_decay_iters=40", "--eval_iters=1",
        f"--eval_interval={MORE}", "--out_dir=out",
    ]  # fmt: skip
    subprocess.run([*command, *options], cwd=folder, check=True, capture_output=True, timeout=300)
    return torch.load(record, weights_only=True)


@pytest.mark.long
def test_nanogpt_s_own_run_goes_on_here_and_ours_goes_on_there(tmp_path, request):
    """pytest -m long --nanogpt FOLDER, a clone of it beside the project."""
    clone = request.config.getoption("--nanogpt")
    if clone is None:
        pytest.skip("--nanogpt names no folder of nanoGPT's")
    folder = tmp_path / "nanoGPT"
    folder.mkdir()
    for name in ("train.py", "model.py", "configurator.py"):
        shutil.copy(Path(clone) / name, folder)
    (folder / "data/bytes").mkdir(parents=True)
    content = np.frombuffer(Path(__file__).read_bytes(), dtype=np.uint8).astype(np.uint16)
    for split in ("train", "val"):
        content.tofile(folder / f"data/bytes/{split}.bin")
    nanogpt(folder, tmp_path / "first", f"--max_iters={MORE}")
    checkpoint = folder / "out/ckpt.pt"
    convert(checkpoint, tmp_path / "x.safetensors")  # its vocabulary is 50304 where the data names none
    # Before the last save: they go on to the next multiple of eval_interval, and one step beyond.
    record = nanogpt(folder, tmp_path / "second", f"--max_iters={2 * MORE - 1}", "--init_from=resume")
    record = record[: MORE * ACCUMULATE]
    batches, losses = [(tokens, targets) for tokens, targets, _ in record], [loss for *_, loss in record]
    assert len(losses) == MORE * ACCUMULATE
    ours = going_on_here(tmp_path / "x.safetensors", batches, MORE)
    assert np.allclose(ours, losses, rtol=0, atol=1e-4)  # in the network's 1.6M parameters too the sums differ

    # And back: what we write is what they go on from, with the same losses as from their own.
    checkpoint.unlink()
    convert(tmp_path / "x.safetensors", checkpoint)
    again = nanogpt(folder, tmp_path / "third", f"--max_iters={2 * MORE - 1}", "--init_from=resume")
    assert [loss for *_, loss in again[: MORE * ACCUMULATE]] == losses
