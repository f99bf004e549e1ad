"""Numbers in environment variables."""

import pytest

from nanogpt_lit.errors import UserError
from nanogpt_lit.loops.strategies import check_started
from nanogpt_lit.runtime.environment import whole_number
from nanogpt_lit.runtime.slurm import was_requeued


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
