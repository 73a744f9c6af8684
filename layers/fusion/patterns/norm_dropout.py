"""dropout(activation(norm(product(x)) + residual)), with a convolution's or a linear layer's product, or none.

Also with an activation of the product before the norm, which isn't written.  Else the activation is PReLU, or dropout
follows; without either it is what `norm` and `conv` compute.  The residual is added before PReLU alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from ....autograd.dispatch import autocast_dtype
from ... import batch_norm
from ... import prelu as _prelu  # noqa: F401 (for its twin)
from ...conv import product_of
from ..activations import ACTIVATIONS, SLOPED, Activation, activated, activation_of, activation_refusal, slopes_of
from ..calls import summand
from ..members import apart, call_refusal, computed, is_one_of, layer_refusal
from .conv import is_like_result
from .dropping import CHANNELS, Dropping, dropped, dropping, drops_channels, options_of
from .pattern import Finder, Match, Pattern, added, are_alike, distinct
from .pooling import ends_before_pooling

__all__ = ["PATTERN"]

_PRODUCTS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    nn.Linear,
)
#: By the number of directions.
_NORMS: dict[int, type[nn.Module]] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def _match(search: Finder, node: fx.Node, first: nn.Module) -> Match | None:
    nodes = [node]
    product, norm = (first, None) if is_one_of(first, _PRODUCTS) else (None, first)
    before: Any = None if norm is not None else search.extend(nodes, search.activation)
    if norm is None:
        norm = search.extend(nodes, lambda n: search.layer(n, *_NORMS.values()))
    residual, in_place, activation = (None, False, None) if norm is None else _behind(search, nodes)
    drop = None if norm is None else search.extend(nodes, lambda n: dropping(search, n, *_channels_of(norm)))
    if norm is None or (before is None and drop is None and slopes_of(activation) is None):
        return None
    if drop is None:
        ends_before_pooling(search, nodes, activation)
    members = {"product": product, "before": before, "norm": norm, "activation": activation, "drop": drop}
    return Match(nodes, _compute, (node.args[0], residual), {**members, "in_place": in_place})


def _behind(search: Finder, nodes: list[fx.Node]) -> tuple[fx.Node | None, bool, Any]:
    """What comes behind the norm: a residual, if PReLU follows, whether it is added in place, and the activation."""
    length = len(nodes)
    residual, in_place = search.extend(nodes, lambda n: summand(n, nodes[-1])) or (None, False)
    activation: Any = search.extend(nodes, lambda n: search.activation(n, *SLOPED))
    if residual is None or slopes_of(activation) is not None:
        return residual, in_place, activation
    del nodes[length:]
    return None, False, None


def _channels_of(norm: nn.Module) -> tuple[type[nn.Module], ...]:
    """The dropout that drops whole channels of what a norm returns."""
    return tuple(CHANNELS[directions] for directions, cls in _NORMS.items() if is_one_of(norm, (cls,)))


PATTERN = Pattern(
    (*_PRODUCTS, *_NORMS.values()), (*_NORMS.values(), *ACTIVATIONS, *SLOPED, nn.Dropout, *CHANNELS.values()), _match
)


def _compute(
    input: Tensor,
    residual: Tensor | None,
    *,
    product: nn.Module | None,
    before: Activation,
    norm: Any,
    activation: Activation,
    drop: Dropping,
    in_place: bool,
) -> Tensor:
    """``in_place``: the code adds the residual in place."""
    layers = (product, before, norm, activation, drop)
    if apart(_refusal(input, residual, *layers), *layers):
        y = activated(input if product is None else product(input), before)
        return dropped(activated(added(norm(y), residual, in_place), activation), drop)
    name, parameters = activation_of(activation)
    p, training = options_of(drop)
    options: dict[str, Any] = {"activation": name, "activation_parameters": parameters}
    options |= {"slopes": slopes_of(activation), "p": p if training else 0.0, "of_channels": drops_channels(drop)}
    options["residual"] = distinct(residual, input)

    def together() -> Tensor:
        if before is not None and product is not None:
            return behind(product, before)
        return batch_norm.forward_chain(norm, input if product is None else product(input), **options)

    def behind(layer: Any, before: Activation) -> Tensor:
        first, constants = activation_of(before)
        product = product_of(layer, input)
        told = {"before": first, "before_parameters": constants, "product": product, "shift": layer.bias}
        return batch_norm.forward_chain(norm, product(None), **told, **options)

    return computed(together, *layers)


def _refusal(
    input: Tensor,
    residual: Tensor | None,
    product: Any,
    before: Activation,
    norm: Any,
    activation: Activation,
    drop: Dropping,
) -> str | None:
    """Why the layers are called one by one, or None."""
    refusal = (
        call_refusal(input)
        or layer_refusal(product, *_PRODUCTS)
        or activation_refusal(before)
        or layer_refusal(norm, *_NORMS.values())
        or activation_refusal(activation, *SLOPED)
        or layer_refusal(drop, nn.Dropout, *_channels_of(norm))
        or ("p is not a probability" if not 0 <= options_of(drop)[0] <= 1 else None)
    )
    if refusal is None and drops_channels(drop) and input.dim() < 3:
        refusal = "not a batch of channels"
    if refusal is None and before is not None:
        if input.dim() != product.weight.dim():
            refusal = "not a batch of channels"
        elif product.bias is not None and product.bias.dtype is not product.weight.dtype:
            refusal = "bias and weight differ in dtype"
    if refusal is None and residual is not None and not _is_like(residual, input, product):
        refusal = "the residual is unlike what is normalised"
    return refusal


def _is_like(residual: Tensor, input: Tensor, product: Any) -> bool:
    """Whether a residual has shape and dtype of what a product makes of the input."""
    if product is None:
        return are_alike(residual, input.shape, input.dtype)
    if not isinstance(product, nn.Linear):
        return is_like_result(residual, product, input)
    low = None if input.dtype is torch.float64 else autocast_dtype(input)
    return are_alike(residual, (*input.shape[:-1], product.weight.shape[0]), low or input.dtype)
