"""Nested states, as optimizers and schedules give them, taken apart into tensors and JSON, and put together again."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from nanogpt_lit.errors import UserError

# A dictionary with one of these as its only key stands for what JSON lacks.
TENSOR, TUPLE, PAIRS, NUMBER = "$tensor", "$tuple", "$pairs", "$number"


def flatten(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """JSON of a nested state; its tensors go to `tensors`, named after where they stand.

    path: where the value stands, "optimizer" for a whole optimizer
    Raises UserError for anything but tensors, numbers, strings, None, lists, tuples and dictionaries.
    """
    match value:
        case Tensor():
            assert path not in tensors, path
            tensors[path] = value
            return {TENSOR: path}
        case bool() | int() | str() | None:
            return value
        case float():
            return value if math.isfinite(value) else {NUMBER: str(value)}  # JSON knows neither nan nor inf
        case list():
            return [flatten(item, f"{path}.{n}", tensors) for n, item in enumerate(value)]
        case tuple():
            return {TUPLE: flatten(list(value), path, tensors)}
        case Mapping():
            pairs = [(key, flatten(item, f"{path}.{key}", tensors)) for key, item in value.items()]
            if all(isinstance(key, str) and not key.startswith("$") for key, _ in pairs):
                return dict(pairs)
            return {PAIRS: [[flatten(key, path, tensors), item] for key, item in pairs]}
    raise UserError(f"{path} holds a {type(value).__name__}, which a checkpoint cannot keep; numbers and tensors can.")


def unflatten(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The nested state that `flatten` made this JSON of."""
    match value:
        case list():
            return [unflatten(item, tensors) for item in value]
        case dict() if len(value) == 1:
            ((key, item),) = value.items()
            match key:
                case "$tensor":
                    return tensors[item]
                case "$tuple":
                    return tuple(unflatten(item, tensors))
                case "$pairs":
                    return {unflatten(k, tensors): unflatten(v, tensors) for k, v in item}
                case "$number":
                    return float(item)
            return {key: unflatten(item, tensors)}
        case dict():
            return {key: unflatten(item, tensors) for key, item in value.items()}
    return value
