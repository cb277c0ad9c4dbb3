"""Jinja for templates from strangers: no attribute that leads out, and no more time, memory or output than is allowed.

`ImmutableSandboxedEnvironment` sees to the first. For the rest every loop, call, filter, operator and
list here is metered: none may take or make a value of more than `LARGEST` characters or items, which bounds what a
single one costs, and all look at the clock. Filters and functions are those that chat templates use.
"""

from __future__ import annotations

import datetime
import functools
import json
import math
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

LONGEST_TEMPLATE = 1 << 20  # characters
LARGEST = 1 << 25  # characters or items of any value on the way
PART = 8  # characters that a part of a list or dictionary counts for, which looking at it takes as long as
SECONDS = 5.0
STEPS = 1_000_000  # rounds of loops, calls, filters and operators
FILTERS = (
    "abs", "batch", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "groupby",
    "indent", "int", "items", "join", "last", "length", "list", "lower", "map", "max", "min", "reject",
    "rejectattr", "replace", "reverse", "round", "safe", "select", "selectattr", "slice", "sort", "string", "sum",
    "title", "trim", "unique", "upper",
)  # fmt: skip


class TemplateLimit(ValueError):
    """A template that takes more time, memory or output than is allowed."""


class _Meter(threading.local):
    """What the template that this thread renders has used so far."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        self.steps, self.end = 0, time.monotonic() + SECONDS

    def step(self, *values: Any) -> None:
        """One more, which takes or makes these values."""
        self.steps += 1
        if self.steps > STEPS or time.monotonic() > self.end:
            raise TemplateLimit(f"the template takes more than {STEPS:,} steps or {SECONDS:g} seconds")
        for value in values:
            self.allow(size_of(value))

    def allow(self, size: int) -> None:
        if size > LARGEST:
            raise TemplateLimit(f"the template makes a value of more than {LARGEST:,} characters or items")


def size_of(value: Any) -> int:
    """The characters in a value, those of its parts too, as often as they would be written, and some for each part."""
    total, waiting = 0, [value]
    while waiting and total <= LARGEST:
        part = waiting.pop()
        total += PART
        if isinstance(part, (str, bytes, range)):
            total += len(part)
        elif isinstance(part, Mapping):
            waiting += [*part.keys(), *part.values()]
        elif isinstance(part, (list, tuple, set, frozenset)):
            waiting += part
        elif isinstance(part, Namespace):
            waiting += object.__getattribute__(part, "_Namespace__attrs").values()
    return total


def product_of(values: Iterable[Any]) -> int:
    """A bound on what a function of text and numbers makes: `replace` and `join` multiply texts, others count."""
    sizes = (
        abs(value) if isinstance(value, int) else len(value) if isinstance(value, str) else size_of(value) // PART
        for value in values
    )
    return math.prod(max(1, size) for size in sizes)


class _Metering(NodeTransformer):
    """Puts the meter around what a loop goes through, what `~` joins, and every list."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.iter = _call("counted", cast(nodes.Expr, node.iter))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:
        self.generic_visit(node)
        return _call("joined", *node.nodes)

    def visit_List(self, node: nodes.List) -> nodes.Expr:
        self.generic_visit(node)
        return _call("made", node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Expr:
        self.generic_visit(node)
        return _call("made", node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Expr:
        self.generic_visit(node)
        return _call("made", node) if node.ctx == "load" else node


def _call(name: str, *arguments: nodes.Expr) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(name), list(arguments), [], None, None)


class GenerationTag(Extension):
    """`{% generation %}…{% endgeneration %}`: what the assistant says, which only training looks at."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment that transformers gives chat templates, metered."""

    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "%", "**"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[GenerationTag, loopcontrols],
            optimized=False,  # nothing is computed before it is metered
            finalize=self.made,
            cache_size=0,
        )
        self.meter = _Meter()
        self.filters = {name: self._metered(self.filters[name]) for name in FILTERS}
        self.filters |= {"tojson": self._metered(_to_json)}
        self.globals = {
            "range": range,
            "dict": dict,
            "namespace": Namespace,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }

    def compiled(self, source: str) -> jinja2.Template:
        """`ValueError` in one line for what is no template."""
        if len(source) > LONGEST_TEMPLATE:
            raise TemplateLimit(f"the template has {len(source):,} characters, more than {LONGEST_TEMPLATE:,}")
        try:
            return self.from_string(_Metering().visit(self._parse(source, None, None)))
        except jinja2.TemplateError as error:
            raise ValueError(f"the template is not valid: {_one_line(error)}") from None
        except (RecursionError, MemoryError, SyntaxError, OverflowError):
            raise ValueError("the template is not valid: it is nested too deeply") from None

    def rendered(self, template: jinja2.Template, variables: Mapping[str, Any], longest: int) -> str:
        """The text. `ValueError` in one line for a template that fails, `TemplateLimit` where it takes too much."""
        self.meter.start()
        pieces, length = [], 0
        try:
            for piece in template.generate(**variables):
                length += len(piece)
                if length > longest:
                    raise TemplateLimit(f"the template writes more than {longest:,} characters")
                pieces.append(piece)
        except TemplateLimit:
            raise
        except Exception as error:  # a template can do wrong whatever Python can
            raise ValueError(f"the model's chat template fails: {_one_line(error)}") from None
        return "".join(pieces)

    # --- what is metered ------------------------------------------------------------------------------------------

    def counted(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self.meter.step()
            yield item

    def joined(self, *parts: Any) -> str:
        self.meter.step(parts)
        return "".join(map(str, parts))

    def made(self, value: Any) -> Any:
        self.meter.step(value)
        return value

    def call(__self, __context: Any, __function: Any, *arguments: Any, **named: Any) -> Any:  # noqa: N805, as Jinja has it
        if getattr(__function, "__name__", "") in ("format", "format_map"):
            raise TemplateLimit("str.format is not allowed in a chat template")
        __self.meter.step(arguments, named)
        if isinstance(owner := getattr(__function, "__self__", None), (str, list, tuple, dict)):
            __self.meter.allow(product_of([owner, *arguments, *named.values()]))
        result = super().call(__context, __function, *arguments, **named)
        __self.meter.step(result)
        return result

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self.meter.step(left, right)
        if operator == "*":
            self.meter.allow(product_of([left, right]) if not (isinstance(left, int) and isinstance(right, int)) else 1)
        if operator == "%" and isinstance(left, str) and re.search(r"%[^%a-zA-Z]*(\d{4}|\*)", left):
            raise TemplateLimit("the template formats a value to more than 999 characters")
        if operator == "**" and isinstance(right, int) and abs(right) > 64:
            raise TemplateLimit("the template raises a number to a power above 64")
        result = super().call_binop(context, operator, left, right)
        if isinstance(result, int) and result.bit_length() > 4096:
            raise TemplateLimit("the template makes a number of more than 4096 bits")
        self.meter.step(result)
        return result

    def _metered(self, function: Callable[..., Any]) -> Callable[..., Any]:
        passes = getattr(function, "jinja_pass_arg", None)  # what Jinja hands over before the value: its context, say

        @functools.wraps(function)
        def metered(*arguments: Any, **named: Any) -> Any:
            values = [*arguments[1 if passes else 0 :], *named.values()]
            self.meter.step(values)
            self.meter.allow(product_of(values))
            result = function(*arguments, **named)
            self.meter.step(result)
            return result

        return metered


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """As transformers has it: without Jinja's escapes for HTML."""
    if indent is not None and not (isinstance(indent, int) and 0 <= indent <= 16):
        raise TemplateLimit("the template indents JSON by more than 16")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    if len(form) > 200 or re.search(r"%[^%a-zA-Z]*\d", form):
        raise TemplateLimit("the template asks for a date of no ordinary form")
    return datetime.datetime.now().strftime(form)


def _one_line(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300]
