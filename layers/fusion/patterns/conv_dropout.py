"""dropout(activation(conv(x))): the bias, PReLU or an activation of the table, and dropout in one pass.

Without dropout and PReLU it is what `conv` computes, which keeps less.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn

from ....autograd.bias_activation_dropout import conv_activation_dropout
from ... import prelu as _prelu  # noqa: F401 (for its twin)
from ...conv import product_of
from ..activations import ACTIVATIONS, SLOPED, Activation, activated, activation_of, activation_refusal, slopes_of
from ..members import apart, call_refusal, computed, layer_refusal
from .dropping import CHANNELS, Dropping, dropped, dropping, drops_channels, options_of
from .pattern import Finder, Match, Pattern
from .pooling import ends_before_pooling

__all__ = ["PATTERN"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def _match(search: Finder, node: fx.Node, conv: Any) -> Match | None:
    nodes = [node]
    activation: Any = search.extend(nodes, lambda n: search.activation(n, *SLOPED))
    if activation is None:
        return None
    directions = len(conv.kernel_size)
    drop = search.extend(nodes, lambda n: dropping(search, n, CHANNELS[directions]))
    if drop is None and slopes_of(activation) is None:
        return None
    if drop is None:
        ends_before_pooling(search, nodes, activation)
        search.ends_before(nodes, "the norm's passes would have to sum the gradient of PReLU's slopes", *_NORMS)
    members = {"conv": conv, "activation": activation, "drop": drop, "directions": directions}
    return Match(nodes, _compute, (node.args[0],), members)


PATTERN = Pattern(_CONVOLUTIONS, (*ACTIVATIONS, *SLOPED, nn.Dropout, *CHANNELS.values()), _match)


def _compute(input: Tensor, *, conv: Any, activation: Activation, drop: Dropping, directions: int) -> Tensor:
    if apart(_refusal(input, conv, activation, drop, directions), conv, activation, drop):
        return dropped(activated(conv(input), activation), drop)
    name, parameters = activation_of(activation)
    p, training = options_of(drop)

    def together() -> Tensor:
        options: dict[str, Any] = {"slopes": slopes_of(activation), "of_channels": drops_channels(drop) and training}
        arguments = (p, name, parameters, training, -1 - directions)
        return conv_activation_dropout(product_of(conv, input), conv.bias, *arguments, **options)

    return computed(together, conv, activation, drop)


def _refusal(input: Tensor, conv: Any, activation: Activation, drop: Dropping, directions: int) -> str | None:
    """Why the layers are called one by one, or None."""
    refusal = (
        call_refusal(input)
        or layer_refusal(conv, *_CONVOLUTIONS)
        or activation_refusal(activation, *SLOPED)
        or layer_refusal(drop, nn.Dropout, CHANNELS[directions])
    )
    if refusal is None and input.dim() != directions + 2:
        refusal = "not a batch"
    if refusal is None and conv.bias is not None and conv.bias.dtype is not conv.weight.dtype:
        refusal = "bias and weight differ in dtype"
    return refusal
