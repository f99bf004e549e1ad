"""The memory of a program's tensors: every allocation and release on the GPU, with what it was for.

A `MemoryTrace` is a dispatch mode. It sees each operation that PyTorch runs, forward, backward and in the optimizer,
and follows the storages of the results until they are freed. Under ShapeMode, or PyTorch's FakeTensorMode, nothing
is computed and nothing is held: only shapes flow, and a network of any size is traced in seconds.

The GPU is the device "cpu", whose code paths `cuda_paths` makes those of CUDA. Host memory is the device "meta": a
technique that moves tensors to the host moves them there while it is traced.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nanogpt_lit.memory.host import page_lock_notes
from nanogpt_lit.plan.allocator import Event, rounded
from nanogpt_lit.plan.kernels import Kernels
from nanogpt_lit.plan.shape_tensor import GPU, HOST, name_of, tensors_in

CATEGORIES = (
    "weights", "gradients", "optimizer", "activations", "logits", "casts", "temporaries", "workspace", "batch",
    "communication",
)  # fmt: skip
"""activations: kept by the forward pass   logits: whatever is as wide as the vocabulary   casts: 16-bit copies of
weights   temporaries: of the backward pass and the optimizer   workspace: held by kernels, not by tensors
communication: what devices exchange, such as the whole weights of a block of which each keeps a share"""

MATRIX_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm"}


class Moment(NamedTuple):
    """The GPU's memory after one operation."""

    phase: str
    bytes_by_category: dict[str, int]

    @property
    def bytes(self) -> int:
        return sum(self.bytes_by_category.values())


@dataclass
class _Block:
    """A storage that is alive."""

    serial: int
    bytes: int
    category: str
    host: bool
    page_locked: bool
    stream: int
    finalizer: weakref.ref


@dataclass(eq=False)
class MemoryTrace(TorchDispatchMode):
    """Follows the tensors of everything that runs inside its `with` block.

    kernels: what they take for themselves is counted too   otherwise: other kernels, whose sizes are noted beside
    vocab_size: tensors that wide are counted as logits
    compute: what runs an operation, in place of PyTorch and the modes below this one
    watch: called with every operation, for the time estimate
    """

    kernels: Kernels = field(default_factory=Kernels)
    otherwise: Kernels | None = None
    vocab_size: int | None = None
    compute: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any] | None = None
    watch: Callable[[Any, tuple[Any, ...], dict[str, Any], Any], None] | None = None
    phase: str = "setup"
    events: list[Event] = field(default_factory=list)
    """Allocations and releases on the GPU, in order: what the allocator is simulated with."""
    peaks: dict[str, Moment] = field(default_factory=dict)
    """The fullest moment of each phase."""
    marks: dict[str, int] = field(default_factory=dict)
    """Places in `events`, by the name that `mark` gave them."""
    other_sizes: dict[int, int] = field(default_factory=dict)
    """Sizes that the workspaces in `events` would have with the kernels of `otherwise`, by serial."""
    timeline: list[Moment] | None = None
    """Every moment since this was set to a list."""
    parameters: int = 0
    """Number of parameters of the modules that were labelled, a tied one counted once."""
    host_bytes: int = 0
    host_peak_bytes: int = 0
    page_locked_bytes: int = 0
    page_locked_peak_bytes: int = 0

    def __post_init__(self) -> None:
        super().__init__()
        self.allocated = 0
        """Bytes on the GPU now."""
        self._live: dict[int, _Block] = {}  # by the address of the storage
        self._bytes: Counter[str] = Counter()
        self._weights: set[int] = set()
        self._threads_with_cublas: set[str] = set()
        self._peak_bytes: dict[str, int] = {}  # by phase
        self._serial = 0
        self._counted_as: str | None = None
        self._streams = {torch.cpu.current_stream(): 0}

    @property
    def peak(self) -> Moment:
        """The fullest moment of all."""
        return max(self.peaks.values(), key=lambda moment: moment.bytes)

    def __enter__(self) -> Self:
        page_lock_notes.append(self._note_page_lock)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        page_lock_notes.remove(self._note_page_lock)
        self._live.clear()  # when what is left goes, is no part of the program

    def mark(self, place: str) -> None:
        self.marks[place] = len(self.events)

    # What a tensor is for.

    def label(self, tensors: Any, category: str) -> None:
        """Count these tensors, of any nesting, under a category from now on; new ones are followed from here."""
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Tensor):
                tensor = getattr(tensor, "_local_tensor", tensor)  # the shard of a DTensor
                self._follow(tensor, category)
                block = self._live.get(tensor.untyped_storage()._cdata)
                if block is not None and not block.host and block.category != category:
                    self._bytes[block.category] -= block.bytes
                    self._bytes[category] += block.bytes
                    block.category = category

    def label_module(self, module: nn.Module) -> None:
        """Label a module's weights, and its gradients from the moment they are made."""
        for parameter in module.parameters():
            self.parameters += parameter.numel()
            self._weights.add(getattr(parameter, "_local_tensor", parameter).untyped_storage()._cdata)
            self.label(parameter, "weights")
            parameter.register_post_accumulate_grad_hook(lambda p: self.label(p.grad, "gradients"))
        self.label(list(module.buffers()), "weights")

    def resized(self, tensor: Tensor) -> None:
        """Follow a storage that was given back to the allocator, or taken from it once more, by resize_()."""
        block = self._live.get(key := tensor.untyped_storage()._cdata)
        if block is not None:
            self._freed(key, block.serial)
        self._weights.add(key)
        self._follow(tensor, "communication")
        self._record()

    @contextmanager
    def counted_as(self, category: str) -> Iterator[None]:
        """Count what is allocated inside the `with` block under a category."""
        before, self._counted_as = self._counted_as, category
        try:
            yield
        finally:
            self._counted_as = before

    # Following storages.

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # see ShapeMode

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(kind.__name__ == "DTensor" for kind in types):
            return NotImplemented  # it comes back with what it does to its shards
        if func is torch.ops.prim.device.default:
            # What FakeTensorMode's tensors are asked at every turn; it is no operation.
            return args[0].fake_device if hasattr(args[0], "fake_device") else func(*args)
        name = name_of(func)
        if func is torch.ops.aten.add.Tensor and self._adds_gradients(args):
            func = torch.ops.aten.add_.Tensor
        result = func(*args, **kwargs) if self.compute is None else self.compute(func, args, kwargs)
        category = self._category(name, args)
        # In the order in which CUDA's host code takes memory, which decides into which gap it goes.
        made = tensors_in(result)
        if func.namespace == "c10d":
            self.label(made, "communication")
        if name == "t":
            made[0].is_transposed = True  # type: ignore[attr-defined]
        for tensor in made[::-1] if name == "native_dropout" else made:
            wide = self.vocab_size is not None and tensor.dim() > 1 and tensor.size(-1) == self.vocab_size
            self._follow(tensor, "logits" if wide and category in ("activations", "temporaries") else category)
        if name in MATRIX_PRODUCTS:
            self._hold_cublas_workspace()
        if (sizes := self.kernels.workspaces(name, args)) and args[0].device.type == GPU:
            if self.otherwise is not None:
                others = self.otherwise.workspaces(name, args)
                self.other_sizes.update(
                    zip(range(self._serial + 1, self._serial + 1 + len(sizes)), others, strict=True)
                )
            self._use_and_release([rounded(size) for size in sizes])
        self._record()
        if self.watch is not None:
            self.watch(func, args, kwargs, result)
        return result

    def _adds_gradients(self, args: tuple[Any, ...]) -> bool:
        """True where autograd adds up the gradients of what was used twice, such as a tied embedding.

        It does so in place where it holds the only reference and the first gradient has not been transposed, as that
        of a linear layer has; but under a dispatch mode it takes new memory. Fake gradients have no values that another
        reference could miss.
        """
        first, second = args[:2]
        return (
            self.phase == "backward"
            and not torch.is_grad_enabled()
            and hasattr(first, "fake_device")
            and hasattr(second, "fake_device")
            and (first.shape, first.dtype) == (second.shape, second.dtype)
            and first.is_contiguous()
            and not hasattr(first, "is_transposed")
        )

    def _category(self, name: str, args: tuple[Any, ...]) -> str:
        if self._counted_as is not None:
            return self._counted_as
        if self.phase == "optimizer":
            return "temporaries"
        if name == "_to_copy" and args[0].untyped_storage()._cdata in self._weights:
            return "casts"
        return "temporaries" if self.phase == "backward" else "activations"

    def _follow(self, tensor: Tensor, category: str) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._live or size == 0 or tensor.device.type not in (GPU, HOST):
            return
        self._serial += 1
        host = tensor.device.type == HOST
        stream = self._streams.setdefault(torch.cpu.current_stream(), len(self._streams))
        finalizer = weakref.ref(storage, lambda _, key=key, serial=self._serial: self._freed(key, serial))  # type: ignore[misc]
        self._live[key] = _Block(
            self._serial, size if host else rounded(size), category, host, False, stream, finalizer
        )
        if host:
            self.host_bytes += size
            self.host_peak_bytes = max(self.host_peak_bytes, self.host_bytes)
        else:
            self._allocate(self._serial, rounded(size), category, stream)

    def _freed(self, key: int, serial: int) -> None:
        block = self._live.get(key)
        if block is None or block.serial != serial:  # its address already belongs to another
            return
        del self._live[key]
        if block.host:
            self.host_bytes -= block.bytes
            self.page_locked_bytes -= block.bytes * block.page_locked
        else:
            self._release(serial, block.bytes, block.category, block.stream)

    def _note_page_lock(self, tensor: Tensor) -> None:
        """Count a tensor on the host as page-locked: a GPU would copy it asynchronously."""
        block = self._live[tensor.untyped_storage()._cdata]
        if not block.page_locked:
            block.page_locked = True
            self.page_locked_bytes += block.bytes
            self.page_locked_peak_bytes = max(self.page_locked_peak_bytes, self.page_locked_bytes)

    def _allocate(self, serial: int, size: int, category: str, stream: int = 0) -> None:
        self.allocated += size
        self._bytes[category] += size
        self.events.append(Event(serial, size, stream))

    def _release(self, serial: int, size: int, category: str, stream: int = 0) -> None:
        self.allocated -= size
        self._bytes[category] -= size
        self.events.append(Event(serial, -size, stream))

    def _use_and_release(self, sizes: list[int]) -> None:
        first = self._serial + 1
        self._serial += len(sizes)
        for serial, size in enumerate(sizes, first):
            self._allocate(serial, size, "workspace")
        self._record()
        for serial, size in enumerate(sizes, first):
            self._release(serial, size, "workspace")

    def _hold_cublas_workspace(self) -> None:
        thread = "backward" if self.phase == "backward" else "main"
        if thread not in self._threads_with_cublas:
            self._threads_with_cublas.add(thread)
            if size := self.kernels.cublas_bytes():
                self._serial += 1
                self._allocate(self._serial, rounded(size), "workspace")
                if self.otherwise is not None:
                    self.other_sizes[self._serial] = self.otherwise.cublas_bytes()

    def _record(self) -> None:
        is_peak = self.allocated > self._peak_bytes.get(self.phase, -1)
        if self.timeline is None and not is_peak:
            return
        moment = Moment(self.phase, dict(self._bytes))
        if self.timeline is not None:
            self.timeline.append(moment)
        if is_peak:
            self.peaks[self.phase], self._peak_bytes[self.phase] = moment, self.allocated
