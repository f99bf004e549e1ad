"""Host memory as a place for tensors, and copies between it and the device that run beside the device's computation.

On a CUDA device copies are asynchronous: the host's side is page-locked, they run on streams of their own, and events
order them. On others the same calls copy at once. In a memory trace (plan/trace.py) the device is "cpu" and the host
"meta", and so the fake tensors that stand for the host's lie there.
"""

import sys
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from tqdm import tqdm

from nanogpt_lit.gpt.attention import LayerCache
from nanogpt_lit.memory.techniques import Recomputed


def host_of(tensor: Tensor) -> torch.device:
    """Host memory, seen from a tensor on the device."""
    return torch.device("meta" if hasattr(tensor, "fake_device") else "cpu")


def empty_on_host(like: Tensor) -> Tensor:
    """Room for a copy of a tensor of the device, page-locked, from PyTorch's cache: for what stays a short time."""
    if hasattr(like, "fake_device"):  # in a trace the room is as large as that cache makes it, a power of two
        elements = 2 ** (like.nbytes - 1).bit_length() // like.element_size()
        room = torch.empty(elements, dtype=like.dtype, device=host_of(like))
        page_lock(room, like.device)
        return room[: like.numel()].view(like.shape)
    if like.is_cuda and not _refusals:
        try:
            return torch.empty_like(like, device="cpu", pin_memory=True)
        except torch.AcceleratorError as error:
            _note_refusal(str(error))
    return torch.empty_like(like, device=host_of(like))


def page_lock(tensor: Tensor, device: torch.device) -> None:
    """Let a GPU copy this host tensor asynchronously, for as long as its memory lives.

    In place, because PyTorch's own page-locked allocator rounds sizes up to a power of two: up to twice the memory.
    Where the system refuses, the tensor stays as it is, and its copies are slower.
    device: of what it is copied from and to; on the host itself nothing is copied, and nothing is locked
    """
    if tensor.device == device:
        return
    if hasattr(tensor, "fake_device"):
        for note in page_lock_notes:
            note(tensor)
        return
    storage = tensor.untyped_storage()
    if _refusals or device.type != "cuda" or storage.nbytes() == 0 or tensor.is_pinned():
        return
    runtime, address = torch.cuda.cudart(), storage.data_ptr()
    error = runtime.cudaHostRegister(address, storage.nbytes(), 0)
    if int(error) == 0:
        weakref.finalize(storage, runtime.cudaHostUnregister, address).atexit = False
        return
    # CUDA's runtime keeps the error, and the next kernel that is launched would take it for its own.
    with suppress(torch.AcceleratorError):
        torch.zeros((), device=device)
    if int(error) == CUDA_ERROR_MEMORY_ALLOCATION:
        _note_refusal(runtime.cudaGetErrorString(error))


CUDA_ERROR_MEMORY_ALLOCATION = 2
"""Error of cudaHostRegister: the system locks no more. Others are of one tensor, as of a page that two share."""
page_lock_notes: list[Callable[[Tensor], None]] = []
"""Callbacks of memory traces, which count what a GPU would have page-locked."""
_refusals: list[str] = []


def _note_refusal(said: str) -> None:
    """Leave the rest pageable, and say so once: a system that is asked again and again at its limit is slow for all."""
    if not _refusals:
        tqdm.write(
            f"the system page-locks no more host memory ({said.splitlines()[0]}); what is left is copied more slowly, "
            "to the same bits. Windows and WSL2 lock about half of the memory that they have.",
            file=sys.stderr,
        )
    _refusals.append(said)


class Lane:
    """A queue of copies beside the computation of one device; where that is no CUDA device, no queue at all."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._held: deque[tuple[Tensor, Mark]] = deque()

    def copy(self, source: Tensor, target: Tensor, after: "Mark") -> "Mark":
        """Queue a copy, to begin when `after` has been reached, and return its end, until when both are to stay."""
        if self._stream is None:
            target.copy_(source)
            return Mark()
        if after.event is not None:
            self._stream.wait_event(after.event)
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        return Mark(self._stream)

    def send(self, source: Tensor, target: Tensor) -> "Mark":
        """Queue a copy of what has been computed by then, and return its end. The caller may let go of the source.

        The last HELD sources are kept, and before an older one goes Python waits for its copy: how much is kept, on the
        device and on the host, depends on the program alone. With Tensor.record_stream it would depend on how far the
        device lags behind Python, because PyTorch keeps such memory until it sees that the copy is over.
        """
        mark = self.copy(source, target, after=Mark.now(source.device if source.is_cuda else target.device))
        if self._stream is not None or hasattr(source, "fake_device"):  # a trace keeps what the device will
            self._held.append((source.detach(), mark))
            if len(self._held) > HELD:
                self._held.popleft()[1].wait()
        return mark


HELD = 2
"""One is on its way while the next is computed."""


@cache
def lanes(device: torch.device) -> tuple[Lane, Lane]:
    """The lanes of what arrives on the device, and of what leaves it: a bus carries both at once."""
    return Lane(device), Lane(device)


class Mark:
    """A point in a queue of the device."""

    def __init__(self, stream: "torch.cuda.Stream | None" = None) -> None:
        self.event = stream.record_event() if stream is not None else None

    @classmethod
    def now(cls, device: torch.device) -> "Mark":
        """The end of what the computation has been given so far."""
        return cls(torch.cuda.current_stream(device) if device.type == "cuda" else None)

    def hold_computation(self) -> None:
        """The device computes nothing further until this point is reached; the caller goes on."""
        if self.event is not None:
            torch.cuda.current_stream().wait_event(self.event)

    def wait(self) -> None:
        """The caller itself waits: what was copied to the host may be read."""
        if self.event is not None:
            self.event.synchronize()


# What autograd keeps for backward, kept in host memory.


@dataclass
class _Away:
    at_host: Tensor
    device: torch.device
    left: Mark


def saved_on_host() -> saved_tensors_hooks:
    """A context: tensors that are saved inside leave the device, and come back when backward asks for them.

    torch.autograd.graph.save_on_cpu does the same with the device waiting for every copy.
    """
    return saved_tensors_hooks(_send_away, _bring_back)


def _send_away(tensor: Tensor) -> Tensor | _Away:
    if tensor.numel() == 0:
        return tensor
    at_host = empty_on_host(tensor)
    _, leaving = lanes(tensor.device)
    return _Away(at_host, tensor.device, leaving.send(tensor, at_host))


def _bring_back(away: Tensor | _Away) -> Tensor:
    if isinstance(away, Tensor):
        return away
    arriving, _ = lanes(away.device)
    tensor = torch.empty_like(away.at_host, device=away.device)
    # Its memory may still be read by what is computed now, and what it is filled with may still be leaving.
    away.left.hold_computation()
    arriving.copy(away.at_host, tensor, after=Mark.now(away.device)).hold_computation()
    return tensor


class InputOnHost(Recomputed):
    """Recomputed, with its input kept in host memory until backward."""

    def forward(self, x: Tensor, cache: LayerCache | None = None, mask: Tensor | None = None) -> Tensor:
        with saved_on_host():
            return super().forward(x, cache, mask)
