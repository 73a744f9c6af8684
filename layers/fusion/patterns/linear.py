"""dropout(activation(linear(x))), of which the dropout may be missing."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn

from ....autograd import stock as F
from ....autograd.bias_activation_dropout import linear_activation_dropout
from ... import dropout as _dropout  # noqa: F401 (for its twins)
from ..members import (
    ACTIVATIONS,
    Activation,
    activated,
    activation_of,
    activation_refusal,
    apart,
    call_refusal,
    computed,
    layer_refusal,
)
from .gate import is_gate
from .pattern import Finder, Match, Pattern

__all__ = ["PATTERN"]

#: A layer, or the arguments of a function: the probability, and whether to drop at all.
Dropping = nn.Module | tuple[float, bool] | None


def _match(search: Finder, node: fx.Node, linear: nn.Linear) -> Match | None:
    nodes = [node]
    activation: Any = search.extend(nodes, search.activation)
    if activation is None or is_gate(nodes[-1], activation):
        return None
    drop = search.extend(nodes, lambda n: _dropping(search, n))
    return Match(nodes, _compute, (node.args[0],), {"linear": linear, "activation": activation, "drop": drop})


def _dropping(search: Finder, node: fx.Node) -> Dropping:
    layer = search.layer(node, nn.Dropout)
    if layer is not None or node.target is not F.dropout:
        return layer
    p, training = node.kwargs["p"], node.kwargs["training"]
    return (p, training) if isinstance(p, float | int) and isinstance(training, bool) else None


PATTERN = Pattern((nn.Linear,), (*ACTIVATIONS, nn.Dropout), _match)


def _compute(input: Tensor, *, linear: nn.Linear, activation: Activation, drop: Dropping) -> Tensor:
    if apart(_refusal(input, linear, activation, drop), linear, activation, drop):
        y = activated(linear(input), activation)
        if isinstance(drop, tuple):
            return F.dropout(y, *drop)
        dropped: Tensor = y if drop is None else drop(y)
        return dropped
    name, parameters = activation_of(activation)
    assert name is not None
    p, training = (0.0, False)
    if drop is not None:
        p, training = drop if isinstance(drop, tuple) else (drop.p, drop.training)  # type: ignore[assignment]

    def together() -> Tensor:
        return linear_activation_dropout(input, linear.weight, linear.bias, p, name, parameters, training)

    return computed(together, linear, activation, drop)


def _refusal(input: Tensor, linear: nn.Linear, activation: Activation, drop: Dropping) -> str | None:
    """Why the layers are called one by one, or None."""
    refusal = call_refusal(input) or layer_refusal(linear, nn.Linear) or activation_refusal(activation)
    refusal = refusal or layer_refusal(drop, nn.Dropout)
    if refusal is None and linear.bias is not None and linear.bias.dtype is not linear.weight.dtype:
        refusal = "bias and weight differ in dtype"
    return refusal
