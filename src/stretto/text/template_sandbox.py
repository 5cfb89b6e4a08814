"""The Jinja environment that runs the chat template of a checkpoint, which is not trusted.

Jinja's immutable sandbox keeps a template from reaching anything but its arguments, not from running for ever
or filling the memory. Here each turn of a loop and each call of a macro looks at the time, each text that
grows is measured first, and whatever makes a huge text at one stroke is refused.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Sized
from contextvars import ContextVar
from functools import wraps
from typing import Any, TypeVar, cast

from jinja2 import Template, TemplateError, nodes
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

SECONDS = 2.0  # of the thread's processor time, for one prompt
LONGEST = 2**24  # characters of a text, or members of a value that becomes one
ALL_OUTPUT = 2**26  # characters that all expressions of a template give out
WIDEST = 10_000  # the width, indent or count in a format or a call
LARGEST_BITS = 4096  # of an integer
TURNS = 64  # between two looks at the clock
# They make a long text out of a number or a table, and no chat template uses them.
UNSAFE_METHODS = {"center", "expandtabs", "format_map", "ljust", "maketrans", "rjust", "translate", "zfill"}
UNSAFE_FILTERS = ("batch", "center", "pprint", "slice", "urlize", "wordwrap", "xmlattr")
UNSAFE_GLOBALS = ("lipsum",)
# Filters that write their first argument as text.
TEXT_FILTERS = (
    *("capitalize", "e", "escape", "forceescape", "format", "indent", "lower", "replace", "safe", "string"),
    *("striptags", "title", "trim", "truncate", "upper", "urlencode", "wordcount"),
)
F = TypeVar("F", bound=Callable[..., Any])
MEMBER = 8  # about the characters of a member of a list, beside those of its texts
SIZED: tuple[type[Sized], ...] = (str, list, tuple)
_WIDE = re.compile(r"\d{5}|\*")


class TemplateLimit(TemplateError):
    """A template exceeds a limit."""


class Budget:
    """What one rendering has used of its time and its output."""

    __slots__ = ("output", "turns", "until")

    def __init__(self) -> None:
        self.until = 0.0  # the end of its time; 0: most renderings end before anybody looks at the clock
        self.turns = 0
        self.output = 0


_budget: ContextVar[Budget] = ContextVar("budget")


def _tick(value: object) -> object:
    """Counts one turn of a loop or one call of a macro."""
    spent = _budget.get()
    spent.turns += 1
    if spent.turns % TURNS == 0:
        now = time.thread_time()
        spent.until = spent.until or now + SECONDS
        if now > spent.until:
            raise TemplateLimit(f"it runs for more than {SECONDS:g} s")
    return value


def _emitted(value: object) -> object:
    """Counts what an expression gives out."""
    # Without a budget the template is being compiled, and this is a constant in its source.
    if (spent := _budget.get(None)) is not None:
        spent.output += len(value) if type(value) is str else _check(value)
        if spent.output > ALL_OUTPUT:
            raise _too_long()
    return value


def _check(value: object) -> int:
    """About the characters of a value as text. Raises TemplateLimit for too many."""
    size = len(value) if isinstance(value, str) else _weight(value)
    if size > LONGEST:
        raise _too_long()
    return size


def _weight(value: object) -> int:
    """About the characters of a value as text, counted until they are too many. A list that holds another one
    twice has its members twice, as in its text."""
    size, rest = 0, [value]
    while rest and size <= LONGEST:
        each = rest.pop()
        if isinstance(each, str):
            size += len(each)
        elif isinstance(each, dict):
            members = cast("dict[object, object]", each)
            size += len(members) * MEMBER
            rest += [*members, *members.values()]
        elif isinstance(each, list | tuple):
            listed = cast("list[object]", each)
            size += len(listed) * MEMBER
            rest += listed
    return size


def _measured(value: object) -> object:
    """The value, if it is not too long."""
    if isinstance(value, SIZED) and len(value) > LONGEST:
        raise _too_long()
    return value


def _joined(values: Iterable[object]) -> str:
    """What `~` makes of its operands."""
    texts = [value if isinstance(value, str) else str(value) for value in values if _check(value) >= 0]
    if sum(map(len, texts)) > LONGEST:
        raise _too_long()
    return "".join(texts)


def _too_long() -> TemplateLimit:
    return TemplateLimit(f"it makes a text or a value with more than {LONGEST} characters or members")


def _check_numbers(values: Iterable[object]) -> None:
    if any(isinstance(value, int) and abs(value) > WIDEST for value in values):
        raise TemplateLimit(f"it asks for a width, an indent or a count above {WIDEST}")


def check_json_arguments(value: object, indent: int | None) -> None:
    """Raises TemplateLimit for a value or an indent whose JSON would be too long."""
    _check_numbers([indent])
    if _check(value) * (1 + (indent or 0)) > LONGEST:
        raise _too_long()


def _check_replacement(text: str, old: object = "", new: object = "", *_: object) -> None:
    if len(text) + text.count(str(old)) * len(str(new)) > LONGEST:
        raise _too_long()


def _check_format(form: str, marker: str, values: Iterable[object]) -> None:
    values = list(values)
    if _WIDE.search(form):
        raise TemplateLimit(f"it asks for a width above {WIDEST}")
    _check_numbers(values)
    if len(form) + form.count(marker) * max(map(_weight, values), default=0) > LONGEST:
        raise _too_long()


class _Guards(NodeTransformer):
    """Adds `_tick` to every loop and macro, and measures what `+` and `~` make."""

    def _ticking(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        tick = nodes.Filter(nodes.Const(0), "_tick", [], [], None, None)
        node.body.insert(0, nodes.ExprStmt(tick).set_lineno(node.lineno))
        return node

    visit_For = visit_Macro = visit_CallBlock = visit_Block = visit_FilterBlock = _ticking

    def visit_Add(self, node: nodes.Add, inner: int = 0) -> nodes.Node:
        # Of `a + b + c + ...` every eighth sum is measured, and the whole.
        if isinstance(node.left, nodes.Add):
            node.left = cast("nodes.Expr", self.visit_Add(node.left, inner + 1))
            node.right = cast("nodes.Expr", self.visit(node.right))
        else:
            self.generic_visit(node)
        if inner % 8:
            return node
        return nodes.Filter(node, "_measured", [], [], None, None).set_lineno(node.lineno)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        values = nodes.List(node.nodes).set_lineno(node.lineno)
        return nodes.Filter(values, "_joined", [], [], None, None).set_lineno(node.lineno)


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's immutable sandbox with limits of time and memory. Render with `render`."""

    intercepted_binops = frozenset(["*", "**", "%"])

    def __init__(self, **options: Any) -> None:
        super().__init__(finalize=_emitted, **options)
        filters = cast("dict[str, Callable[..., Any]]", self.filters)
        for name in UNSAFE_FILTERS:
            del filters[name]
        for name in TEXT_FILTERS:
            filters[name] = _on_text(filters[name], name)
        filters["join"] = _on_list(filters["join"])
        filters |= {"_tick": _tick, "_measured": _measured, "_joined": _joined}
        for name in UNSAFE_GLOBALS:
            del cast("dict[str, Any]", self.globals)[name]

    def compiled(self, source: str) -> Template:
        """The template of a source. Call it when the environment's globals are complete."""
        template = self.from_string(source)
        # Jinja has them in a chain of tables, which it reads twice for each prompt: that takes 10 us.
        template.globals = dict(template.globals)
        return template

    def render(self, template: Template, values: dict[str, Any]) -> str:
        """The text that a template of this environment makes. Raises what the template raises, and
        TemplateLimit when it takes too much time or memory."""
        token = _budget.set(Budget())
        try:
            return template.render(values)
        finally:
            _budget.reset(token)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return cast("nodes.Template", _Guards().visit(super()._parse(source, name, filename)))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str) and attr in UNSAFE_METHODS:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def call(self, context: Context, obj: Any, *args: Any, **kwargs: Any) -> Any:  # pyright: ignore
        owner = getattr(obj, "__self__", None)
        if isinstance(owner, str):
            name = obj.__name__
            if name == "replace":
                _check_replacement(owner, *args, *kwargs.values())
            elif name == "join":
                args = (list(args[0]),)
                _joined(part for each in args[0] for part in (owner, each))
            _check_numbers(args)
        return super().call(context, obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        @wraps(wrapped)
        def checked(*args: Any, **kwargs: Any) -> str:
            _check_format(value.__self__, "{", [*args, *kwargs.values()])
            return wrapped(*args, **kwargs)

        return checked

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            _check_format(
                left, "%", cast("tuple[object, ...]", right if isinstance(right, tuple) else (right,))
            )
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            if left.bit_length() * abs(right) > LARGEST_BITS:
                raise TemplateLimit("it computes too large a number")
        elif operator == "*":
            _check_product(left, right)
            _check_product(right, left)
        return super().call_binop(context, operator, left, right)


def _check_product(left: object, right: object) -> None:
    if isinstance(left, str | list | tuple) and isinstance(right, int):
        if len(cast("list[object]", left)) * right > LONGEST:
            raise _too_long()
    elif isinstance(left, int) and isinstance(right, int):
        if left.bit_length() + right.bit_length() > LARGEST_BITS:
            raise TemplateLimit("it computes too large a number")


def _on_text(filter_: F, name: str) -> F:
    """A filter that writes its first argument as text, with its arguments checked."""
    # Filters that want the context or the environment get it first.
    place = int(hasattr(filter_, "jinja_pass_arg"))

    @wraps(filter_)
    def checked(*args: Any, **kwargs: Any) -> Any:
        value, others = args[place], (*args[place + 1 :], *kwargs.values())
        _check(value)
        if not others:
            return filter_(*args)
        _check_numbers(others)
        if name == "replace":
            _check_replacement(str(value), *others)
        elif name == "format":
            _check_format(str(value), "%", others)
        elif name == "indent":
            _check_replacement(
                str(value), "\n", " " * (others[0] if others and isinstance(others[0], int) else 4)
            )
        return filter_(*args, **kwargs)

    return cast("F", checked)


def _on_list(join: F) -> F:
    """The filter `join` with the length of its result checked."""

    @wraps(join)
    def checked(context: Any, value: Any, d: Any = "", attribute: Any = None) -> Any:
        values = list(value)
        if len(values) * len(str(d)) + sum(map(_check, values)) > LONGEST:
            raise _too_long()
        return join(context, values, d, attribute)

    return cast("F", checked)
