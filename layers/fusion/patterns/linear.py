"""dropout(activation(linear(x))), of which the dropout may be missing."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn

from ....autograd.bias_activation_dropout import linear_activation_dropout
from ... import prelu as _prelu  # noqa: F401 (for its twin)
from ..activations import ACTIVATIONS, SLOPED, Activation, activated, activation_of, activation_refusal, slopes_of
from ..members import apart, call_refusal, computed, layer_refusal
from ..unchanged import while_unchanged
from .dropping import Dropping, dropped, dropping, options_of
from .gate import is_gate
from .pattern import Finder, Match, Pattern

__all__ = ["PATTERN"]


def _match(search: Finder, node: fx.Node, linear: nn.Linear) -> Match | None:
    nodes = [node]
    activation: Any = search.extend(nodes, lambda n: search.activation(n, *SLOPED))
    if activation is None or is_gate(nodes[-1], activation):
        return None
    drop = search.extend(nodes, lambda n: dropping(search, n))
    return Match(nodes, _compute, (node.args[0],), {"linear": linear, "activation": activation, "drop": drop})


PATTERN = Pattern((nn.Linear,), (*ACTIVATIONS, *SLOPED, nn.Dropout), _match)


def _compute(input: Tensor, *, linear: nn.Linear, activation: Activation, drop: Dropping) -> Tensor:
    if apart(_refusal(input, linear, activation, drop), linear, activation, drop):
        return dropped(activated(linear(input), activation), drop)
    name, parameters = activation_of(activation)
    p, training = options_of(drop)

    def together() -> Tensor:
        options = (p, name, parameters, training)
        return linear_activation_dropout(input, linear.weight, linear.bias, *options, slopes=slopes_of(activation))

    return computed(together, linear, activation, drop)


def _refusal(input: Tensor, linear: nn.Linear, activation: Activation, drop: Dropping) -> str | None:
    """Why the layers are called one by one, or None."""
    refusal = call_refusal(input) or _layers_refusal(linear, activation, drop)
    if refusal is None and linear.bias is not None and linear.bias.dtype is not linear.weight.dtype:
        refusal = "bias and weight differ in dtype"
    slopes = slopes_of(activation)
    if refusal is None and slopes is not None and slopes.numel() > 1 and input.dim() != 2:
        refusal = "the slopes are no features'"
    return refusal


@while_unchanged
def _layers_refusal(linear: nn.Linear, activation: Activation, drop: Dropping) -> str | None:
    """`_refusal` by what the layers are."""
    return (
        layer_refusal(linear, nn.Linear) or activation_refusal(activation, *SLOPED) or layer_refusal(drop, nn.Dropout)
    )
