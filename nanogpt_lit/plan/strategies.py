"""DDP and FSDP2 in a trace: PyTorch's own code, in one process of many that are not there.

What they allocate, and when, and on which stream, is theirs. Only four things are put in the place of others: the
collectives, which give back the tensors that they were given, as NCCL's do; the exchange of sizes between processes,
which has nobody to agree with; resize_(), by which FSDP2 gives whole weights back and takes their memory again, and of
which a trace would not know; and the fake tensors by which DTensor finds out shapes, of which it must not know.
"""

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Literal
from unittest.mock import patch

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from nanogpt_lit.plan.shape_tensor import run

if TYPE_CHECKING:
    from nanogpt_lit.plan.trace import MemoryTrace

Strategy = Literal["single", "ddp", "fsdp2"]


class Strategies:
    """The first of `devices` processes, for as long as `processes` is open."""

    def __init__(self, strategy: Strategy, devices: int, options: Mapping[str, Any], own_stream: bool) -> None:
        """options: of DDP   own_stream: whether DDP is made on a stream of its own, as Lightning makes it"""
        self.strategy, self.devices, self.options, self.own_stream = strategy, devices, options, own_stream
        self.mesh: dict[str, Any] = {}

    @contextmanager
    def processes(self) -> Iterator[None]:
        """Process groups for what is traced. Opened before any mode is: they compute with real tensors."""
        if self.strategy == "single":
            yield
            return
        import torch.distributed as dist
        from torch._C._distributed_c10d import HashStore
        from torch.distributed.device_mesh import init_device_mesh
        from torch.testing._internal.distributed import fake_pg  # noqa: F401 - whose import makes "fake" known

        dist.init_process_group("fake", rank=0, world_size=self.devices, store=HashStore())
        try:
            mesh = init_device_mesh("cpu", (self.devices, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
            self.mesh = {name: mesh[name] for name in mesh.mesh_dim_names or ()}
            yield
        finally:
            dist.destroy_process_group()

    @contextmanager
    def followed_by(self, trace: "MemoryTrace") -> Iterator[None]:
        """Tell trace of the memory that FSDP2 gives back and takes again."""
        if self.strategy != "fsdp2":
            yield
            return
        from torch.distributed.fsdp._fully_shard import _fsdp_param
        from torch.distributed.tensor._sharding_prop import ShardingPropagator

        def telling(resize: Callable[[Any], None]) -> Callable[[Any], None]:
            def resize_and_tell(tensor: Any) -> None:
                before = tensor.untyped_storage().nbytes()
                resize(tensor)
                if tensor.untyped_storage().nbytes() != before:
                    trace.resized(tensor)

            return resize_and_tell

        with (
            patch.object(_fsdp_param, "alloc_storage", telling(_fsdp_param.alloc_storage)),
            patch.object(_fsdp_param, "free_storage", telling(_fsdp_param.free_storage)),
            patch.object(ShardingPropagator, "_fake_mode_lock", _Unseen()),
        ):
            yield

    def spread(self, module: Any, trace: "MemoryTrace") -> nn.Module:
        """The strategy's wrapper of module, which is labelled, or module itself."""
        if self.strategy == "fsdp2":
            module._device_mesh = self.mesh  # as Lightning's strategy, whose property device_mesh reads it
            module.configure_model()
            gc.collect()  # whole weights that setting up leaves in cycles, as a run's collector finds them
        trace.label_module(module)
        if self.strategy != "ddp":
            return module
        from torch.nn.parallel import distributed

        class Replica(distributed.DistributedDataParallel):
            def _pre_forward(self, *inputs: Any, **kwargs: Any) -> Any:
                with trace.counted_as("communication"):  # new buckets, in the order in which gradients were ready
                    return super()._pre_forward(*inputs, **kwargs)

        with (
            patch.object(distributed, "_verify_param_shape_across_processes", lambda *arguments: True),
            torch.cpu.stream(torch.cpu.Stream()) if self.own_stream else nullcontext(),
            trace.counted_as("communication"),
        ):
            return Replica(module, **self.options)

    @staticmethod
    def unsynchronized(module: nn.Module) -> AbstractContextManager[None]:
        """Context of all micro-batches of a step but the last: DDP exchanges their sum, FSDP2 each."""
        return module.no_sync() if hasattr(module, "no_sync") else nullcontext()  # type: ignore[operator]


class _Unseen:
    """Mode in which DTensor works out shapes by fake tensors that no device holds, in place of whole ones."""

    def __enter__(self) -> None:
        self._without_modes = _disable_current_modes()
        self._without_modes.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._without_modes.__exit__(*error)


def compute(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """shape_tensor.run, which knows no collectives."""
    if func.namespace == "c10d":
        work = _done(args[0])
        return work if len(func._schema.returns) == 1 else (args[0], work)
    if func is torch.ops.aten.empty.memory_format and kwargs.get("dtype") == torch.int32:
        return func(*args, **kwargs)  # DDP writes into it, in C++, which parameters share a bucket
    return run(func, args, kwargs)


def _done(result: Any) -> Any:
    """A collective that is over. DDP asks it for what it exchanged."""
    from torch._C import _distributed_c10d  # not every build has it

    future: Any = torch.futures.Future()
    future.set_result(result)
    return _distributed_c10d._create_work_from_future(future).boxed()  # type: ignore[attr-defined]
