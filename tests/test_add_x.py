"""docs/add_x.md, done as it says."""

import re
from pathlib import Path

import pytest
import torch
from small_runs import LOOPS as LOOPS_OF_RUNS
from small_runs import curves, different, fit, small_run
from three_loops import assert_loops_agree, prepared_data

from nanogpt_lit.checkpoint.run_file import load_run
from nanogpt_lit.data import prepare
from nanogpt_lit.data.documents import TextDocument
from nanogpt_lit.errors import UserError
from nanogpt_lit.gpt.gpt2 import GPT, GPTConfig
from nanogpt_lit.loops.contract import LoopSettings
from nanogpt_lit.optim.adamw import AdamWConfig, build_optimizer
from nanogpt_lit.optim.schedule import ScheduleConfig
from nanogpt_lit.parity.runs import Case
from nanogpt_lit.run.metrics import StepMetrics

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "add_x.md").read_text(encoding="utf-8")
TINY = GPTConfig(block_size=16, vocab_size=257, n_layer=1, n_head=1, n_embd=8)
SGD = AdamWConfig(lr=0.1, class_path="torch.optim.SGD", init_args={"momentum": 0.9})


def test_the_page_names_files_and_names_that_are_there():
    paths = set(re.findall(r"`((?:nanogpt_lit|tests)/[\w./]+)`", PAGE))
    assert len(paths) > 8
    assert [path for path in paths if not (ROOT / path).exists()] == []
    sources_of = "".join((ROOT / path).read_text(encoding="utf-8") for path in paths if path.endswith(".py"))
    for name in ("curves", "warmup_decay", "open_source", "CLASHES", "KNOWN_DIFFERENCES"):
        assert name in PAGE
        assert re.search(rf"(def |^){name}\b", sources_of, re.MULTILINE), name


def test_an_optimizer_by_its_class_path_takes_the_steps_of_the_class_itself():
    torch.manual_seed(0)
    ours, theirs = GPT(TINY), GPT(TINY)
    theirs.load_state_dict(ours.state_dict())
    matrices = [p for p in theirs.parameters() if p.dim() >= 2]
    vectors = [p for p in theirs.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizers = [build_optimizer(ours.named_parameters(), SGD), torch.optim.SGD(groups, lr=0.1, momentum=0.9)]
    tokens = torch.randint(0, 257, (2, 16))
    for _ in range(3):
        for gpt, optimizer in zip((ours, theirs), optimizers, strict=True):
            gpt.loss(tokens, tokens).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepared_data(tmp_path_factory.mktemp("add_x"), block_size=16)


def test_the_three_loops_train_with_it_to_the_same_bits(data):
    settings = LoopSettings(4, 2, 1.0, "16-mixed", val_check_interval=4, limit_val_batches=1, seed=3)
    case = Case(settings, TINY, SGD, ScheduleConfig(warmup_steps=1, total_steps=4))
    assert_loops_agree(case, data)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"class_path": "antigravity.SGD"}, "--trust antigravity"),  # importing it would open a browser
        ({"class_path": "subprocess.Popen"}, "is no optimizer"),
        ({"class_path": "torch.optim.SDG"}, "cannot be imported"),
        ({"class_path": "torch.optim.SGD", "init_args": {"momentu": 1}}, "momentu"),
        ({"class_path": None, "init_args": {"momentum": 1}}, "set that too"),
        ({"class_path": "torch.optim.SGD", "matrices": "muon"}, "replaces AdamW"),
    ],
)
def test_a_class_that_cannot_be_the_optimizer_is_one_sentence_and_runs_nothing(changes, words):
    with pytest.raises(UserError, match=words):
        build_optimizer(GPT(TINY).named_parameters(), AdamWConfig(**changes))


def test_a_run_with_it_goes_on_to_the_same_bits(text, tmp_path):
    by_path = ["--model.optim.class_path=torch.optim.SGD", "--model.optim.init_args={momentum: 0.9}"]
    assert fit(*small_run(text, tmp_path, *by_path)) == 0
    checkpoints = tmp_path / "version_0" / "checkpoints"
    assert load_run(checkpoints / "previous.safetensors").step < 8
    assert fit(*small_run(text, tmp_path, *by_path), f"--ckpt_path={checkpoints / 'previous.safetensors'}") == 0
    assert different(checkpoints / "last.safetensors", tmp_path / "version_1/checkpoints/last.safetensors") == []


class Countdown:
    """A source of text, as a reader of the page would write it."""

    def __init__(self):
        self.skipped = set()

    def documents(self):
        for n in range(200, 0, -1):
            yield TextDocument(f"{n} bottles of beer on the wall, {n} bottles of beer.\n")

    def fingerprint(self):
        return {"countdown": 200}

    def text_bytes(self):
        return None


def test_a_source_and_a_curve_are_one_place_each_and_both_loops_have_them(text, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "open_source", lambda name, *rest: {"countdown": Countdown}[name]())
    logged = StepMetrics.curves
    monkeypatch.setattr(
        StepMetrics, "curves", lambda self, **values: logged(self, **values) | {"train/half_lr": values["lr"] / 2}
    )
    options = small_run(text, tmp_path, "--trainer.max_steps=2", "--trainer.val_check_interval=2")
    for loop, folder in LOOPS_OF_RUNS.items():
        assert loop(*options, "--data.source=countdown", f"--data.shards_dir={tmp_path / 'shards'}") == 0
        points = curves(tmp_path / folder)
        assert points["train/half_lr", 2] == pytest.approx(points["train/lr", 2] / 2)
