"""trainer.deterministic in every loop, what is said of it, and the process as it was afterwards."""

import os

import pytest
import torch
from small_runs import LOOPS, small_run
from torch import nn

from nanogpt_lit.gpt.gpt2 import GPTConfig
from nanogpt_lit.loops import reference
from nanogpt_lit.loops.contract import LoopSettings
from nanogpt_lit.module import LitNanoGPT
from nanogpt_lit.optim.schedule import ScheduleConfig
from nanogpt_lit.runtime.process_settings import repeatability, restored_process_settings, set_for_process

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def of_process():
    strict, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    return strict, warns, os.environ.get("CUBLAS_WORKSPACE_CONFIG"), torch.utils.deterministic.fill_uninitialized_memory


@pytest.fixture(autouse=True)
def as_in_a_new_process(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with restored_process_settings():
        torch.use_deterministic_algorithms(False)
        yield


AS_FOUND = (False, False, None, True)
STRICT = (True, False, ":4096:8", False)


@pytest.fixture
def seen(monkeypatch):
    """What the process is set to in each forward of a module."""
    seen, forward = set(), LitNanoGPT.forward

    def watched(module, tokens, targets):
        seen.add((*of_process()[:3], module.training))
        return forward(module, tokens, targets)

    monkeypatch.setattr(LitNanoGPT, "forward", watched)
    return seen


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
@pytest.mark.parametrize(
    ("value", "during"),
    [("true", (True, False, ":4096:8")), ("warn", (True, True, ":4096:8")), ("false", AS_FOUND[:3])],
)
def test_deterministic_holds_for_the_whole_run_and_is_put_back(loop, value, during, text, tmp_path, seen):
    assert loop(*small_run(text, tmp_path / "root", f"--trainer.deterministic={value}", "--trainer.max_steps=2")) == 0
    assert seen == {(*during, True), (*during, False)}
    assert of_process() == AS_FOUND


def test_it_is_put_back_after_a_run_that_fails(seen, monkeypatch):
    module = LitNanoGPT(
        GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=1, n_embd=8), schedule=ScheduleConfig(1, total_steps=2)
    )
    monkeypatch.setattr(module.gpt, "loss", None)
    module.loss = None
    batch = torch.zeros(1, 8, dtype=torch.int64), torch.zeros(1, 8, dtype=torch.int64)
    with pytest.raises(TypeError):
        reference.train(module, [batch], [], LoopSettings(2, deterministic=True))
    assert seen == {(True, False, ":4096:8", True)}
    assert of_process() == AS_FOUND


@pytest.mark.parametrize(("found", "during"), [(":16:8", ":16:8"), (":0:0", ":4096:8"), (None, ":4096:8")])
def test_a_workspace_of_the_users_stays_where_cublas_repeats_itself_with_it(found, during, monkeypatch):
    if found is not None:
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", found)
    with restored_process_settings():
        set_for_process(nn.Identity(), GPU, deterministic=True)
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == during
    assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == found


def test_what_a_user_has_set_stays_where_the_yaml_says_nothing():
    torch.use_deterministic_algorithms(True, warn_only=True)
    set_for_process(nn.Identity(), CPU, deterministic=None)
    assert of_process()[:2] == (True, True)


# What is said of it.


@pytest.mark.parametrize(
    ("device", "processes", "deterministic", "sentence"),
    [
        (CPU, 1, None, "to the bit on this CPU, with 1 thread(s)"),
        (GPU, 1, True, "to the bit on this GPU"),
        (GPU, 2, True, "to the bit, as far as NCCL"),
        (
            GPU,
            1,
            None,
            "up to rounding, since a GPU adds up in no fixed order; trainer.deterministic=true repeats to the bit",
        ),
        (GPU, 1, False, "up to rounding"),
        (GPU, 1, "warn", "up to rounding"),
        (torch.device("mps"), 1, True, "not known for mps"),
    ],
)
def test_only_what_is_so_is_said_to_repeat(device, processes, deterministic, sentence):
    assert repeatability(device, processes, deterministic).startswith(sentence)


def test_a_gpu_that_the_user_has_made_strict_is_said_to_repeat():
    torch.use_deterministic_algorithms(True)
    assert repeatability(GPU, 1, None) == "to the bit on this GPU"
    assert repeatability(GPU, 1, False).startswith("up to rounding")
    torch.use_deterministic_algorithms(True, warn_only=True)  # which is not strict: attention's backward stays as it is
    assert repeatability(GPU, 1, None).startswith("up to rounding")


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_a_run_says_at_its_start_whether_it_repeats(loop, text, tmp_path, capsys):
    assert loop(*small_run(text, tmp_path / "root", "--trainer.max_steps=1")) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("repeatable: ")]
    assert line == f"repeatable: to the bit on this CPU, with {torch.get_num_threads()} thread(s)"
