"""A Jinja sandbox in which a hostile chat template can neither reach Python nor run or grow without bound.

Jinja's own sandbox guards attributes. This one also counts: every loop iteration, call, filter,
operator and piece of output is charged to a budget of steps, characters and seconds, and operations that
could build a huge value in one go are refused before they run.
"""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from datetime import datetime
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError, TemplateRuntimeError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_OUTPUT_CHARACTERS = 16 << 20
MAX_VALUE_SIZE = 4 << 20
"""Characters of a string or entries of a list that one operation may build."""
MAX_STEPS = 5_000_000
MAX_SECONDS = 1.25
_MAX_INTEGER_BITS = 4096
_MAX_DEPTH = 64


class BudgetError(TemplateRuntimeError):
    """The template asked for more steps, characters or time than it may have."""


class RaisedByTemplate(TemplateError):  # noqa: N818
    """The template called raise_exception: it refuses these messages."""


class Budget:
    """What one rendering has used."""

    def __init__(self) -> None:
        self._steps = 0
        self._characters = 0
        self._deadline = time.monotonic() + MAX_SECONDS

    def step(self, count: int = 1) -> None:
        self._steps += count
        if self._steps > MAX_STEPS:
            raise BudgetError(f"the chat template needs more than {MAX_STEPS} steps")
        if time.monotonic() > self._deadline:
            raise BudgetError(f"the chat template runs for more than {MAX_SECONDS} s")

    def write(self, characters: int) -> None:
        self._characters += characters
        if self._characters > MAX_OUTPUT_CHARACTERS:
            raise BudgetError(f"the chat template writes more than {MAX_OUTPUT_CHARACTERS} characters")
        self.step()

    def measure(self, value: object, depth: int = 0) -> int:
        """An upper estimate of the characters of str(value); walks containers, which may share their parts."""
        if isinstance(value, str):
            return len(value)
        if not isinstance(value, (list, tuple, set, frozenset, Mapping)):
            return 32
        if depth > _MAX_DEPTH:
            raise BudgetError(f"the chat template nests values deeper than {_MAX_DEPTH}")
        self.step(1 + len(value) // 64)
        size = 2
        for item in value:
            size += 4 + self.measure(item, depth + 1)
            if isinstance(value, Mapping):
                size += self.measure(value[item], depth + 1)
        return self.allow(size)

    def allow(self, size: int) -> int:
        if size > MAX_VALUE_SIZE:
            raise BudgetError(f"the chat template builds a value of {size} characters; the limit is {MAX_VALUE_SIZE}")
        return size


budget: ContextVar[Budget] = ContextVar("budget")
"""The budget of the rendering in this context."""


# --- what the compiled template calls --------------------------------------------------------------------


def _iterate(values: Any) -> Any:
    """A loop's iterable, counted."""
    used = budget.get()
    used.step()
    return _counted(values, used)


def _counted(values: Iterable[Any], used: Budget) -> Iterator[Any]:
    for value in values:
        used.step()
        yield value


def _join(*values: object) -> str:
    used = budget.get()
    used.allow(sum(used.measure(value) for value in values))
    used.step()
    return "".join(map(str, values))


def _measured(value: object) -> Any:
    budget.get().measure(value)
    return value


def _stepped(value: object) -> Any:
    budget.get().step()
    return value


def _write(value: object) -> Any:
    used = budget.get()
    used.write(used.measure(value))
    return value


class _Bounded(NodeTransformer):
    """Rewrites a parsed template such that loops, `~`, literals and output go through the functions above."""

    def visit_For(self, node: nodes.For, *args: Any, **kwargs: Any) -> nodes.Node:
        self.generic_visit(node, *args, **kwargs)
        node.iter = _call("bounded_iterate", [_expression(node.iter)], node)
        return node

    def visit_Concat(self, node: nodes.Concat, *args: Any, **kwargs: Any) -> nodes.Node:
        self.generic_visit(node, *args, **kwargs)
        return _call("bounded_join", node.nodes, node)

    def visit_Compare(self, node: nodes.Compare, *args: Any, **kwargs: Any) -> nodes.Node:
        self.generic_visit(node, *args, **kwargs)
        node.expr = _call("bounded_step", [node.expr], node)
        return node

    def visit_List(self, node: nodes.List, *args: Any, **kwargs: Any) -> nodes.Node:
        self.generic_visit(node, *args, **kwargs)
        # A literal that holds a variable can double the size of what it holds, again and again.
        return node if _all_constant(node.items) else _call("bounded_value", [node], node)

    def visit_Dict(self, node: nodes.Dict, *args: Any, **kwargs: Any) -> nodes.Node:
        self.generic_visit(node, *args, **kwargs)
        constant = _all_constant([part for pair in node.items for part in (pair.key, pair.value)])
        return node if constant else _call("bounded_value", [node], node)

    def visit_Tuple(self, node: nodes.Tuple, *args: Any, **kwargs: Any) -> nodes.Node:
        self.generic_visit(node, *args, **kwargs)
        return node if node.ctx != "load" or _all_constant(node.items) else _call("bounded_value", [node], node)

    def visit_Output(self, node: nodes.Output, *args: Any, **kwargs: Any) -> nodes.Node:
        self.generic_visit(node, *args, **kwargs)
        node.nodes = [_call("bounded_write", [_expression(child)], node) for child in node.nodes]
        return node


_BOUNDED = {
    "bounded_iterate": _iterate,
    "bounded_join": _join,
    "bounded_step": _stepped,
    "bounded_value": _measured,
    "bounded_write": _write,
}


def _all_constant(items: Iterable[nodes.Node]) -> bool:
    return all(isinstance(item, nodes.Const) for item in items)


def _expression(child: Any) -> nodes.Expr:
    return nodes.Const(child.data) if isinstance(child, nodes.TemplateData) else child


def _call(name: str, arguments: list[nodes.Expr], origin: nodes.Node) -> nodes.Call:
    call = nodes.Call(nodes.EnvironmentAttribute(name), arguments, [], None, None)
    call.set_lineno(origin.lineno)
    return call


# --- bounded operations ----------------------------------------------------------------------------------


def _check_multiply(used: Budget, left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() + right.bit_length())
    for value, count in ((left, right), (right, left)):
        if isinstance(value, (str, list, tuple)) and isinstance(count, int):
            used.allow(used.measure(value) * max(count, 0))


def _check_power(used: Budget, left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() * max(right, 0))


def _check_bits(bits: int) -> None:
    if bits > _MAX_INTEGER_BITS:
        raise BudgetError(f"the chat template builds a number of {bits} bits; the limit is {_MAX_INTEGER_BITS}")


def _check_add(used: Budget, left: Any, right: Any) -> None:
    if isinstance(left, (str, list, tuple)) and isinstance(right, (str, list, tuple)):
        used.step(1 + (len(left) + len(right)) // 4096)
        used.allow(len(left) + len(right))


def _check_percent(used: Budget, left: Any, right: Any) -> None:
    if isinstance(left, str):
        _check_format(used, left, (right,))


def _check_format(used: Budget, template: str, values: Iterable[object]) -> None:
    """No widths of more than three digits, none that come from the values."""
    if re.search(r"\d{4}|%[^a-zA-Z%]*\*|\{[^}]*\{", template):
        raise BudgetError(f"the chat template formats with a width that is not allowed: {template[:80]!r}")
    fields = 1 + template.count("%") + template.count("{")
    used.allow(len(template) + fields * (1000 + sum(used.measure(value) for value in values)))


_BINARY_CHECKS: dict[str, Callable[[Budget, Any, Any], None]] = {
    "*": _check_multiply,
    "**": _check_power,
    "+": _check_add,
    "%": _check_percent,
}


def _check_str_method(used: Budget, text: str, name: str, arguments: tuple[Any, ...]) -> None:
    """Refuses a method of `str` whose result could be far longer than its operands."""
    used.step(1 + len(text) // 4096)
    if name in ("center", "ljust", "rjust", "zfill", "expandtabs"):
        widths = [argument for argument in arguments if isinstance(argument, int)]
        used.allow(max(widths, default=8) * (1 + text.count("\t")) + len(text))
    elif name == "replace" and len(arguments) > 1 and isinstance(arguments[0], str):
        _check_replace(used, text, arguments[0], str(arguments[1]))
    elif name == "join" and arguments and isinstance(arguments[0], (list, tuple, Mapping)):
        used.allow(len(text) * len(arguments[0]) + used.measure(arguments[0]))
    elif name in ("format", "format_map"):
        _check_format(used, text, arguments)
    elif name == "translate" and arguments:
        used.allow(len(text) * used.measure(arguments[0]))


def _check_replace(used: Budget, text: str, old: str, new: str) -> None:
    used.allow(len(text) + (text.count(old) if old else len(text) + 1) * len(new))


def _check_filter(used: Budget, name: str, arguments: tuple[Any, ...]) -> None:
    value, *rest = arguments or ("",)
    sizes = [argument for argument in rest if isinstance(argument, int)]
    if name == "replace" and len(rest) > 1:
        _check_replace(used, str(value), str(rest[0]), str(rest[1]))
    elif name == "format":
        _check_format(used, str(value), rest)
    elif name == "join" and isinstance(value, (list, tuple, str, Mapping)):
        glue = len(rest[0]) if rest and isinstance(rest[0], str) else 0
        used.allow(glue * len(value) + used.measure(value))
    elif name == "indent":
        width = len(rest[0]) if rest and isinstance(rest[0], str) else max(sizes, default=4)
        used.allow((1 + str(value).count("\n")) * width + len(str(value)))
    elif name in ("tojson", "string", "sort", "unique", "groupby", "min", "max", "dictsort"):
        used.measure(value)
    elif name in ("center", "truncate"):
        used.allow(max(sizes, default=80))


def _charged_test(function: Any) -> Callable[..., Any]:
    @functools.wraps(function)
    def charged(*args: Any, **kwargs: Any) -> Any:
        budget.get().step()
        return function(*args, **kwargs)

    return charged


_UNBOUNDED_FILTERS = ("pprint", "xmlattr", "urlize", "random", "batch", "slice", "wordwrap")
_UNBOUNDED_GLOBALS = ("lipsum", "cycler", "joiner")


def _charged_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    # Jinja passes the context or environment as the first argument to functions that carry this mark.
    leading = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)
    def charged(*args: Any, **kwargs: Any) -> Any:
        used = budget.get()
        used.step()
        if len(args) > leading and isinstance(args[leading], Iterator):
            # What a filter consumes is known beforehand, so that its size can be.
            args = (*args[:leading], list(_counted(args[leading], used)), *args[leading + 1 :])
        _check_filter(used, name, (*args[leading:], *kwargs.values()))
        result = function(*args, **kwargs)
        if isinstance(result, str):
            used.step(len(result) // 4096)
        elif name == "list":
            used.measure(result)
        elif isinstance(result, Iterator):
            return _counted(result, used)
        return result

    return charged


# --- what templates written for Hugging Face expect ------------------------------------------------------


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without Jinja's escaping of HTML characters."""
    if isinstance(indent, int) and indent > 16:
        raise BudgetError(f"tojson with indent {indent}; the limit is 16")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: object) -> None:
    raise RaisedByTemplate(str(message)[:1000])


class _PlainNamespace(Namespace):
    """`namespace()` that refuses names with a leading underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # a key may be called "self"
        self, values = args[0], dict(*args[1:], **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        Namespace.__setitem__(self, name, value)

    def __repr__(self) -> str:
        return "<namespace>"


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot have the attribute {name!r}")


def strftime(now: datetime, pattern: object) -> str:
    """`now` written by a pattern that may not ask for wide fields."""
    _check_format(budget.get(), str(pattern), ())
    return now.strftime(str(pattern))


class _Generation(Extension):
    """`{% generation %}` marks what a trainer learns from; for rendering it is transparent."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's declaration)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """The environment in which all chat templates are compiled. `budget` must be set while one renders."""

    intercepted_binops = frozenset(_BINARY_CHECKS)

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation], cache_size=0)
        self.filters["tojson"] = _to_json
        for name in _UNBOUNDED_FILTERS:
            del self.filters[name]
        self.filters = {name: _charged_filter(name, function) for name, function in self.filters.items()}
        self.tests = {name: _charged_test(function) for name, function in self.tests.items()}
        for name in _UNBOUNDED_GLOBALS:
            del self.globals[name]
        self.globals.update(raise_exception=_raise_exception, namespace=_PlainNamespace)
        for name, function in _BOUNDED.items():
            setattr(self, name, function)

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        bounded = _Bounded().visit(source)
        bounded.set_environment(self)
        return super()._generate(bounded, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        used = budget.get()
        used.step()
        _BINARY_CHECKS[operator](used, left, right)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        used = budget.get()
        used.step()
        method = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps str.format
        owner = getattr(method, "__self__", None)
        if isinstance(owner, str):
            _check_str_method(used, owner, getattr(method, "__name__", ""), (*args, *kwargs.values()))
        result = super().call(__context, __obj, *args, **kwargs)
        if __obj is dict:
            used.measure(result)
        return result
