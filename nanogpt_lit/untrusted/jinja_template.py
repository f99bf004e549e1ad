"""A Jinja template from a stranger, rendered as transformers renders chat templates, and within a budget.

The sandbox of jinja2 keeps it from Python's inside. What it may still do is work without an end, which is counted here:
rounds of loops and calls, and the characters of what it puts together.
"""

import json
from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import nodes
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from nanogpt_lit.errors import UserError

MOST_STEPS = 1_000_000
"""Rounds of loops, of one conversation: about a second."""
OF_A_CALL = 10
"""Rounds that take as long as a call."""
MOST_CHARS = 1 << 24
MOST_POWER = 64


class JinjaTemplate:
    """A compiled template. name: for errors

    Raises UserError where it is no Jinja.
    """

    def __init__(self, source: str, name: str) -> None:
        self.name = name
        self._environment = BoundedEnvironment()
        try:
            self._template = self._environment.from_string(source)
        except Exception as error:  # jinja2's own, and Python's for what cannot be compiled, are not one family
            raise UserError(f"{name} cannot be read as Jinja: {shown_error(error)}.") from error

    def render(self, **variables: Any) -> str:
        """The text. Raises UserError with what the template, or Python, says against the variables."""
        self._environment.steps = 0
        try:
            return self._template.render(**variables)
        except Exception as error:  # whatever Python raises for a wrong operation
            raise UserError(f"{self.name} fails: {shown_error(error)}") from error


def shown_error(error: Exception) -> str:
    text = " ".join(str(error).split())[:200]
    return text if isinstance(error, TemplateError) and text else f"{type(error).__name__}: {text}"


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "*", "**"})

    def __init__(self) -> None:
        # As transformers: a line that holds a block alone leaves no trace.
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, loopcontrols])
        self.steps = 0
        self.filters |= {"tojson": to_json, "counted": self.counted, "concatenated": self.concatenated}
        self.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
        del self.globals["lipsum"]  # filler text without an end, for web pages

    def concat(self, parts: Iterable[str]) -> str:  # of what a block or a macro writes
        return self.concatenated(parts)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return Bounded().visit(super()._parse(source, name, filename))

    def spend(self, steps: int) -> None:
        self.steps += steps
        if self.steps > MOST_STEPS:
            raise TemplateError(f"it does not end within {MOST_STEPS:,} rounds of its loops")

    def counted(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self.spend(1)
            yield value

    def concatenated(self, parts: Iterable[Any]) -> str:
        texts = [str(part) for part in parts]
        check_size(sum(map(len, texts)))
        return "".join(texts)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        __self.spend(OF_A_CALL)
        for value in (*args, *kwargs.values()):
            if isinstance(value, int):
                check_size(value)
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        sizes = [len(value) if isinstance(value, str | list | tuple) else value for value in (left, right)]
        is_long = any(size is not value for size, value in zip(sizes, (left, right), strict=True))
        if operator == "**":
            check_size(MOST_CHARS + 1 if not -MOST_POWER <= right <= MOST_POWER else 0)
        elif is_long:
            check_size(sizes[0] * sizes[1] if operator == "*" else sizes[0] + sizes[1])
        return super().call_binop(context, operator, left, right)


class Bounded(NodeTransformer):
    """Sends what loops go through, and what `~` puts together, through the environment's counters."""

    def visit_For(self, node: nodes.For) -> nodes.For:  # noqa: N802
        self.generic_visit(node)
        node.iter = filtered("counted", node.iter)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:  # noqa: N802
        self.generic_visit(node)
        return filtered("concatenated", nodes.List(node.nodes, lineno=node.lineno))


def filtered(name: str, node: Any) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class GenerationBlock(Extension):
    """{% generation %}: marks, for transformers, what the assistant says. It writes what it holds."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def check_size(size: float) -> None:
    if size > MOST_CHARS:
        raise TemplateError(f"it makes more than {MOST_CHARS:,} characters")


def to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON as it is; jinja2's own filter writes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
