"""Numbers in environment variables."""

import pytest

from nanogpt_lit.errors import UserError
from nanogpt_lit.loops.trainer_section import check_devices, check_started
from nanogpt_lit.runtime.launch import was_requeued, whole_number


def test_an_unset_and_an_empty_variable_hold_no_number():
    assert whole_number("N", {}) is None
    assert whole_number("N", {"N": " "}) is None
    assert whole_number("N", {"N": "12"}) == 12


@pytest.mark.parametrize("text", ["x", "-1", "1.5", "0x10", "٣", "1_000", "9" * 5000])
def test_anything_else_is_refused_by_name_and_in_few_words(text):
    with pytest.raises(UserError, match=r"^N=\S+ in the environment is not a whole number from 0 up"):
        whole_number("N", {"N": text})


def test_what_slurm_and_torchrun_say_is_read_so(monkeypatch):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "x")
    with pytest.raises(UserError, match="SLURM_RESTART_COUNT=x"):
        was_requeued()
    with pytest.raises(UserError, match="WORLD_SIZE=two"):
        check_started({"devices": 2, "num_nodes": 1}, {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "two"})


def test_devices_that_are_none_are_refused():
    for fine in ("auto", 1, "2", 8):
        check_devices(fine, "cpu")
        check_devices(fine, "cuda")
    check_devices(4096, "cuda")  # of a machine that is not this one
    with pytest.raises(UserError, match="starts 4096 processes on"):
        check_devices(4096, "cpu")
    for of_gpus in (-1, "-1", [0], [0, 3], "0,", "0,1"):
        check_devices(of_gpus, "cuda")
        with pytest.raises(UserError, match="no number of processes on CPUs"):
            check_devices(of_gpus, "cpu")
    for nonsense in (0, "x", -2, 10**18, "1.5", [-1], [], "", "٣", True):
        with pytest.raises(UserError, match="no number of processes on CPUs"):
            check_devices(nonsense, "cpu")
    for nonsense in ("x", -2, 10**18, "1.5", [-1], [], ""):
        with pytest.raises(UserError, match="names no GPUs"):
            check_devices(nonsense, "cuda")
