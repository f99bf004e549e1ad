"""Batches put in turns, dealt out by accelerate itself."""

from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import DataLoader

from nanogpt_lit.data.interleave import interleave

LISTS = [[[0, 1], [4, 5], [8]], [[2, 3], [6, 7], [9]]]  # of two processes; the last turn is smaller


def test_accelerate_deals_out_to_each_process_its_own_batches():
    loader = interleave([DataLoader(range(10), batch_sampler=batches) for batches in LISTS])
    assert len(loader) == 6
    for rank, own in enumerate(LISTS):
        assert list(BatchSamplerShard(loader.batch_sampler, 2, rank, even_batches=False)) == own
