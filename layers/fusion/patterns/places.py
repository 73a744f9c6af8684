"""The maximum or the mean over all places of activation(norm(conv(x))), of which convolution or norm may be missing.

By an adaptive pooling to one place, or by ``max`` or ``mean`` over the dimensions of places; without a norm there is an
activation.  The activated tensor is never written.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn

from ....autograd.batch_norm_pool import activation_pool
from ... import batch_norm
from ... import prelu as _prelu  # noqa: F401 (for its twin)
from ...conv import product_of
from ..activations import ACTIVATIONS, SLOPED, Activation, activated, activation_of, activation_refusal, slopes_of
from ..calls import Reduction, is_values, reduction
from ..members import apart, call_refusal, computed, is_one_of, layer_refusal
from .pattern import Finder, Match, Pattern
from .pooling import is_one

__all__ = ["PATTERN", "POOLINGS"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
#: By the number of directions.
_MEANS = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}
_MAXIMA = {1: nn.AdaptiveMaxPool1d, 2: nn.AdaptiveMaxPool2d, 3: nn.AdaptiveMaxPool3d}
POOLINGS: tuple[type[nn.Module], ...] = (*_MEANS.values(), *_MAXIMA.values())


def _match(search: Finder, node: fx.Node, first: nn.Module) -> Match | None:
    nodes = [node]
    conv, norm = (first, None) if is_one_of(first, _CONVOLUTIONS) else (None, first)
    if norm is None:
        norm = search.extend(nodes, lambda n: search.layer(n, *_NORMS))
    activation: Any = search.extend(nodes, lambda n: search.activation(n, *SLOPED))
    if norm is None and activation is None:
        return None
    pool: Any = search.extend(nodes, lambda n: search.layer(n, *POOLINGS) or reduction(n))
    if pool is None or (_reduction(pool).picks and search.extend(nodes, is_values) is None):
        return None
    members = {"conv": conv, "norm": norm, "activation": activation, "pool": pool}
    return Match(nodes, _compute, (node.args[0],), members)


PATTERN = Pattern((*_CONVOLUTIONS, *_NORMS), (*_NORMS, *ACTIVATIONS, *SLOPED, *POOLINGS), _match)


def _reduction(pool: nn.Module | Reduction) -> Reduction:
    """What a layer reduces over, as a function's."""
    if isinstance(pool, Reduction):
        return pool
    (directions,) = (n for poolings in (_MEANS, _MAXIMA) for n, cls in poolings.items() if is_one_of(pool, (cls,)))
    size: Any = pool.output_size
    ones = is_one(size) and (isinstance(size, int) or len(size) == directions)
    ones = ones and not getattr(pool, "return_indices", False)
    return Reduction(is_one_of(pool, _MAXIMA.values()), tuple(range(-directions, 0)) if ones else (), True)


def _compute(input: Tensor, *, conv: Any, norm: Any, activation: Activation, pool: nn.Module | Reduction) -> Tensor:
    layers = (conv, norm, activation, pool)
    if apart(_refusal(input, *layers), *layers):
        y = input if conv is None else conv(input)
        y = activated(y if norm is None else norm(y), activation)
        result: Tensor = pool(y) if isinstance(pool, nn.Module) else pool.of(y)
        return result
    name, parameters = activation_of(activation)
    maximum, _, keeps, _ = _reduction(pool)
    options: dict[str, Any] = {"slopes": slopes_of(activation), "maximum": maximum}

    def together() -> Tensor:
        if norm is None:
            y = activation_pool(product_of(conv, input), conv.bias, name, parameters, **options)
        else:
            chain = {"activation": name, "activation_parameters": parameters, **options}
            y = batch_norm.forward_pool(norm, input if conv is None else conv(input), **chain)
        return y.view(*y.shape, *[1] * (input.dim() - 2)) if keeps else y

    return computed(together, *layers)


def _refusal(input: Tensor, conv: Any, norm: Any, activation: Activation, pool: nn.Module | Reduction) -> str | None:
    """Why the layers are called one by one, or None."""
    refusal = (
        call_refusal(input)
        or layer_refusal(conv, *_CONVOLUTIONS)
        or layer_refusal(norm, *_NORMS)
        or activation_refusal(activation, *SLOPED)
        or layer_refusal(pool, *POOLINGS)
    )
    if refusal is None and (input.dim() < 3 or (conv is not None and input.dim() != conv.weight.dim())):
        refusal = "not a batch of channels with places"
    if refusal is None and not _reduction(pool).covers(input.dim()):
        refusal = "more is left than one place, or channels are reduced, too"
    if refusal is None and norm is None and conv.bias is not None and conv.bias.dtype is not conv.weight.dtype:
        refusal = "bias and weight differ in dtype"
    return refusal
