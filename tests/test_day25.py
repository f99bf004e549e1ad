"""A course's training script, written out with raw accelerate, beside configs/day25.yaml in every loop."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from lightning import seed_everything
from small_runs import LOOPS

from nanogpt_lit import GPTConfig, TokenDataModule
from nanogpt_lit.checkpoint.run_file import load_run
from nanogpt_lit.loops import reference
from nanogpt_lit.loops.contract import LoopSettings
from nanogpt_lit.module import LitNanoGPT
from nanogpt_lit.optim.adamw import AdamWConfig
from nanogpt_lit.optim.schedule import ScheduleConfig

DAY25 = Path(__file__).parents[1] / "configs" / "day25.yaml"
NETWORK = {"n_layer": 2, "n_head": 2, "n_embd": 16}
STEPS = 6


def batches(text, folder):
    data = TokenDataModule(
        source=str(text), tokenizer="byte", block_size=16, batch_size=4, val_fraction=0.1, shards_dir=str(folder)
    )
    data.prepare_data()
    data.setup("fit")
    return data


def course_script(data, precision):
    """What day 25 teaches, with the network of this project; nothing else here is of this project."""
    accelerator = Accelerator(mixed_precision=precision, gradient_accumulation_steps=4, cpu=True)
    model = LitNanoGPT(GPTConfig(block_size=16, vocab_size=data.vocab_size, **NETWORK))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    model, optimizer, loader = accelerator.prepare(model, optimizer, data.train_dataloader())
    model.train()
    steps = 0
    while True:
        for X, Y in loader:
            with accelerator.accumulate(model):
                loss = model(X, Y)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            steps += accelerator.sync_gradients
            if steps == STEPS:
                return accelerator.unwrap_model(model).state_dict()


def plain_loop(data, precision):
    settings = LoopSettings(max_steps=STEPS, accumulate_grad_batches=4, precision=precision)
    optim = AdamWConfig(lr=3e-4, beta2=0.999, weight_decay=0.01, decay_vectors=True, implementation="foreach")
    schedule = ScheduleConfig(warmup_steps=0, min_lr_ratio=1, total_steps=STEPS)
    module = LitNanoGPT(GPTConfig(block_size=16, vocab_size=data.vocab_size, **NETWORK), optim, schedule)
    reference.train(module, data.train_dataloader(), [], settings)
    return module.state_dict()


def by_command(loop, text, root, precision):
    assert loop(*options(text, root, precision)) == 0
    return load_run(root / LOOPS[loop] / "checkpoints" / "last.safetensors").weights


def options(text, root, precision):
    return [
        f"--config={DAY25}", *(f"--model.gpt.{name}={value}" for name, value in NETWORK.items()),
        f"--trainer.default_root_dir={root}", "--trainer.accelerator=cpu", f"--trainer.precision={precision}",
        f"--trainer.max_steps={STEPS}", "--trainer.limit_val_batches=1", f"--data.source={text}",
        "--data.tokenizer=byte", "--data.block_size=16", "--data.val_fraction=0.1",
        f"--data.shards_dir={root.parent / 'shards'}",
    ]  # fmt: skip


# 16-mixed is left out: accelerate has no float16 without a GPU, and would train in float32 without a word.
@pytest.mark.parametrize(("theirs", "ours"), [("no", "32-true"), ("bf16", "bf16-mixed")])
@pytest.mark.parametrize("loop", [*LOOPS, plain_loop], ids=lambda loop: loop.__name__)
def test_the_settings_train_to_the_bits_of_the_course(loop, theirs, ours, text, tmp_path):
    data = batches(text, tmp_path / "shards")
    seed_everything(1337)
    expected = course_script(data, theirs)
    seed_everything(1337)
    trained = plain_loop(data, ours) if loop is plain_loop else by_command(loop, text, tmp_path / "root", ours)
    assert trained.keys() == expected.keys()
    for name, value in trained.items():
        assert torch.equal(value, expected[name]), name
