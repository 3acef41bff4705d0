"""Find the exception names of a Python file (`except` clauses, `raise` statements) and hide one of them."""

from __future__ import annotations

import ast
import re
import textwrap
import warnings
from dataclasses import dataclass

HOLE = "__HOLE__"
CLASSES = (
    "ValueError",
    "KeyError",
    "AttributeError",
    "TypeError",
    "OSError",
    "IOError",
    "ImportError",
    "IndexError",
    "DoesNotExist",
    "KeyboardInterrupt",
    "StopIteration",
    "AssertionError",
    "SystemExit",
    "RuntimeError",
    "HTTPError",
    "UnicodeDecodeError",
    "NotImplementedError",
    "ValidationError",
    "ObjectDoesNotExist",
    "NameError",
)
_LABEL = {name: index for index, name in enumerate(CLASSES)}
_MAY_HOLD_A_LABEL = re.compile(rb"except[^\n:]*\b(" + "|".join(CLASSES).encode() + rb")\b")
_LONGEST = 8_000  # characters kept around a hole; 99.9 % of the functions are shorter


@dataclass(frozen=True)
class Hole:
    """An exception name in a function: its label (None outside the 20 classes), where it stands in the text, and
    whether a `raise` statement gives it (else an `except` clause does)."""

    label: int | None
    start: int
    end: int
    raised: bool = False


@dataclass(frozen=True)
class Function:
    """A function with at least one such name."""

    module: str
    text: str
    holes: tuple[Hole, ...]


def functions_with_names(source: bytes, module: str, *, raises: bool = False) -> list[Function]:
    """Every function of a file that names an exception in a handler of its own (nested functions are their own).

    With `raises`, the names that `raise` statements give count as well.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escape sequences and the like in other people's code
        tree = ast.parse(source)
    names: dict[ast.AST, list[ast.expr]] = {}

    def collect(node: ast.AST, function: ast.AST | None) -> None:
        for child in ast.iter_child_nodes(node):
            inner = child if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) else function
            name = _exception_name(child, raises)
            if name is not None and inner is not None:
                names.setdefault(inner, []).append(name)
            collect(child, inner)

    collect(tree, None)
    line_starts = [0]
    for line in source.split(b"\n"):
        line_starts.append(line_starts[-1] + len(line) + 1)
    found = []
    for function, nodes in names.items():
        assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        first_line = min([function.lineno, *(decorator.lineno for decorator in function.decorator_list)])
        start = line_starts[first_line - 1]
        end = line_starts[(function.end_lineno or first_line) - 1] + (function.end_col_offset or 0)
        spans = [_span(node, line_starts) for node in nodes]
        found.append(
            _function(module, source[start:end], nodes, [(low - start, high - start) for low, high in spans])
        )
    return found


def _span(node: ast.expr, line_starts: list[int]) -> tuple[int, int]:
    """First and last byte of an expression in its file."""
    end_line, end_column = node.end_lineno or node.lineno, node.end_col_offset or 0
    return line_starts[node.lineno - 1] + node.col_offset, line_starts[end_line - 1] + end_column


def _function(module: str, segment: bytes, nodes: list[ast.expr], spans: list[tuple[int, int]]) -> Function:
    """Byte offsets (the syntax tree's) become character offsets."""
    holes = []
    for node, (start, end) in zip(nodes, spans, strict=True):
        before = segment[:start].decode()
        raised = before.rstrip().endswith("raise")
        holes.append(Hole(_label_of(node), len(before), len(segment[:end].decode()), raised))
    return Function(module, segment.decode(), tuple(holes))


def _exception_name(node: ast.AST, raises: bool) -> ast.expr | None:
    if isinstance(node, ast.ExceptHandler):
        return node.type
    if raises and isinstance(node, ast.Raise):
        raised = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
        return raised if isinstance(raised, ast.Name | ast.Attribute) else None
    return None


def _label_of(node: ast.expr) -> int | None:
    name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
    return _LABEL.get(name)


def masked(function: Function, hole: Hole) -> str:
    """The function's text with one handler's type hidden, unindented, at most 8,000 characters around the hole."""
    text = function.text[: hole.start] + HOLE + function.text[hole.end :]
    low = max(0, hole.start - _LONGEST // 2)
    return textwrap.dedent(text[low : low + _LONGEST])


def may_hold_a_label(source: bytes) -> bool:
    """A quick look before the costly parse: does any clause mention one of the 20 classes?"""
    return _MAY_HOLD_A_LABEL.search(source) is not None
