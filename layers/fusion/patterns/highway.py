"""t * h + (1 - t) * x, where t is an activation of a gate: a highway network's layer, a gated unit's state.

Written out, or as ``torch.lerp(x, h, t)``.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx, nn

from ....autograd.gated import HIGHWAY_GATES, highway
from ..activations import ACTIVATIONS, Activation, activated, activation_of, first_refusal
from ..members import apart, computed
from .pattern import Finder, Match, Pattern

__all__ = ["PATTERN", "is_highway", "is_of_highway"]

_ADD = (operator.add, torch.add, "add")
_SUBTRACT = (operator.sub, torch.sub, "sub")
_REVERSED = (torch.rsub, "rsub")
_MULTIPLY = (operator.mul, torch.mul, "mul")
_LERP = (torch.lerp, "lerp")


def _match(search: Finder, node: fx.Node, _: nn.Module | None) -> Match | None:
    found = _behind(node)
    activation = None if found is None else search.activation(node)
    if found is None or activation is None or activation_of(activation)[0] not in HIGHWAY_GATES:
        return None
    calls, transformed, carried = found
    nodes = [one for one in node.graph.nodes if one in calls]
    last = nodes.pop()
    if search.extend(nodes, lambda n: n is last or None) is None:
        return None
    members = {"activation": activation, "lerp": last.target in _LERP}
    return Match(nodes, _compute, (node.args[0], transformed, carried), members)


PATTERN = Pattern(ACTIVATIONS, (), _match, anywhere=True)


def is_highway(node: fx.Node, activation: Activation) -> bool:
    """Whether an activation's value is how far a highway transforms what it is given."""
    return activation_of(activation)[0] in HIGHWAY_GATES and _behind(node) is not None


def is_of_highway(product: fx.Node) -> bool:
    """Whether a product is t * h."""
    return any(found is not None and product in found[0] for found in map(_behind, product.all_input_nodes))


def _behind(t: fx.Node) -> tuple[tuple[fx.Node, ...], fx.Node, fx.Node] | None:
    """Of t * h + (1 - t) * x the calls, t first, then t * h, 1 - t, (1 - t) * x and the sum, or lerp; h; and x."""
    for rest in t.users:
        if len(t.users) == 1 and rest.target in _LERP and not rest.kwargs and len(rest.args) == 3:
            carried, transformed, weight = rest.args
            if weight is t and isinstance(carried, fx.Node) and isinstance(transformed, fx.Node):
                return (t, rest), transformed, carried
        if len(t.users) != 2 or not _is_rest(rest, t):
            continue
        (product,) = set(t.users) - {rest}
        transformed = _times(product, t)
        other = next(iter(rest.users)) if len(rest.users) == 1 else rest
        carried = _times(other, rest)
        if transformed is None or carried is None or len(product.users) != 1 or len(other.users) != 1:
            return None
        (total,) = product.users
        if total in other.users and total.target in _ADD and len(total.args) == 2 and not total.kwargs:
            return (t, product, rest, other, total), transformed, carried
    return None


def _is_rest(node: fx.Node, t: fx.Node) -> bool:
    """Whether a call is 1 - t."""
    if node.kwargs or len(node.args) != 2:
        return False
    left, right = node.args if node.target not in _REVERSED else node.args[::-1]
    return node.target in (*_SUBTRACT, *_REVERSED) and right is t and isinstance(left, int | float) and left == 1


def _times(node: fx.Node, value: fx.Node) -> fx.Node | None:
    """What a call multiplies ``value`` by."""
    if node.target not in _MULTIPLY or len(node.args) != 2 or node.kwargs or value not in node.args:
        return None
    left, right = node.args
    other = right if left is value else left
    return other if isinstance(other, fx.Node) and left is not right else None


def _compute(gate: Tensor, transformed: Tensor, carried: Tensor, *, activation: Activation, lerp: bool) -> Tensor:
    if apart(_refusal(gate, transformed, carried, activation), activation):
        t = activated(gate, activation)
        return torch.lerp(carried, transformed, t) if lerp else t * transformed + (1 - t) * carried
    name, _ = activation_of(activation)
    assert name is not None
    return computed(lambda: highway(gate, transformed, carried, name), activation)


def _refusal(gate: Tensor, transformed: Tensor, carried: Tensor, activation: Activation) -> str | None:
    """Why the calls are made one by one, or None."""
    refusal = first_refusal(gate, activation)
    if refusal is not None:
        return refusal
    if activation_of(activation)[0] not in HIGHWAY_GATES:
        return "no kernel has highways with the activation"
    for other in (transformed, carried):
        if not isinstance(other, Tensor) or other.dtype is not gate.dtype or other.shape != gate.shape:
            return "what is carried or transformed is unlike the gate"
    return None
