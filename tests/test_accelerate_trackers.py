"""A user's own Accelerator: its trackers, of accelerate's and of the user's making, and what is saved by save_state."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from small_runs import curves, fit, on_two_processes

from nanogpt_lit import GPTConfig, LitNanoGPT, ScheduleConfig
from nanogpt_lit.loops.accelerate import accelerator_options, train
from nanogpt_lit.loops.contract import LoopSettings
from nanogpt_lit.run.metrics import StepMetrics

PAGE = (Path(__file__).parents[1] / "docs" / "accelerate.md").read_text(encoding="utf-8")
(PROGRAM,) = re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.M | re.S)
SETTINGS = LoopSettings(max_steps=4, gradient_clip_val=1.0, val_check_interval=2, seed=1)


class Kept(GeneralTracker):
    """A tracker of the user's own."""

    name, requires_logging_directory, main_process_only = "kept", False, False

    def __init__(self):
        super().__init__()
        self.points = []

    @property
    def tracker(self):
        return self.points

    def store_init_configuration(self, values): ...

    def log(self, values, step=None, **options):
        self.points += [(tag, step) for tag in values]


def trained(tracker):
    torch.manual_seed(1)
    module = LitNanoGPT(GPTConfig(8, 11, 1, 1, 8), schedule=ScheduleConfig(total_steps=4, warmup_steps=1))
    batches = torch.randint(0, 11, (8, 2, 8)).unbind()
    loader = [(tokens, tokens) for tokens in batches]
    accelerator = Accelerator(log_with=[tracker] if tracker else None, **accelerator_options(SETTINGS, "cpu"))
    accelerator.init_trackers("gpt")
    train(accelerator, module, loader, loader, SETTINGS, [StepMetrics(accelerator.log, 3)] if tracker else [])
    return module


def test_the_page_s_program_draws_the_curves_of_fit_and_saves_what_was_registered(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_texts").mkdir()
    (tmp_path / "my_texts" / "a.txt").write_text(text.read_text() * 3)
    saved = []
    hooked = PROGRAM.replace(
        "\n\nclass SaveState",
        "\naccelerator.register_save_state_pre_hook(lambda models, weights, folder: saved.append(folder))\n"
        "accelerator.register_for_checkpointing(counts)\n\nclass SaveState",
    )
    counts = SimpleNamespace(state_dict=lambda: {"n": 7}, load_state_dict=lambda state: None)
    exec(hooked, {"saved": saved, "counts": counts, "__name__": "page"})
    assert saved == ["runs/tracked/step_10", "runs/tracked/step_20"]
    assert torch.load("runs/tracked/step_20/custom_checkpoint_0.pkl", weights_only=True) == {"n": 7}
    options = [
        "--data.source=my_texts", "--data.tokenizer=byte", "--data.shards_dir=runs/shards", "--data.block_size=64",
        "--data.batch_size=8", "--model.gpt.n_layer=2", "--model.gpt.n_head=2", "--model.gpt.n_embd=64",
        "--model.schedule.warmup_steps=5", "--trainer.max_steps=20", "--trainer.accelerator=cpu",
        "--trainer.accumulate_grad_batches=2", "--trainer.val_check_interval=20", "--trainer.default_root_dir=runs/fit",
    ]  # fmt: skip
    assert fit(*options) == 0
    tracked, drawn = curves(tmp_path / "runs/tracked/gpt"), curves(tmp_path / "runs/fit/version_0")
    drawn = {point: value for point, value in drawn.items() if point[0] in {tag for tag, _ in tracked}}
    assert tracked == drawn
    assert ("train/loss", 20) in tracked
    assert ("val/loss", 10) in tracked


def test_a_tracker_of_the_users_own_gets_every_step_that_is_drawn_and_each_validation():
    tracker = Kept()
    trained(tracker)
    assert [step for tag, step in tracker.points if tag == "train/loss"] == [1, 3, 4]
    assert [step for tag, step in tracker.points if tag == "val/loss"] == [2, 4]


def test_training_with_trackers_is_bit_identical():
    weights = trained(Kept()).state_dict()
    for name, weight in trained(None).state_dict().items():
        assert torch.equal(weights[name], weight)


def of_two(*arguments):
    tracker = Kept()
    trained(tracker)
    return 0 if bool(tracker.points) == (torch.distributed.get_rank() == 0) else 1


@pytest.mark.long
def test_of_two_processes_the_first_one_tracks():
    assert [code for code, *_ in on_two_processes(of_two)] == [0, 0]
