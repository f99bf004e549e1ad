"""early_stopping_patience: the end of a run that learns nothing more, in every loop and through a resume."""

import math
import re
from contextlib import redirect_stdout
from io import StringIO

import pytest
import torch
from small_runs import BOTTLES, LOOPS, curves, different, fit, on_two_processes, small_run

from nanogpt_lit.checkpoint.run_file import load_run
from nanogpt_lit.checkpoint.state import ValidationRecord
from nanogpt_lit.loops.contract import LoopSettings
from nanogpt_lit.loops.reference import train
from nanogpt_lit.module import LitNanoGPT
from nanogpt_lit.optim.adamw import AdamWConfig
from nanogpt_lit.optim.schedule import ScheduleConfig
from nanogpt_lit.run.guards import EarlyStopping
from nanogpt_lit.run.metrics import StepMetrics

WORSE = ["--model.optim.lr=3", "--model.schedule.warmup_steps=0", "--trainer.max_steps=40", "--model.gpt.dropout=0"]
"""The network is soon worse than in the beginning. A validation after each second step."""


ANOTHER_TEXT = "data: this text is another than the checkpoint's. ckpt_path goes on with the run"


def options_of(text, root, *more):
    # A rate that does not know how long the run is.
    return small_run(text, root, *WORSE, "--early_stopping_patience=3", "--model.schedule.min_lr_ratio=1", *more)


@pytest.fixture(scope="module")
def ended(text, tmp_path_factory):
    """Of each loop: the folder of a run that has ended early, and what it printed."""
    root, found = tmp_path_factory.mktemp("ended"), {}
    for loop, name in LOOPS.items():
        with redirect_stdout(StringIO()) as said:
            assert loop(*options_of(text, root)) == 0
        found[loop] = root / name, said.getvalue()
    return found


def losses_of(folder):
    return {step: value for (tag, step), value in curves(folder).items() if tag == "val/loss"}


@pytest.mark.parametrize("loop", LOOPS)
def test_it_ends_after_so_many_validations_without_a_better_loss_and_best_is_kept(ended, loop):
    folder, said = ended[loop]
    last, best = (load_run(folder / f"checkpoints/{name}.safetensors") for name in ("last", "best"))
    losses = losses_of(folder)
    assert best.step == min(losses, key=losses.get)
    assert last.step == max(losses) == best.step + 3 * 2 < 40
    assert last.validations["since_best"] == 3
    expected = f"3 validations in a row without a better loss than {losses[best.step]:.4f} at step {best.step}"
    assert re.search(r"^ended early +(.+)$", said, flags=re.M)[1] == expected
    assert re.search(rf"^steps +{last.step}$", said, flags=re.M)


def test_the_loops_end_alike(ended):
    assert not different(*(folder / "checkpoints/last.safetensors" for folder, _ in ended.values()))


@pytest.mark.parametrize("loop", LOOPS)
def test_bits_per_byte_are_drawn_with_every_validation(ended, loop):
    folder, _ = ended[loop]
    for step, loss in losses_of(folder).items():  # a byte a token
        assert curves(folder)["val/bits_per_byte", step] == pytest.approx(loss / math.log(2), rel=1e-5)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_resumed_run_counts_on_ends_with_the_same_bits_and_is_then_complete(ended, text, tmp_path, capsys, loop):
    resumed = options_of(text, tmp_path, "--resume=auto")
    last = tmp_path / LOOPS[loop] / "checkpoints/last.safetensors"
    whole = ended[loop][0] / "checkpoints/last.safetensors"
    assert loop(*resumed, f"--trainer.max_steps={load_run(whole).step - 4}") == 0
    assert loop(*resumed) == 0
    assert not different(last, whole)
    capsys.readouterr()
    assert loop(*resumed) == 0
    assert "is complete: the run ended early, after 3 validations in a row" in capsys.readouterr().out
    assert loop(*resumed, "--early_stopping_patience=4") == 0
    assert load_run(last).step > load_run(whole).step
    assert ANOTHER_TEXT not in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_end_together(text, tmp_path):
    options = small_run(text, tmp_path, *WORSE, "--early_stopping_patience=2", "--trainer.accumulate_grad_batches=1")
    options += ["--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.val_check_interval=2"]
    assert on_two_processes(fit, *options) == [(0, []), (0, [])]
    assert load_run(tmp_path / "version_0/checkpoints/last.safetensors").step < 40


def test_the_plain_loop_takes_it_as_any_observer(tiny_gpt):
    torch.manual_seed(1)
    tokens = torch.randint(0, 10, (2, 9))
    validation = [(tokens[:, :-1], torch.full((2, 8), 10))]  # what the training makes ever less likely
    metrics = StepMetrics(lambda values, step: None, 1)
    stop = EarlyStopping(2, metrics)
    module = LitNanoGPT(tiny_gpt, AdamWConfig(lr=0.01), ScheduleConfig(warmup_steps=0, total_steps=100))
    settings = LoopSettings(100, val_check_interval=1)
    train(module, [(tokens[:, :-1], tokens[:, 1:])], validation, settings, [metrics, stop])
    assert stop.has_ended
    assert metrics.step == metrics.validations.best[0] + 2 == 3


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--early_stopping_patience=0"], "early_stopping_patience=0 must be at least 1 validation"),
        (
            ["--early_stopping_patience=2", "--trainer.limit_val_batches=0"],
            "trainer.limit_val_batches=0: it counts",
        ),
    ],
)
@pytest.mark.parametrize("loop", LOOPS)
def test_what_cannot_be_waited_for_is_refused_in_one_sentence(text, tmp_path, capsys, loop, options, sentence):
    assert loop(*small_run(text, tmp_path, *options)) == 2
    assert sentence in capsys.readouterr().err


# Another text.


def test_a_record_of_another_text_begins_anew():
    record = ValidationRecord("a")
    for step, loss in ((2, 3.0), (4, 2.0), (6, 2.5), (8, 2.6)):
        record.add(step, loss)
    assert (record.best, record.since_best) == ((4, 2.0), 2)
    same, other, any_text = (ValidationRecord(text) for text in ("a", "b", None))
    for new in (same, other, any_text):
        new.load_state_dict(record.state_dict())
    assert same.state_dict() == record.state_dict()
    assert (other.best, other.latest, other.since_best) == (None, None, 0)
    assert any_text.best == (4, 2.0)
    other.load_state_dict({"latest": (1, 1.0), "best": (1, 1.0)})  # of a run that did not say which text
    assert other.best == (1, 1.0)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_checkpoint_on_another_text_says_what_goes_on_and_its_best_is_of_this_text(ended, tmp_path, capsys, loop):
    start = ended[loop][0] / "checkpoints/last.safetensors"
    other = tmp_path / "other.txt"
    other.write_text("".join(reversed(BOTTLES)))
    begun = load_run(start).step
    assert loop(*options_of(other, tmp_path, f"--ckpt_path={start}", f"--trainer.max_steps={begun + 4}")) == 0
    said = capsys.readouterr().out
    assert ANOTHER_TEXT in said
    assert "name the checkpoint by init_from" in said
    folder = tmp_path / LOOPS[loop]
    run, losses = load_run(folder / "checkpoints/last.safetensors"), losses_of(folder)
    assert run.step == begun + 4  # and not where the count of the other text would have ended it
    assert min(losses) > begun
    assert run.validations["best"] == (min(losses, key=losses.get), pytest.approx(min(losses.values())))
    assert (folder / "checkpoints/best.safetensors").is_file()
