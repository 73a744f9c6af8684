"""What is changed: one place of a source at a time, found in its syntax tree and replaced in its text."""

import ast
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any, NamedTuple

__all__ = ["Mutant", "mutants_of"]


class Mutant(NamedTuple):
    """One expression or statement of a source that becomes another."""

    path: str
    line: int
    kind: str
    before: str
    after: str
    start: int  # in bytes, as syntax trees count

    def of(self, source: str) -> str:
        """The mutated source."""
        text = source.encode()
        return (text[: self.start] + self.after.encode() + text[self.start + len(self.before.encode()) :]).decode()

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.kind}: {self.before} -> {self.after}"


Change = tuple[Any, str, str]  # the node that is replaced, the kind, the new text

_COMPARISONS: dict[type[ast.cmpop], str] = {
    ast.Lt: "<=",
    ast.LtE: "<",
    ast.Gt: ">=",
    ast.GtE: ">",
    ast.Eq: "!=",
    ast.NotEq: "==",
    ast.Is: "is not",
    ast.IsNot: "is",
    ast.In: "not in",
    ast.NotIn: "in",
}
_OPERATORS: dict[type[ast.operator], str] = {
    ast.Add: "-",
    ast.Sub: "+",
    ast.Mult: "/",
    ast.Div: "*",
    ast.BitAnd: "|",
    ast.BitOr: "&",
}
#: Keywords that kernels are wrong without, by what leaving them out is called.
_KEYWORDS = {"mask": "a mask is missing", "propagate_nan": "NaN isn't propagated", "refusal": "a refusal is missing"}
#: Methods, and functions of one argument, without which memory is another, or a graph.
_COPIES = {"clone", "contiguous", "dense", "detach"}
#: Calls that tell autograd something.
_MARKS = {"increment_version", "mark_dirty", "mark_non_differentiable", "set_materialize_grads"}


def mutants_of(path: str, source: str) -> list[Mutant]:
    """Every mutant of a source, in its order."""
    text = source.encode()
    lines = [0, *accumulate(len(line) for line in text.splitlines(keepends=True))]

    def start(node: Any) -> int:
        return lines[node.lineno - 1] + node.col_offset

    def code(node: Any) -> str:
        return text[start(node) : lines[node.end_lineno - 1] + node.end_col_offset].decode()

    mutants = [
        Mutant(path, changed.lineno, kind, code(changed), after, start(changed))
        for node in _behaviour(ast.parse(source))
        for changed, kind, after in _changes(node, code)
    ]
    return sorted(mutants, key=lambda mutant: mutant.start)


def _behaviour(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that a run can depend on: no annotations, no decorators, no words of errors, no checks of `zip`."""
    yield node
    if isinstance(node, ast.Raise) or (isinstance(node, ast.keyword) and node.arg == "strict"):
        return
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _behaviour(child)


def _changes(node: ast.AST, text: Callable[[ast.AST], str]) -> Iterator[Change]:
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        yield node, "comparison", f"{text(node.left)} {_COMPARISONS[type(node.ops[0])]} {text(node.comparators[0])}"
    elif isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        yield (
            node,
            "operator",
            f"({_grouped(node.left, text)} {_OPERATORS[type(node.op)]} {_grouped(node.right, text)})",
        )
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.Not)):
        yield node, "sign" if isinstance(node.op, ast.USub) else "negation", f"({text(node.operand)})"
    elif isinstance(node, ast.BoolOp):
        other = " or " if isinstance(node.op, ast.And) else " and "
        yield node, "condition", f"({other.join(_grouped(value, text) for value in node.values)})"
    elif isinstance(node, ast.Constant) and type(node.value) in (bool, int, float):
        after = not node.value if type(node.value) is bool else node.value + 1
        yield node, "constant", str(after)
    elif isinstance(node, ast.Call):
        yield from _calls(node, text)
    elif isinstance(node, ast.Raise):
        yield node, "an error is missing", "pass"
    elif isinstance(node, ast.Return) and isinstance(node.value, (ast.Constant, ast.JoinedStr)):
        if text(node.value).startswith(('"', 'f"')):
            yield node, "a refusal is missing", "return None"
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and _name(node.value) in _MARKS:
        yield node, "a mark is missing", "pass"


def _calls(node: ast.Call, text: Callable[[ast.AST], str]) -> Iterator[Change]:
    def call(arguments: list[str]) -> str:
        return f"{text(node.func)}({', '.join(arguments)})"

    positional, keywords = [text(one) for one in node.args], [text(one) for one in node.keywords]
    for index, keyword in enumerate(node.keywords):
        if keyword.arg in _KEYWORDS:
            others = keywords[:index] + keywords[index + 1 :]
            if keyword.arg == "mask":  # which other= needs
                others = [other for other in others if not other.startswith("other=")]
            yield node, _KEYWORDS[keyword.arg], call([*positional, *others])
        elif keyword.arg == "other":
            yield keyword.value, "another value outside", f"({text(keyword.value)}) + 1"
    starred = any(isinstance(one, ast.Starred) for one in node.args[:2])
    if len(positional) > 1 and not starred and positional[0] != positional[1]:
        yield node, "swapped arguments", call([positional[1], positional[0], *positional[2:], *keywords])
    if _name(node) in _COPIES and not node.keywords:
        if isinstance(node.func, ast.Attribute) and not node.args:
            yield node, f"no {node.func.attr}", text(node.func.value)
        elif isinstance(node.func, ast.Name) and len(node.args) == 1:
            yield node, f"no {node.func.id}", positional[0]


def _name(call: ast.Call) -> str:
    return getattr(call.func, "attr", getattr(call.func, "id", ""))


def _grouped(node: ast.AST, text: Callable[[ast.AST], str]) -> str:
    return f"({text(node)})" if isinstance(node, (ast.BinOp, ast.BoolOp, ast.IfExp, ast.Compare)) else text(node)
