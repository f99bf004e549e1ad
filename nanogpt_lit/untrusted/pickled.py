"""Pickles of other programs, by Python's own reader, to which no name in them means anything: nothing is imported."""

import io
import pickle
from typing import Any

# The reader that is written in Python: to the one in C, a number in the file may name more memory than there is.
_Reader: Any = pickle._Unpickler


def plain_pickle(content: bytes) -> Any:
    """Read a pickle of dictionaries, lists, numbers and text. Raises UnpicklingError for one that names anything."""
    return _Plain(io.BytesIO(content)).load()


def pickled_tree(content: bytes) -> Any:
    """Read a pickle with objects in it, each of which is Made. Errors of a damaged one are not one family."""
    return _Tree(io.BytesIO(content)).load()


class Made:
    """Stand-in for what a class or a function would have made, or for itself."""

    name: str
    """The name of the class or the function."""
    arguments: tuple[Any, ...] = ()
    state: Any = None
    """The state that would have been put into it afterwards: mostly a dictionary of its fields."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Plain(_Reader):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module}.{name}, which numbers and text do not need")


class _Tree(_Reader):
    def find_class(self, module: str, name: str) -> Any:
        return type("Made", (Made,), {"name": name})
