"""Arithmetic for the fake CUDA device: each operation takes its real CUDA path, which allocates and launches and
computes nothing, and is then computed on the CPU over the same memory.

Right to rounding, not to a GPU's bits. Enter OnTheCPU() around what is to be computed; the device must be told
(FAKE_CUDA_ARITHMETIC=1), or it replaces the numbers that are read back.
"""

import ctypes
import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

NO_ARITHMETIC = {
    "view", "t", "transpose", "expand", "split", "split_with_sizes", "_unsafe_view", "alias", "unsqueeze", "squeeze",
    "as_strided", "select", "slice", "detach", "permute", "unbind", "reshape", "_reshape_alias", "lift_fresh",
    "view_as", "empty", "empty_like", "empty_strided", "new_empty", "record_stream", "_pin_memory", "is_pinned", "set_",
    "resize_",
}  # fmt: skip
"""Views and memory: done by PyTorch's host code."""


class OnTheCPU(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        draws = torch.Tag.nondeterministic_seeded in func.tags and torch.cuda.is_initialized()
        seed = seed_of((args, kwargs)) if draws else None
        out = func(*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        if name in NO_ARITHMETIC or not any(t.is_cuda for t in tensors((args, kwargs, out))):
            return out
        if name in ("copy_", "_to_copy") and is_moved(out, args[1] if name == "copy_" else args[0]):
            return out
        on_cpu = {**tree_map(over_its_memory, kwargs)}
        if "device" in on_cpu:
            on_cpu["device"] = torch.device("cpu")
        if "pin_memory" in on_cpu:
            on_cpu["pin_memory"] = False
        with torch.no_grad(), drawing_from(seed):
            computed = compute(func, name, tree_map(over_its_memory, args), on_cpu)
        if not tensors(out):  # a number, or whether two tensors are equal
            return computed
        inputs = {t.untyped_storage().data_ptr() for t in tensors((args, kwargs))}
        for target, result in zip(tensors(out), tensors(computed), strict=False):
            # What is computed in place is there already.
            if target.numel() and target.untyped_storage().data_ptr() not in inputs:
                memory = over_its_memory(target)
                if memory.shape != result.shape:  # attention's row sums, which CUDA pads
                    memory = memory[tuple(map(slice, result.shape))]
                memory.copy_(result)
        return out


def is_moved(target: Tensor, source: Tensor) -> bool:
    """Whether a copy is one of bytes between device and host: the device itself makes it, late where it lags."""
    same = target.dtype == source.dtype and target.shape == source.shape
    return same and target.is_cuda != source.is_cuda and target.is_contiguous() and source.is_contiguous()


def seed_of(given: Any) -> int:
    """What the next random numbers of the device depend on: its generator's seed and how far that is, as PyTorch's host
    code counts it."""
    named = (leaf for leaf in tree_leaves(given) if isinstance(leaf, torch.Generator) and leaf.device.type == "cuda")
    generator = next(named, None) or torch.cuda.default_generators[torch.cuda.current_device()]
    return int.from_bytes(hashlib.sha256(bytes(generator.get_state().tolist())).digest()[:8], "little") >> 1


@contextmanager
def drawing_from(seed: int | None) -> Iterator[None]:
    """The CPU's random numbers begin at seed, and afterwards go on where they were."""
    if seed is None:
        yield
        return
    before = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.default_generator.set_state(before)


def compute(func: Any, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    def argument(place: int, key: str, otherwise: Any) -> Any:
        return args[place] if len(args) > place else kwargs.get(key, otherwise)

    if name == "_scaled_dot_product_flash_attention":
        return attention(*args[:3], argument(4, "is_causal", False), kwargs.get("scale"))
    if name == "_scaled_dot_product_efficient_attention":
        return attention(*args[:3], argument(6, "is_causal", False), kwargs.get("scale"))
    if name in ("_scaled_dot_product_flash_attention_backward", "_scaled_dot_product_efficient_attention_backward"):
        return attention_backward(*args[:4], argument(11, "is_causal", False), kwargs.get("scale"))
    if name in ("_softmax", "_log_softmax") and args[2]:  # half to float, which only CUDA has
        return func(args[0].float(), args[1], False)
    if name in ("mm", "addmm") and any(t.dtype == torch.float16 for t in tensors(args)):
        wide = tree_map(lambda t: t.float() if isinstance(t, Tensor) else t, args)
        return func(*wide, **kwargs)
    return func(*args, **kwargs)


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None) -> tuple[Tensor, Tensor]:
    scores = scores_of(q, k, causal, scale)
    return (scores.softmax(-1) @ v.float()).to(q.dtype), scores.logsumexp(-1)


def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    p = scores_of(q, k, causal, scale).softmax(-1)  # (B, H, T, T)
    scale, grad = scale or q.size(-1) ** -0.5, grad.float()
    dp = grad @ v.float().mT
    ds = p * (dp - (dp * p).sum(-1, keepdim=True)) * scale
    return (ds @ k.float()).to(q.dtype), (ds.mT @ q.float()).to(q.dtype), (p.mT @ grad).to(q.dtype)


def scores_of(q: Tensor, k: Tensor, causal: bool, scale: float | None) -> Tensor:
    scores = (q.float() @ k.float().mT) * (scale or q.size(-1) ** -0.5)
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(hidden, -math.inf) if causal else scores


def over_its_memory(value: Any) -> Any:
    """A CPU tensor over the memory of a CUDA one, which on the fake device is host memory; a CPU generator for one."""
    if isinstance(value, torch.Generator):
        return torch.default_generator
    if not isinstance(value, Tensor) or not value.is_cuda:
        return value
    size = value.untyped_storage().nbytes()
    if size == 0 or value.numel() == 0:
        return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype)
    memory = (ctypes.c_char * size).from_address(value.untyped_storage().data_ptr())
    storage = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    return torch.empty(0, dtype=value.dtype).set_(storage, value.storage_offset(), value.size(), value.stride())


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
