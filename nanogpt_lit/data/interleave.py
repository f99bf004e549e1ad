"""One loader for several processes, whose batches a framework deals out to them one by one."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch.utils.data import DataLoader, Sampler


class Interleaved(Sampler[list[int]]):
    """Yield the first batch of each sampler, then the second of each: dealt out, every process gets its own."""

    def __init__(self, samplers: Sequence[Any]) -> None:
        self.samplers = samplers

    def __iter__(self) -> Iterator[list[int]]:
        for turn in zip(*self.samplers, strict=True):
            yield from turn

    def __len__(self) -> int:
        return sum(len(sampler) for sampler in self.samplers)


def interleave(loaders: Sequence[DataLoader]) -> DataLoader:
    """One loader whose batches take turns. loaders: of each process, by rank"""
    return with_batches(loaders[0], Interleaved([loader.batch_sampler for loader in loaders]))


def with_batches(loader: DataLoader, batches: Any) -> DataLoader:
    """The loader with other batches of samples, read in this process."""
    return DataLoader(
        loader.dataset,
        batch_sampler=batches,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        generator=loader.generator,
    )
