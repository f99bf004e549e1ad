"""Which processes and windows a checkpoint can be gone on with."""

import pytest

from nanogpt_lit.checkpoint.state import RunState


def stands_at(batches, processes, accumulate):
    return RunState({}, {}, {}, {}, {}, None, [], batches // accumulate, batches, processes, accumulate)


def test_the_same_processes_go_on_where_they_were():
    assert stands_at(12, 2, 4).batches_on(2, 4, dropout=0.1) == 12
    assert stands_at(6, 1, 4).batches_on(1, 4, dropout=0.1) == 6  # a loader that ends inside a window


@pytest.mark.parametrize(("processes", "accumulate", "batches"), [(2, 2, 6), (4, 1, 3), (1, 4, 12)])
def test_other_processes_go_on_with_the_samples_that_follow(processes, accumulate, batches):
    assert stands_at(12, 1, 4).batches_on(processes, accumulate, dropout=0.0) == batches
    # And back.
    assert stands_at(batches, processes, accumulate).batches_on(1, 4, dropout=0.0) == 12


def test_other_processes_with_another_batch_are_refused_with_what_works():
    with pytest.raises(ValueError, match=r"1 x trainer.accumulate_grad_batches=4 .*_batches=2 does here"):
        stands_at(12, 1, 4).batches_on(2, 4, dropout=0.0)
    with pytest.raises(ValueError, match="a number of processes that divides 4 can"):
        stands_at(12, 1, 4).batches_on(3, 1, dropout=0.0)


def test_other_processes_with_dropout_are_refused():
    for accumulate in (2, 4):  # which no other number would help
        with pytest.raises(ValueError, match=r"dropout=0.1; start 1, or set the dropout .* model.llama.dropout=0"):
            stands_at(12, 1, 4).batches_on(2, accumulate, dropout=0.1)


def test_an_accumulation_that_cuts_the_position_is_refused_with_the_nearest_that_does_not():
    assert stands_at(12, 1, 4).batches_on(1, 3, dropout=0.1) == 12
    with pytest.raises(ValueError, match=r"12 micro-batches, which trainer.accumulate_grad_batches=5 .*; 4 does not"):
        stands_at(12, 1, 4).batches_on(1, 5, dropout=0.1)
