"""Tensors that have a shape, a dtype and a place, and no content.

What PyTorch's FakeTensorMode does, for programs whose sizes are all known: an operation runs PyTorch's own kernel for
the device "meta", once for each combination of shapes, and what it makes is said to lie where its inputs do.
FakeTensorMode also handles sizes that are not known and values that decide what is done next, and takes several times
as long per operation to look for them. tests/test_shape_tensor.py holds the two to the same traces. They differ where
PyTorch's kernels for a CPU do: those of "meta" keep the statistics of a 16-bit layer norm in float32, as CUDA's.
"""

from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

META = torch.device("meta")
GPU, HOST = "cpu", "meta"
"""Devices of a trace that stand for the GPU and for host memory."""


class ShapeTensor(Tensor):
    """A tensor with the memory of `content`, on "meta", and none of its own. To others it is on `fake_device`."""

    content: Tensor
    fake_device: torch.device
    """Device that the tensor stands for, under FakeTensor's name."""
    signature: tuple[Any, ...]
    """(shape, strides, dtype, device): all that the shapes of results depend on."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, content: Tensor, device: torch.device) -> "ShapeTensor":
        # A subclass that shares content's storage would lie on "meta", and be asked for its device at every turn.
        shape, strides, dtype = content.shape, content.stride(), content.dtype
        self = Tensor._make_wrapper_subclass(
            cls, shape, strides=strides, storage_offset=content.storage_offset(), dtype=dtype, device=device
        )
        self.content, self.fake_device = content, device
        self.signature = shape, strides, dtype, device
        return self

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.content.untyped_storage()

    def tolist(self) -> Any:
        """Some numbers: see run()."""
        return np.ones(tuple(self.shape)).tolist()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return run(func, args, kwargs or {})


class ShapeMode(TorchDispatchMode):
    """Make every tensor that is created inside its `with` block a ShapeTensor."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and to say so costs as much as an operation

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return run(func, args, kwargs or {})


_results: dict[tuple[Any, ...], tuple[type, tuple[Any, ...]]] = {}
"""Results of operations by their arguments, with signatures in place of tensors: one, several, or a list."""


def run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The operation on ShapeTensors. What writes into a tensor has nothing to do."""
    if func is torch.ops.aten._local_scalar_dense.default:
        # A count of steps, say, by which an optimizer divides: one number is as good as another.
        return torch.ones((), dtype=args[0].dtype).item()
    number = id(func)  # to hash an operation takes as long as to hash its arguments
    how = _hows.get(number) or _hows.setdefault(number, _how(func))
    if how.written is not None:
        given = [kwargs[name] if name in kwargs else args[index] for index, name in how.written]
        return given[0] if len(given) == 1 else tuple(given) or None
    source = args[0] if args else None
    if how.views and isinstance(source, ShapeTensor):
        seen = func(source.content, *args[1:], **kwargs)
        if isinstance(seen, Tensor):
            return ShapeTensor(seen, source.fake_device)
        return type(seen)(ShapeTensor(part, source.fake_device) for part in seen)
    if not how.makes_new:
        return _run_on_contents(func, args, kwargs)
    key = (number, _signature(args), _signature(tuple(kwargs.items())), torch.get_default_dtype())
    if key not in _results:
        result = _run_on_contents(func, args, kwargs)
        leaves = tuple(result) if isinstance(result, tuple | list) else (result,)
        if not all(_is_new(leaf, (args, kwargs)) for leaf in leaves):
            return result
        _results[key] = (
            type(result),
            tuple(leaf.signature if isinstance(leaf, ShapeTensor) else leaf for leaf in leaves),
        )
        return result
    kind, made = _results[key]
    leaves = tuple(_like(leaf) if type(leaf) is tuple else leaf for leaf in made)
    return kind(leaves) if kind in (tuple, list) else leaves[0]


class _How(NamedTuple):
    """The effect of an operation, from its schema."""

    operation: Any
    """Held, so that its id() is no other's."""
    written: tuple[tuple[int, str], ...] | None
    """(index, name) of the arguments that it returns, where it only writes into its arguments."""
    views: bool
    """Its results are views of its first argument, and no other is a tensor."""
    makes_new: bool
    """Its results share memory with nothing, and depend on the signatures of tensors."""


_hows: dict[int, _How] = {}
"""The effect of each operation seen so far, by its id()."""


def _how(func: Any) -> _How:
    arguments, returns = func._schema.arguments, func._schema.returns
    changes_shape = torch.Tag.inplace_view in func.tags
    writes = any(argument.alias_info is not None and argument.alias_info.is_write for argument in arguments)
    if writes and not changes_shape and all(result.alias_info is not None for result in returns):
        of = {
            letter: (index, argument.name)
            for index, argument in enumerate(arguments)
            for letter in (argument.alias_info.before_set if argument.alias_info is not None else ())
        }
        written = tuple(of[min(result.alias_info.before_set)] for result in returns)
        return _How(func, written, views=False, makes_new=False)
    tensors = [argument for argument in arguments if "Tensor" in str(argument.type)]
    makes_tensors = len(returns) > 0 and all("Tensor" in str(result.type) for result in returns)
    shares = any(described.alias_info is not None for described in [*arguments, *returns])
    # The schema of _unsafe_view does not say so.
    views = (func.is_view or func is torch.ops.aten._unsafe_view.default) and tensors == arguments[:1]
    return _How(func, None, views, makes_new=makes_tensors and not shares)


def _signature(value: Any) -> Any:
    """Equal for two arguments when an operation makes alike results of them."""
    if type(value) is ShapeTensor:
        return value.signature
    if isinstance(value, list | tuple):
        return tuple(map(_signature, value))
    return type(value), value  # 1, 1.0 and True are equal and lead to different dtypes


def _like(signature: tuple[Any, ...]) -> ShapeTensor:
    shape, stride, dtype, device = signature
    return ShapeTensor(torch.empty_strided(shape, stride, dtype=dtype, device=META), device)


def _is_new(leaf: Any, given: Any) -> bool:
    """True for a tensor that _like can make again: it has all of its storage, which is no other's."""
    if not isinstance(leaf, ShapeTensor):
        return True
    storage = leaf.untyped_storage()
    others = [other.untyped_storage()._cdata for other in tree_leaves(given) if isinstance(other, Tensor)]
    return storage._cdata not in others and storage.nbytes() == _like(leaf.signature).untyped_storage().nbytes()


def _run_on_contents(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    args, kwargs = tree_map_only(Tensor, _without_content, (args, kwargs))
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, ShapeTensor)]
    # A number may lie on the host and be used on the GPU: a tensor of some size says where.
    places = [leaf.fake_device for leaf in sorted(given, key=lambda leaf: leaf.dim() == 0)]
    if kwargs.get("device") is not None:
        places = [torch.device(kwargs["device"])]
    args, kwargs = tree_map_only(ShapeTensor, lambda leaf: leaf.content, (args, kwargs))
    if _takes_device(func) and (not given or kwargs.get("device") is not None):
        kwargs = {**kwargs, "device": META}
    same = {id(leaf.content): leaf for leaf in given}

    def wrapped(leaf: Tensor) -> ShapeTensor:
        if id(leaf) not in same:
            return ShapeTensor(leaf, places[0] if places else torch.device("cpu"))
        same[id(leaf)].signature = leaf.shape, leaf.stride(), leaf.dtype, same[id(leaf)].fake_device
        return same[id(leaf)]

    return tree_map_only(Tensor, wrapped, func(*args, **kwargs))


def _without_content(tensor: Tensor) -> ShapeTensor:
    """torch.tensor makes a tensor of a number before any mode is asked."""
    if isinstance(tensor, ShapeTensor):
        return tensor
    return ShapeTensor(torch.empty_like(tensor, device=META), tensor.device)


@cache
def _takes_device(func: Any) -> bool:
    return any(argument.name == "device" for argument in func._schema.arguments)


# The operations that run on them.


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors among the arguments or the results of an operation, lists of them included."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, tuple | list):
        return [tensor for item in value for tensor in tensors_in(item)]
    return []


@cache
def name_of(func: Any) -> str:
    """The name of an operation, without its library and its overload."""
    return func._schema.name.partition("::")[2]
