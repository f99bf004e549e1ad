"""Reading of a pickle without doing what it says: instructions are followed on names, and nothing is imported."""

import pickletools
from dataclasses import dataclass, field
from typing import Any

MARK = object()


@dataclass(frozen=True)
class Name:
    """Name of a class or a function, which is neither looked for nor called."""

    module: str
    name: str


@dataclass(eq=False)
class Made:
    """Stand-in for what a class or a function would have made of its arguments."""

    by: Name
    arguments: tuple[Any, ...]
    state: Any = field(default=None)
    """The state that would have been put into it afterwards: mostly a dictionary of its fields."""


def plain_pickle(content: bytes) -> Any:
    """Read a pickle of dictionaries, lists, numbers and text. Raises ValueError for any other instruction."""
    return follow(content, of_objects=False)


def pickled_tree(content: bytes) -> Any:
    """Read a pickle with objects in it, each of which is Made. Raises ValueError for an instruction that the
    pickles of today's Python (protocols 2 to 5) have no need of."""
    return follow(content, of_objects=True)


def follow(content: bytes, of_objects: bool) -> Any:
    stack: list[Any] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        start = max(i for i, item in enumerate(stack) if item is MARK)
        items = stack[start + 1 :]
        del stack[start:]
        return items

    def last(number: int) -> tuple[Any, ...]:
        items = tuple(stack[len(stack) - number :])
        del stack[len(stack) - number :]
        return items

    for instruction, argument, _ in pickletools.genops(content):
        match instruction.name:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                stack.append(MARK)
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE" | "SHORT_BINUNICODE":
                stack.append(argument)
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(instruction.name == "NEWTRUE")
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINPUT" | "LONG_BINPUT":
                memo[int(argument or 0)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[int(argument or 0)])
            case "SETITEM":
                key, value = last(2)
                stack[-1][key] = value
            case "SETITEMS":
                items = since_mark()
                stack[-1].update(zip(items[::2], items[1::2], strict=True))
            case "APPEND":
                (item,) = last(1)
                stack[-1].append(item)
            case "APPENDS":
                items = since_mark()
                stack[-1].extend(items)
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE":
                stack.append(tuple(since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(last(int(instruction.name[-1])))
            case "GLOBAL" if of_objects:
                stack.append(Name(*str(argument).split(" ", 1)))
            case "STACK_GLOBAL" if of_objects:
                stack.append(Name(*last(2)))
            case "REDUCE" | "NEWOBJ" if of_objects:
                stack.append(Made(*last(2)))
            case "BUILD" if of_objects:
                (state,) = last(1)
                stack[-1].state = state
            case "STOP":
                return stack.pop()
            case name:
                raise ValueError(f"it holds {name}, which more than numbers and text need")
    raise ValueError("it is cut short")
