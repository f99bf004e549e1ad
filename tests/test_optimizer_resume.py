"""A run goes on with the optimizer that it was trained with, or is told before anything is written."""

import pytest
from small_runs import LOOPS, small_run

MUON = ["--model.network=llama", "--model.llama.n_layer=1", "--model.llama.n_head=2", "--model.llama.n_embd=8"]


@pytest.mark.parametrize("loop", LOOPS)
def test_another_optimizer_is_refused_in_a_sentence_and_leaves_the_run_alone(text, tmp_path, capsys, loop):
    options = small_run(text, tmp_path, *MUON, "--resume=auto", "--model.schedule.min_lr_ratio=1")
    assert loop(*options, "--trainer.max_steps=2") == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for other, key in (
        (["--model.optim.matrices=muon"], "model.optim.matrices=adamw"),
        (["--model.optim.class_path=torch.optim.SGD"], "model.optim.class_path=null"),
        (["--model.optim.state_bits=8"], "model.optim.state_bits=32"),
    ):
        assert loop(*options, *other) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
        assert f"was trained with {key}" in line
        assert "--init_from" in line
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert loop(*options, "--model.optim.class_path=torch.optim.AdamW", "--model.optim.lr=1e-3") == 0  # keeps the same
