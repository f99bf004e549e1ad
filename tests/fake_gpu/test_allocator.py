"""The allocator of the plan against PyTorch's own, over sequences that no network makes."""

import random

import pytest
import torch
from apart import apart

from nanogpt_lit.plan.allocator import CachingAllocator, ExpandableAllocator


@pytest.mark.parametrize("expandable", [False, True])
def test_any_sequence_reserves_to_the_byte_what_pytorch_does(expandable, tmp_path):
    assert apart(differences, expandable, log=tmp_path / "log") == []


def differences(expandable, sequences=40, requests=400):
    torch._C._accelerator_setAllocatorSettings(f"expandable_segments:{expandable}")
    found = []
    for seed in range(sequences):
        draw = random.Random(seed)
        torch.cuda.empty_cache()
        assert torch.cuda.memory_reserved() == 0
        ours, live = ExpandableAllocator() if expandable else CachingAllocator(), {}
        for serial in range(requests):
            if live and draw.random() < 0.45:
                gone = draw.choice(list(live))
                torch.cuda.caching_allocator_delete(live.pop(gone))
                ours.free(gone)
            else:
                size = int(2 ** draw.uniform(5, 27))  # 32 bytes to 128 MiB
                live[serial] = torch.cuda.caching_allocator_alloc(size)
                ours.malloc(serial, size)
            theirs = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
            if theirs != (ours.allocated, ours.reserved):
                found.append((seed, serial, theirs, (ours.allocated, ours.reserved)))
                break
        for address in live.values():
            torch.cuda.caching_allocator_delete(address)
    return found
