"""dropout(activation(norm(product(x)))), with a convolution's or a linear layer's product, or none.

The activation is PReLU, or dropout follows; without either it is what `norm` and `conv` compute.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn

from ... import batch_norm
from ... import prelu as _prelu  # noqa: F401 (for its twin)
from ..members import (
    ACTIVATIONS,
    SLOPED,
    Activation,
    activated,
    activation_of,
    activation_refusal,
    apart,
    call_refusal,
    computed,
    is_one_of,
    layer_refusal,
    slopes_of,
)
from .dropping import Dropping, dropped, dropping, options_of
from .pattern import Finder, Match, Pattern

__all__ = ["PATTERN"]

_PRODUCTS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    nn.Linear,
)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def _match(search: Finder, node: fx.Node, first: nn.Module) -> Match | None:
    nodes = [node]
    product, norm = (first, None) if is_one_of(first, _PRODUCTS) else (None, first)
    if norm is None:
        norm = search.extend(nodes, lambda n: search.layer(n, *_NORMS))
    activation: Any = None if norm is None else search.extend(nodes, lambda n: search.activation(n, *SLOPED))
    drop = None if norm is None else search.extend(nodes, lambda n: dropping(search, n))
    if drop is None and slopes_of(activation) is None:
        return None
    members = {"product": product, "norm": norm, "activation": activation, "drop": drop}
    return Match(nodes, _compute, (node.args[0],), members)


PATTERN = Pattern((*_PRODUCTS, *_NORMS), (*_NORMS, *ACTIVATIONS, *SLOPED, nn.Dropout), _match)


def _compute(input: Tensor, *, product: nn.Module | None, norm: Any, activation: Activation, drop: Dropping) -> Tensor:
    layers = (product, norm, activation, drop)
    if apart(_refusal(input, *layers), *layers):
        return dropped(activated(norm(input if product is None else product(input)), activation), drop)
    name, parameters = activation_of(activation)
    p, training = options_of(drop)
    options: dict[str, Any] = {"activation": name, "activation_parameters": parameters}
    options |= {"slopes": slopes_of(activation), "p": p if training else 0.0}

    def together() -> Tensor:
        return batch_norm.forward_chain(norm, input if product is None else product(input), **options)

    return computed(together, *layers)


def _refusal(input: Tensor, product: nn.Module | None, norm: Any, activation: Activation, drop: Dropping) -> str | None:
    """Why the layers are called one by one, or None."""
    return (
        call_refusal(input)
        or layer_refusal(product, *_PRODUCTS)
        or layer_refusal(norm, *_NORMS)
        or activation_refusal(activation, *SLOPED)
        or layer_refusal(drop, nn.Dropout)
        or ("p is not a probability" if not 0 <= options_of(drop)[0] <= 1 else None)
    )
