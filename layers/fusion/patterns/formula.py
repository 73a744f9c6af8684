"""Activations that code writes out, as ``0.5 * x * (1 + torch.tanh(...))``: one pass and one rounding instead of five.

Which way round factors and summands stand doesn't matter, nor whether they are operators, functions or methods.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from ....autograd import stock as F
from ....autograd.activation import apply_kernel, taken
from ....autograd.dispatch import autocast_dtype
from ..activations import ACTIVATIONS
from ..members import apart, call_refusal, class_of, computed, know, layer_refusal
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
#: Layers that are part of formulas.
_LAYERS: dict[type[nn.Module], str] = {nn.ReLU: "relu", nn.Sigmoid: "sigmoid", nn.Softplus: "softplus", nn.Tanh: "tanh"}
know(_LAYERS)
#: What autocast computes in float32, so that results may be of another dtype.
_IN_FLOAT32 = ("^", "softplus")
#: More calls than any formula has.
_LONGEST = 12


class _OtherwiseError(Exception):
    """The expression is none that a formula may be made of."""


#: What a call does by its name, or None.
_Naming = Callable[[fx.Node], str | None]


def _function_name(node: fx.Node) -> str | None:
    return _NAMES.get(node.target) if node.op in ("call_function", "call_method") else None


def _naming(search: Finder) -> _Naming:
    """With the names of layers that compute as the functions do."""

    def name_of(node: fx.Node) -> str | None:
        layer = search.layer(node, *_LAYERS) if node.op == "call_module" else None
        return _function_name(node) if layer is None else None if _other_options(layer) else _LAYERS[class_of(layer)]

    return name_of


def _other_options(layer: Any) -> bool:
    """Whether a layer does more than its function without options."""
    return getattr(layer, "inplace", False) or (getattr(layer, "beta", 1), getattr(layer, "threshold", 20)) != (1, 20)


def _shape(value: Any, x: fx.Node | None, inside: list[fx.Node], name_of: _Naming, root: bool = False) -> Any:
    """An expression of one value in a form of its own; the calls that it is made of go to ``inside``.

    A value that is used more than once is no part of the expression, but what it is of: x.
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(f"{value:.6g}")
    if not isinstance(value, fx.Node):
        raise _OtherwiseError
    name = name_of(value)
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
    parts = [_shape(part, x, inside, name_of) for part in value.args]
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
    return _shape(output.args[0], x, [], _function_name, root=True)


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
    name_of = _naming(search)
    if name_of(node) is None:
        return None
    root = node
    for _step in range(_LONGEST):
        if len(root.users) != 1:
            return None
        root = next(iter(root.users))
        found = _formula(root, name_of)
        if found is not None:
            name, x, inside = found
            nodes = [one for one in root.graph.nodes if one in inside and one is not root]
            if nodes[0] is not node or search.extend(nodes, lambda n, last=root: True if n is last else None) is None:  # type: ignore[misc]
                return None
            layers = {one: f"layer_{place}" for place, one in enumerate(nodes) if one.op == "call_module"}
            widened = any(name_of(one) in _IN_FLOAT32 for one in nodes)
            members = {name: search.callee(one) for one, name in layers.items()}
            classes = tuple(map(class_of, members.values()))
            return Match(nodes, _computing(name, _apart(nodes, x, layers), widened, classes), (x,), members)
    return None


PATTERN = Pattern(ACTIVATIONS, (), _match, anywhere=True)


def _formula(root: fx.Node, name_of: _Naming) -> tuple[str, fx.Node, set[fx.Node]] | None:
    """The activation that a call completes, of which value, and its calls."""
    if name_of(root) is None:
        return None
    inside: list[fx.Node] = []
    try:
        name = _FORMULAS.get(_shape(root, None, inside, name_of, root=True))
    except _OtherwiseError:
        return None
    operands = {part for one in inside for part in one.all_input_nodes} - set(inside)
    return (name, operands.pop(), set(inside)) if name is not None and len(operands) == 1 else None


def _apart(nodes: list[fx.Node], x: fx.Node, layers: dict[fx.Node, str]) -> Callable[..., Tensor]:
    """The calls as the code makes them, of x and the layers by their names."""
    graph = fx.Graph()
    copies = {x: graph.placeholder("x")}
    given = {node: graph.placeholder(name) for node, name in layers.items()}
    for node in nodes:
        if node in given:
            copies[node] = graph.call_function(_call, (given[node], copies[node.args[0]]))  # type: ignore[index]
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(copies[nodes[-1]])
    apart: Callable[..., Tensor] = fx.GraphModule(nn.Module(), graph).forward
    return apart


def _call(layer: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = layer(x)
    return y


def _computing(
    name: str, one_by_one: Callable[..., Tensor], widened: bool, classes: tuple[type[nn.Module], ...]
) -> Callable[..., Tensor]:
    """What is called in place of a formula.  Its constants may be rounded to float32: float64 is the code's own.

    ``classes`` are those that its layers were of.
    """

    def formula(x: Tensor, **layers: nn.Module) -> Tensor:
        activation = None
        if not apart(_refusal(x, widened, zip(layers.values(), classes, strict=True)), *layers.values()):
            activation = taken(name, x)
        if activation is None:
            return one_by_one(x, **layers)
        return computed(lambda: apply_kernel(x, activation, False), *layers.values())

    return formula


def _refusal(x: Tensor, widened: bool, layers: Iterable[tuple[nn.Module, type[nn.Module]]]) -> str | None:
    """Why the calls are made one by one, or None."""
    if not isinstance(x, Tensor) or x.dtype is torch.float64:
        return "computed as the code has it in float64"
    if (refusal := call_refusal(x)) is not None:
        return refusal
    if widened and autocast_dtype(x) is not None:
        return "autocast computes a part of the formula in float32"
    for layer, cls in layers:
        if (refusal := layer_refusal(layer, cls)) is not None:
            return refusal
        if _other_options(layer):
            return "a layer of the formula has got options"
    return None
