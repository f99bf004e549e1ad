"""Going on from a checkpoint as a user does it: fit and the accelerate loop, each from what either of them wrote."""

import re
from dataclasses import replace

import pytest
from small_runs import accelerate, curves, different, fit, on_two_processes, small_run

from nanogpt_lit.checkpoint.run_file import load_run, save_run
from nanogpt_lit.parity.record import same


def halves(text, root, *more):
    """6 steps with a whole validation, and so a checkpoint, after 3."""
    return small_run(
        text, root, "--trainer.max_steps=6", "--trainer.val_check_interval=6", "--trainer.limit_val_batches=1.0", *more
    )


@pytest.fixture(scope="module")
def undisturbed(text, tmp_path_factory):
    root = tmp_path_factory.mktemp("undisturbed")
    assert fit(*halves(text, root)) == 0
    return root / "version_0"


@pytest.mark.parametrize(("loop", "name"), [(fit, "version_0"), (accelerate, "accelerate_0")])
def test_a_run_gone_on_from_its_middle_ends_as_if_it_had_never_stopped(undisturbed, text, tmp_path, loop, name):
    middle = undisturbed / "checkpoints" / "previous.safetensors"
    assert load_run(middle).step == 3
    assert loop(*halves(text, tmp_path), f"--ckpt_path={middle}") == 0
    assert not different(tmp_path / name / "checkpoints/last.safetensors", undisturbed / "checkpoints/last.safetensors")
    expected = {point: value for point, value in curves(undisturbed).items() if point[1] > 3}
    assert curves(tmp_path / name) == expected


def test_the_best_is_of_the_whole_run(undisturbed, text, tmp_path):
    middle = tmp_path / "middle.safetensors"
    save_run(middle, replace(load_run(undisturbed / "checkpoints/previous.safetensors"), validations={
        "latest": (3, 0.5), "best": (3, 0.5),
    }))  # fmt: skip
    for loop, name in ((fit, "version_0"), (accelerate, "accelerate_0")):
        assert loop(*halves(text, tmp_path), f"--ckpt_path={middle}") == 0
        assert [path.stem for path in (tmp_path / name / "checkpoints").iterdir()] == ["last"]
        assert load_run(tmp_path / name / "checkpoints/last.safetensors").validations["best"] == (3, 0.5)


@pytest.mark.parametrize("loop", [fit, accelerate])
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--ckpt_path=nowhere.safetensors", "nowhere.safetensors does not exist"),
        ("--model.gpt.n_embd=16", "model.gpt.n_embd is 8 there and 16 here"),
        ("--trainer.accumulate_grad_batches=4", "val_check_interval=6 would save .* inside a step .*; 4 or 8 works"),
        ("--data.tokenizer=char --model.gpt.vocab_size=257", "the checkpoint was trained with another tokenizer"),
    ],
)
def test_what_cannot_go_on_is_refused_in_one_sentence(undisturbed, text, tmp_path, capsys, loop, options, sentence):
    last = undisturbed / "checkpoints" / "last.safetensors"
    assert loop(*halves(text, tmp_path), f"--ckpt_path={last}", *options.split()) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert re.search(sentence, line)
    if loop is accelerate or "nowhere" in options:
        assert not [*tmp_path.glob("version_*"), *tmp_path.glob("accelerate_*")]  # no run was begun


def test_a_model_checkpoint_of_the_yaml_writes_the_same_format_into_a_swept_folder(undisturbed, text, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "mine.safetensors.partial").write_bytes(b"cut short")
    mine = ["--trainer.callbacks+=ModelCheckpoint", f"--trainer.callbacks.dirpath={folder}"]
    mine += ["--trainer.callbacks.every_n_train_steps=4", "--trainer.callbacks.filename=mine"]
    assert fit(*halves(text, tmp_path, *mine)) == 0
    # last is written at the end of every run, beside what the YAML's own callback keeps
    assert sorted(path.name for path in folder.iterdir()) == ["last.safetensors", "mine.safetensors"]
    assert load_run(folder / "mine.safetensors").step == 4
    assert accelerate(*halves(text, tmp_path), f"--ckpt_path={folder / 'mine.safetensors'}") == 0
    last = "checkpoints/last.safetensors"
    assert not different(tmp_path / "accelerate_0" / last, undisturbed / last)


@pytest.mark.parametrize("when", ["save_on_exception=true", "train_time_interval=00:00:01"])
def test_a_model_checkpoint_that_may_save_half_a_step_is_refused(text, tmp_path, capsys, when):
    mine = ["--trainer.callbacks+=ModelCheckpoint", f"--trainer.callbacks.{when}"]
    assert fit(*halves(text, tmp_path, *mine)) == 2
    assert when.partition("=")[0] in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_go_on_as_two_and_as_one_only_without_dropout(text, tmp_path, capsys):
    options = halves(text, tmp_path)
    two = ["--trainer.devices=2", "--trainer.strategy=ddp"]
    ended = [(0, [])] * 2
    assert on_two_processes(fit, *options, *two) == ended
    whole = tmp_path / "version_0" / "checkpoints"
    states = load_run(whole / "last.safetensors").random
    assert len(states) == 2
    assert not same(states[0]["cpu"], states[1]["cpu"])  # each process has dropout masks of its own
    middle = f"--ckpt_path={whole / 'previous.safetensors'}"
    assert on_two_processes(accelerate, *options, middle) == ended
    assert on_two_processes(fit, *options, *two, middle) == ended
    for name in ("accelerate_0", "version_1"):
        assert not different(tmp_path / name / "checkpoints/last.safetensors", whole / "last.safetensors")

    capsys.readouterr()
    alone = ["--trainer.accumulate_grad_batches=4", "--trainer.val_check_interval=12", middle]
    ends = []
    for loop, kind in ((fit, "version"), (accelerate, "accelerate")):
        assert loop(*options, *alone) == 2
        assert "2 processes, each with dropout masks of its own" in capsys.readouterr().err
        assert loop(*options, *alone, "--model.gpt.dropout=0") == 0
        folder = max(tmp_path.glob(f"{kind}_*"))
        tokens = {step: value for (tag, step), value in curves(folder).items() if tag == "train/tokens"}
        assert tokens == {step: 128.0 * step for step in (4, 5, 6)}
        ends.append(folder / "checkpoints" / "last.safetensors")
        assert load_run(ends[-1]).batches == 24
    assert not different(*ends)
