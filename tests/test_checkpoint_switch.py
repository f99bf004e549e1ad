"""A run that is stopped, saved and taken up again by whichever loop: the same bits as the one that never stopped."""

import itertools
import os
import random
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import small_networks
import torch
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import GradScalerKwargs
from lightning.pytorch import Trainer
from small_runs import BOTTLES
from torch.amp import GradScaler

from nanogpt_lit.checkpoint.disk import BestEffortSaver
from nanogpt_lit.checkpoint.run_file import load_run
from nanogpt_lit.cli.settings import quiet_lightning
from nanogpt_lit.data.datamodule import TokenDataModule
from nanogpt_lit.data.sampler import StreamPosition, windows_in
from nanogpt_lit.data.shards import TokenShards
from nanogpt_lit.gpt.gpt2 import GPTConfig
from nanogpt_lit.gpt.networks import described
from nanogpt_lit.loops import accelerate, reference
from nanogpt_lit.loops.contract import LoopSettings, Observer
from nanogpt_lit.loops.lightning_plugins import RunFileIO
from nanogpt_lit.loops.lightning_run import LightningRun
from nanogpt_lit.module import LitNanoGPT
from nanogpt_lit.optim.adamw import AdamWConfig
from nanogpt_lit.optim.schedule import ScheduleConfig
from nanogpt_lit.parity.record import leaves, same
from nanogpt_lit.parity.runs import HalfOnCpu, lightning_precision
from nanogpt_lit.run.observers import RunObservers
from nanogpt_lit.run.resume import capture
from nanogpt_lit.tune.trials import MODERN

STEPS = 12
# About every other step is skipped, and the scale grows in between: switches fall before, at and after both.
OVERFLOWS = {"init_scale": 2.0**26, "backoff_factor": 2.0**-4, "growth_interval": 2, "growth_factor": 2.0**4}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_thread():
    quiet_lightning()
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("switch"), BOTTLES)


@pytest.fixture(scope="module")
def short_shards(tmp_path_factory):
    """Whose epoch is 12 batches: it ends with step 4, and again with 8 and 12, where a step takes 3 of them."""
    squares = "".join(f"{n} squared is {n * n}\n" for n in range(20))
    options = prepared(tmp_path_factory.mktemp("short"), squares[:213])
    tokens = len(TokenShards.open(Path(options["shards_dir"]), "train"))
    assert windows_in(tokens, options["block_size"], "train") == 12 * options["batch_size"]
    return options


def prepared(folder, content):
    text = folder / "text.txt"
    text.write_text(content)
    options = {"source": str(text), "tokenizer": "byte", "val_fraction": 0.1, "shards_dir": str(folder / "shards")}
    options |= {"block_size": 8, "batch_size": 2}
    TokenDataModule(**options).prepare_data()
    return options


@dataclass(frozen=True)
class Setup:
    precision: str = "32-true"
    accumulate: int = 1
    scaler: tuple = ()
    implementation: str = "fused"
    modern: bool = False

    def settings(self, until):
        return LoopSettings(
            until, self.accumulate, 0.05, self.precision, val_check_interval=4 * self.accumulate,
            limit_val_batches=2, seed=7,
        )  # fmt: skip

    def module(self):
        torch.manual_seed(3)
        gpt = GPTConfig(block_size=8, vocab_size=257, n_layer=2, n_head=2, n_embd=8, dropout=0.1)
        optim = AdamWConfig(lr=0.01, implementation=self.implementation)
        schedule = ScheduleConfig(warmup_steps=3, total_steps=STEPS)
        if self.modern:
            gpt = small_networks.modern(gpt)
            optim, schedule = replace(optim, **MODERN["optim"]), replace(schedule, **MODERN["schedule"])
        return LitNanoGPT(**described(gpt), optim=optim, schedule=schedule)

    def data(self, shards):
        data = TokenDataModule(**shards)
        data.setup()
        return data


class Diary(Observer):
    """Everything that a run computes, by step, and its state where it ends."""

    def __init__(self, step=0):
        self.step = step
        self.values, self.validations = {}, {}

    def on_train_start(self, training):
        self.training = training
        self.losses = []

    def on_batch_end(self, loss, tokens):
        self.losses.append(loss.detach().clone())

    def on_step_end(self, step, lr, grad_norm):
        assert step == self.step + 1
        self.values[step] = {"losses": self.losses, "lr": lr, "norm": grad_norm.detach().clone()}
        self.values[step]["scale"] = self.training.loss_scale()
        self.step, self.losses = step, []

    def on_validation_end(self, step, loss):
        self.validations[step] = loss.detach().clone()

    def on_train_end(self):
        state = capture(self.training, data={})
        names = ("weights", "optimizer", "schedule", "scaler", "random")
        self.end = {
            path: value.clone() if isinstance(value, torch.Tensor) else value
            for name in names
            for path, value in leaves(name, getattr(state, name))
        }


def going_on(setup, shards, path):
    """The data where the run stands, its diary, and the observers of a run that keeps its checkpoint there."""
    start, data = load_run(path) if path.exists() else None, setup.data(shards)
    diary, batches = Diary(start.step if start else 0), start.batches if start else 0
    data.position = StreamPosition(batches_done=lambda: batches)
    run = RunObservers(checkpoints=path.parent, saver=BestEffortSaver(), data_state=data.state_dict, start=start)
    return data, diary, [*run.in_order(), diary]


def by_reference(setup, shards, path, until):
    data, diary, observers = going_on(setup, shards, path)
    scaler = GradScaler("cpu", **dict(setup.scaler)) if setup.precision == "16-mixed" else None
    loaders = data.train_dataloader(), data.val_dataloader()
    reference.train(setup.module(), *loaders, setup.settings(until), observers, scaler)
    return diary


def by_accelerate(setup, shards, path, until):
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    data, diary, observers = going_on(setup, shards, path)
    settings = setup.settings(until)
    options = accelerate.accelerator_options(settings, "cpu")
    if setup.precision == "16-mixed":
        options["kwargs_handlers"].append(GradScalerKwargs(**dict(setup.scaler)))
    loaders = data.train_dataloader(), data.val_dataloader()
    accelerate.train(HalfOnCpu(**options), setup.module(), *loaders, settings, observers)
    return diary


def by_lightning(setup, shards, path, until):
    diary, settings = Diary(load_run(path).step if path.exists() else 0), setup.settings(until)
    trainer = Trainer(
        accelerator="cpu", devices=1, max_steps=until, accumulate_grad_batches=setup.accumulate,
        gradient_clip_val=settings.gradient_clip_val,
        plugins=[lightning_precision(setup.precision, dict(setup.scaler)), RunFileIO()],
        val_check_interval=settings.val_check_interval, check_val_every_n_epoch=None, limit_val_batches=2,
        num_sanity_val_steps=0, use_distributed_sampler=False, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, default_root_dir=path.parents[1],
        callbacks=[LightningRun(seed=settings.seed, observers=[diary])],
    )  # fmt: skip
    data = setup.data(shards)
    trainer.fit(setup.module(), datamodule=data, ckpt_path=path if path.exists() else None)
    return diary


LOOPS = {"L": by_lightning, "A": by_accelerate, "P": by_reference}


def run_chain(chain, setup, shards, folder):
    """chain: "L3A6P" trains to step 3 by Lightning, to 6 by accelerate, to the end by plain PyTorch"""
    path = folder / "checkpoints" / "last.safetensors"
    values, validations = {}, {}
    loops = [c for c in chain if c.isalpha()]
    ends = "".join(c if c.isdigit() else " " for c in chain).split()
    for loop, until in zip(loops, [*map(int, ends), STEPS], strict=True):
        diary = LOOPS[loop](setup, shards, path, until)
        values |= diary.values
        validations |= diary.validations
    return values, validations, diary.end


_undisturbed = {}


def assert_never_switched(chain, setup, shards, tmp_path):
    key = setup, shards["source"]
    if key not in _undisturbed:
        _undisturbed[key] = run_chain("P", setup, shards, tmp_path / "undisturbed")
    expected_values, expected_validations, expected_end = _undisturbed[key]
    values, validations, end = run_chain(chain, setup, shards, tmp_path / "switched")
    assert list(values) == list(range(1, STEPS + 1))
    for name, first, second in (
        ("step", expected_values, values),
        ("validation", expected_validations, {step: validations.get(step) for step in expected_validations}),
        ("end", expected_end, end),
    ):
        different = [
            path
            for (path, a), (other, b) in zip(leaves(name, first), leaves(name, second), strict=True)
            if path != other or not same(a, b)
        ]
        assert not different
    if setup.scaler:
        scales = [value["scale"] for value in values.values()]
        skipped = end["schedule skipped_steps"]
        assert 0 < skipped < STEPS
        assert any(a > b for a, b in itertools.pairwise(scales)), "no step was skipped"
        assert any(a < b for a, b in itertools.pairwise(scales)), "the scale never grew"


FLOAT16 = tuple(OVERFLOWS.items())
SOME = [
    ("L4A", Setup("16-mixed", 3, FLOAT16)),
    ("A5L", Setup("16-mixed", 1, FLOAT16)),
    ("L3P6A9L", Setup("bf16-mixed", 4)),
    ("P1L2A3P4L", Setup("32-true", 3, implementation="for-loop")),
    ("A7A", Setup("32-true", 4, implementation="foreach")),
    ("L8L", Setup("16-mixed", 1, FLOAT16)),
    ("L2P4A6L8A", Setup("16-mixed", 3, FLOAT16, modern=True)),
]


@pytest.mark.parametrize(("chain", "setup"), SOME, ids=lambda value: value if isinstance(value, str) else None)
def test_a_run_that_moves_between_loops_has_the_bits_of_one_that_does_not(chain, setup, shards, tmp_path):
    assert_never_switched(chain, setup, shards, tmp_path)


AT_ITS_END = [
    ("L4A", Setup("16-mixed", 3, FLOAT16)),
    ("A4L", Setup("bf16-mixed", 3)),
    ("L8L", Setup("32-true", 3)),
]


@pytest.mark.parametrize(("chain", "setup"), AT_ITS_END, ids=lambda value: value if isinstance(value, str) else None)
def test_a_run_goes_on_behind_the_last_batch_of_an_epoch(chain, setup, short_shards, tmp_path):
    assert_never_switched(chain, setup, short_shards, tmp_path)


CHAINS = ["L", "A", "L3A", "A3L", "L4A", "A4L", "P6L", "L6P", "A6A", "L8L", "L3A6P9L", "A2L4P5A8L11A"]
GRID = [
    (chain, Setup(precision, accumulate, scaler))
    for precision, scaler in (("32-true", ()), ("bf16-mixed", ()), ("16-mixed", ()), ("16-mixed", FLOAT16))
    for accumulate in (1, 3, 4)
    for chain in CHAINS
]
COUNT = int(os.environ.get("SWITCHES", "6"))
"""How many cases of the grid to run, spread over it; the whole of it is len(GRID)."""


@pytest.mark.slow
@pytest.mark.parametrize(("chain", "setup"), random.Random(1).sample(GRID, min(COUNT, len(GRID))))
def test_the_grid_of_switches(chain, setup, shards, tmp_path):
    assert_never_switched(chain, setup, shards, tmp_path)


def broken(name, load_run):
    """Reads a checkpoint as if it lacked one thing."""

    def load(path):
        state = load_run(path)
        match name:
            case "random state":
                return replace(state, random=[])
            case "growth tracker":
                return replace(state, scaler={**state.scaler, "_growth_tracker": 0})
            case "schedule":
                return replace(state, schedule={**state.schedule, "last_epoch": state.schedule["last_epoch"] + 1})
            case "position":
                return replace(state, batches=state.batches + 3)
            case "a moment's last bit":
                moment = state.optimizer["state"][0]["exp_avg"]
                moment.copy_(torch.nextafter(moment, torch.ones_like(moment)))
            case "a weight's last bit":
                weight = state.weights["gpt.transformer.ln_f.weight"]
                weight.copy_(torch.nextafter(weight, torch.zeros_like(weight)))
        return state

    return load


@pytest.mark.parametrize(
    "name", ["random state", "growth tracker", "schedule", "position", "a moment's last bit", "a weight's last bit"]
)
def test_the_comparison_sees_every_part_of_a_checkpoint(name, shards, tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "load_run", broken(name, load_run))
    with pytest.raises(AssertionError):
        assert_never_switched("P3P", Setup("16-mixed", 3, FLOAT16), shards, tmp_path)
