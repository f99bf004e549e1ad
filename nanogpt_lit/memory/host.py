"""Host memory as a place for tensors, and copies between it and the card that run beside the card's computation.

On a CUDA card copies are asynchronous: the host's side is page-locked, they run on streams of their own, and events
order them. Without a card the same calls copy at once. In a memory trace (plan/trace.py) the card is "cpu" and the
host "meta", and so the fake tensors that stand for the host's lie there.
"""

import weakref
from functools import cache

import torch
from torch import Tensor


def host_of(tensor: Tensor) -> torch.device:
    """The host's device, seen from a tensor on the card."""
    return torch.device("meta" if hasattr(tensor, "fake_device") else "cpu")


def empty_on_host(like: Tensor) -> Tensor:
    """Room for a copy of a tensor of the card, page-locked, from a cache: for what stays a short time."""
    if hasattr(like, "fake_device"):  # in a trace the room is as large as PyTorch's cache makes it, a power of two
        elements = 2 ** (like.nbytes - 1).bit_length() // like.element_size()
        return torch.empty(elements, dtype=like.dtype, device=host_of(like))[: like.numel()].view(like.shape)
    return torch.empty_like(like, device=host_of(like), pin_memory=like.is_cuda)


def page_lock(tensor: Tensor) -> None:
    """Lets a card copy this host tensor asynchronously, for as long as its memory lives.

    In place, because PyTorch's own page-locked allocator rounds sizes up to a power of two: up to twice the memory.
    Where the system refuses, the tensor stays as it is, and its copies are slower.
    """
    storage = tensor.untyped_storage()
    if tensor.device.type != "cpu" or storage.nbytes() == 0 or tensor.is_pinned():
        return
    runtime = torch.cuda.cudart()
    address = storage.data_ptr()
    if int(runtime.cudaHostRegister(address, storage.nbytes(), 0)) == 0:
        weakref.finalize(storage, runtime.cudaHostUnregister, address).atexit = False


class Lane:
    """A queue of copies beside the computation of one device; where that is no CUDA card, no queue at all."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def copy(self, source: Tensor, target: Tensor, after: "Mark") -> "Mark":
        """Queues a copy, to begin when `after` has been reached, and returns its end.

        A source on the card may be released at once; one on the host is to stay as it is until then.
        """
        if self._stream is None:
            target.copy_(source)
            return Mark()
        if after.event is not None:
            self._stream.wait_event(after.event)
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        if source.is_cuda:
            source.record_stream(self._stream)  # its memory is not given away before
        return Mark(self._stream)


@cache
def lanes(device: torch.device) -> tuple[Lane, Lane]:
    """What arrives on the device, and what leaves it: a bus carries both at once."""
    return Lane(device), Lane(device)


class Mark:
    """A point in a queue of the card, by default in that of its computation."""

    def __init__(self, stream: "torch.cuda.Stream | None" = None) -> None:
        self.event = stream.record_event() if stream is not None else None

    @classmethod
    def now(cls, device: torch.device) -> "Mark":
        """The end of what the computation has been given so far."""
        return cls(torch.cuda.current_stream(device) if device.type == "cuda" else None)

    def hold_computation(self) -> None:
        """The card computes nothing further until this point is reached; the caller goes on."""
        if self.event is not None:
            torch.cuda.current_stream().wait_event(self.event)

    def wait(self) -> None:
        """The caller itself waits: what was copied to the host may be read."""
        if self.event is not None:
            self.event.synchronize()
