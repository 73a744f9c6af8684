"""Activations that code writes out, as ``0.5 * x * (1 + torch.tanh(...))``: one pass and one rounding instead of five.

Which way round factors and summands stand doesn't matter, nor whether they are operators, functions or methods.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from ....autograd import stock as F
from ....autograd.activation import apply_kernel, taken
from ....autograd.dispatch import autocast_dtype
from ..members import call_refusal, computed
from .pattern import Finder, Match, Pattern

__all__ = ["PATTERN"]

_NAMES: dict[Any, str] = {
    **dict.fromkeys((operator.mul, torch.mul, "mul"), "*"),
    **dict.fromkeys((operator.truediv, torch.div, "div"), "/"),
    **dict.fromkeys((operator.add, torch.add, "add"), "+"),
    **dict.fromkeys((operator.pow, torch.pow, "pow"), "^"),
    **dict.fromkeys((torch.square, "square"), "square"),
    **{getattr(torch, name): name for name in ("erf", "relu", "sigmoid", "tanh")},
    **{name: name for name in ("erf", "relu", "sigmoid", "tanh")},
    F.relu: "relu",
    F.softplus: "softplus",
}
#: What autocast computes in float32, so that results may be of another dtype.
_IN_FLOAT32 = ("^", "softplus")
#: More calls than any formula has.
_LONGEST = 12


class _OtherwiseError(Exception):
    """The expression is none that a formula may be made of."""


def _shape(value: Any, x: fx.Node | None, inside: list[fx.Node], root: bool = False) -> Any:
    """An expression of one value in a form of its own; the calls that it is made of go to ``inside``.

    A value that is used more than once is no part of the expression, but what it is of: x.
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(f"{value:.6g}")
    if not isinstance(value, fx.Node):
        raise _OtherwiseError
    name = _NAMES.get(value.target) if value.op in ("call_function", "call_method") else None
    if (
        value is x
        or name is None
        or value.kwargs not in ({}, {"inplace": False})
        or not (root or len(value.users) == 1)
    ):
        if x is not None and value is not x:
            raise _OtherwiseError
        return "x"
    inside.append(value)
    if len(inside) > _LONGEST:
        raise _OtherwiseError
    parts = [_shape(part, x, inside) for part in value.args]
    if name == "square":
        name, parts = "^", [*parts, 2.0]
    if name == "^":
        base, power = parts
        if power not in (2.0, 3.0):
            raise _OtherwiseError
        name, parts = "*", [base] * int(power)
    elif name == "/":
        if not isinstance(parts[1], float) or parts[1] == 0:
            raise _OtherwiseError
        name, parts = "*", [parts[0], float(f"{1 / parts[1]:.6g}")]
    if name not in ("*", "+"):
        return name, *parts
    flat = [one for part in parts for one in (part[1] if isinstance(part, tuple) and part[0] == name else [part])]
    return name, tuple(sorted(flat, key=repr))


def _shape_of(formula: Callable[[Any], Any]) -> Any:
    graph = fx.symbolic_trace(formula).graph
    x, *_, output = graph.nodes
    return _shape(output.args[0], x, [], root=True)


#: The activation that each formula is, in its form.
_FORMULAS: dict[Any, str] = {
    _shape_of(formula): name
    for name, formulas in {
        "gelu": (lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),),
        "gelu_tanh": (
            lambda x: 0.5 * x * (1 + F.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
            lambda x: 0.5 * x * (1 + F.tanh(math.sqrt(2 / math.pi) * x * (1 + 0.044715 * x * x))),
        ),
        "mish": (lambda x: x * F.tanh(F.softplus(x)),),
        "quick_gelu": (lambda x: x * F.sigmoid(1.702 * x),),
        "relu_squared": (lambda x: F.relu(x) ** 2,),
        "silu": (lambda x: x * F.sigmoid(x),),
    }.items()
    for formula in formulas
}


def _match(search: Finder, node: fx.Node, _: nn.Module | None) -> Match | None:
    if node.target not in _NAMES:
        return None
    root = node
    for _step in range(_LONGEST):
        if len(root.users) != 1:
            return None
        root = next(iter(root.users))
        found = _formula(root)
        if found is not None:
            name, x, inside = found
            nodes = [one for one in root.graph.nodes if one in inside and one is not root]
            if nodes[0] is not node or search.extend(nodes, lambda n, last=root: True if n is last else None) is None:  # type: ignore[misc]
                return None
            return Match(nodes, _computing(name, _apart(nodes, x), _is_widened(nodes)), (x,), {})
    return None


PATTERN = Pattern((), (), _match)


def _formula(root: fx.Node) -> tuple[str, fx.Node, set[fx.Node]] | None:
    """The activation that a call completes, of which value, and its calls."""
    if root.target not in _NAMES:
        return None
    inside: list[fx.Node] = []
    try:
        name = _FORMULAS.get(_shape(root, None, inside, root=True))
    except _OtherwiseError:
        return None
    operands = {part for one in inside for part in one.all_input_nodes} - set(inside)
    return (name, operands.pop(), set(inside)) if name is not None and len(operands) == 1 else None


def _apart(nodes: list[fx.Node], x: fx.Node) -> Callable[[Tensor], Tensor]:
    """The calls as the code makes them."""
    graph = fx.Graph()
    copies = {x: graph.placeholder("x")}
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(copies[nodes[-1]])
    apart: Callable[[Tensor], Tensor] = fx.GraphModule(nn.Module(), graph).forward
    return apart


def _is_widened(nodes: list[fx.Node]) -> bool:
    return any(_NAMES[node.target] in _IN_FLOAT32 for node in nodes)


def _computing(name: str, apart: Callable[[Tensor], Tensor], widened: bool) -> Callable[[Tensor], Tensor]:
    """What is called in place of a formula.  Its constants may be rounded to float32: float64 is the code's own."""

    def formula(x: Tensor) -> Tensor:
        if not isinstance(x, Tensor) or x.dtype is torch.float64 or call_refusal(x) is not None:
            return apart(x)
        if widened and autocast_dtype(x) is not None:
            return apart(x)
        activation = taken(name, x)
        return apart(x) if activation is None else computed(lambda: apply_kernel(x, activation, False))

    return formula
