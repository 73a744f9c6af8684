"""max_pool(activation(norm(conv(x)) + residual)), of which all but the convolution may be missing.

In one, two or three directions; the convolution may be a transposed one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd

from ....autograd.conv import conv_act_pool
from ....autograd.convolution import convolution_of
from ....autograd.decisions import decided_once
from ....autograd.dispatch import autocast_dtype
from ... import conv_batch_norm
from ...batch_norm import uses_batch_statistics
from ...conv import arguments
from ..activations import ACTIVATIONS, SLOPED, Activation, activated, activation_of, activation_refusal
from ..members import apart, call_refusal, computed, layer_refusal
from ..norms import IMAGE_NORMS, activation_within, state_of, within_refusal
from ..steady import is_steady
from ..unchanged import while_unchanged
from . import places
from .gate import is_gate
from .pattern import Finder, Match, Pattern, added, are_alike, behind, distinct, finished, passed_on
from .pooling import POOLINGS, Pooling, pooled, pooling, window_of

__all__ = ["PATTERN", "is_like_result"]

#: By the number of directions, the classes of what can be in a chain.
CONVOLUTIONS = {
    1: (nn.Conv1d, nn.ConvTranspose1d),
    2: (nn.Conv2d, nn.ConvTranspose2d),
    3: (nn.Conv3d, nn.ConvTranspose3d),
}
NORMS: dict[int, Collection[type[nn.Module]]] = {1: (nn.BatchNorm1d,), 2: IMAGE_NORMS, 3: (nn.BatchNorm3d,)}

#: Activations that never decrease, and whose gradient vanishes where they are constant: pooling may come first.
_EXCHANGEABLE = ("hardtanh", "relu", "relu6")


def _match(search: Finder, node: fx.Node, conv: _ConvNd) -> Match:
    nodes = [node]
    directions = len(conv.kernel_size)
    norm = search.extend(nodes, lambda n: search.layer(n, *NORMS[directions]))
    begun = len(nodes)
    identity, residual, in_place, activation = behind(search, nodes, norm)
    if norm is None and residual is None and activation is not None and is_gate(nodes[-1], activation):
        nodes, activation = nodes[:1], None  # with the product that it is part of it spares more
    begun += identity is not None
    pool = search.extend(nodes, partial(pooling, search, directions))
    pools_first = activation is None and activation_within(norm) is None and pool is not None
    if pools_first:
        activation = search.extend(nodes, lambda n: _exchangeable(search, n))
    if residual is not None and pool is None:
        if activation is None and norm is None:
            search.ends_before(nodes, "the pass behind a product would have to add a residual before PReLU", *SLOPED)
        search.ends_before(nodes, "the reduction over all places would have to read a residual", *places.POOLINGS)
    members = {"conv": conv, "norm": norm, "identity": identity, "activation": activation, "pool": pool}
    members |= {"directions": directions, "in_place": in_place, "pools_first": pools_first}
    return Match(nodes, _compute, (node.args[0], residual), members, _begin, begun)


def _exchangeable(search: Finder, node: fx.Node) -> Activation:
    activation = search.activation(node)
    return activation if activation is not None and activation_of(activation)[0] in _EXCHANGEABLE else None


PATTERN = Pattern(
    tuple(cls for classes in CONVOLUTIONS.values() for cls in classes),
    (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, *ACTIVATIONS, *POOLINGS.values()),
    _match,
)


def _compute(
    input: Tensor,
    residual: Tensor | None,
    *,
    conv: _ConvNd,
    norm: nn.Module | None,
    identity: nn.Module | None,
    activation: Activation,
    pool: Pooling,
    directions: int,
    in_place: bool,
    pools_first: bool,
) -> Tensor:
    """``in_place``: the code adds the residual in place.  ``pools_first``: it pools before it activates."""
    refusal = _refusal(input, residual, (conv, norm, identity, activation, pool, directions))
    if not apart(refusal, conv, norm, activation, pool):
        activation = activation_within(norm) or activation
        return computed(lambda: _together(input, residual, conv, norm, activation, pool), conv, norm, activation, pool)
    y = conv(input)
    y = y if norm is None else passed_on(norm(y), identity)
    return _rest(added(y, residual, in_place), activation, pool, directions, pools_first)


def _rest(y: Tensor, activation: Activation, pool: Pooling, directions: int, pools_first: bool) -> Tensor:
    if pools_first:
        return activated(pooled(y, directions, pool), activation)
    return pooled(activated(y, activation), directions, pool)


def _begin(
    input: Tensor,
    *,
    conv: _ConvNd,
    norm: nn.Module | None,
    identity: nn.Module | None,
    activation: Activation,
    in_place: bool,
    between: tuple[nn.Module, ...],
    **pooling: Any,
) -> Callable[[Tensor], Tensor]:
    """`_compute` up to where it needs the residual: what its layers change comes before what layers ``between`` do.

    ``pooling``: the members that have to do with it, as of `_rest`.
    """
    if all(is_steady(layer, ever=False) for layer in between):
        members: Any = {"conv": conv, "norm": norm, "identity": identity, "activation": activation, **pooling}
        return partial(_compute, input, in_place=in_place, **members)
    pool, directions = pooling["pool"], pooling["directions"]
    plain = _refusal(input, None, (conv, norm, identity, None, None, directions), ends=False) is None
    if norm is None or not plain or not uses_batch_statistics(state_of(norm)):
        y = conv(input)
        y = y if norm is None else passed_on(norm(y), identity)
        return lambda residual: _rest(added(y, residual, in_place), activation, **pooling)
    finish = computed(lambda: conv_batch_norm.begin(conv, state_of(norm), input), conv, norm)

    def rest(residual: Tensor) -> Tensor:
        fits = is_like_result(residual, conv, input)
        return pooled(finished(finish, residual, norm, activation, in_place, fits), directions, pool)

    return rest


def _together(
    input: Tensor,
    residual: Tensor | None,
    conv: _ConvNd,
    norm: nn.Module | None,
    activation: Activation,
    pool: Pooling,
) -> Tensor:
    named = activation_of(activation)
    window = window_of(pool) or (None, None, 0)
    sizes: Any = dict(zip(("pool_size", "pool_stride", "pool_padding"), window, strict=True))
    residual = distinct(residual, input)
    if norm is not None:
        return conv_batch_norm.forward(conv, state_of(norm), input, residual, named, **sizes)
    options: dict[str, Any] = {"activation": named[0], "activation_parameters": named[1], **sizes}
    return conv_act_pool(*arguments(conv, input), residual=residual, **options)


def _refusal(input: Tensor, residual: Tensor | None, members: tuple[Any, ...], ends: bool = True) -> str | None:
    """Why the layers are called one by one, or None, with ``members`` as of `_layers_refusal`.

    ``ends``: but for pooling there is nothing behind these.
    """
    conv, norm, _, activation, _, _ = members
    ends = ends and residual is None and activation is None
    refusal = call_refusal(input) or _layers_refusal(*members)
    if refusal is None and norm is not None:
        refusal = within_refusal(norm, input, ends)
    return refusal or _unfit(input, residual, norm is None, *_geometry(conv, input))


@while_unchanged
def _layers_refusal(conv: Any, norm: Any, identity: Any, activation: Any, pool: Any, directions: int) -> str | None:
    """`_refusal` by what the layers are."""
    refusal = (
        layer_refusal(conv, *CONVOLUTIONS[directions])
        or layer_refusal(norm, *NORMS[directions])
        or layer_refusal(identity, nn.Identity)
        or activation_refusal(activation)
        or layer_refusal(pool, POOLINGS[directions])
    )
    if refusal is None and pool is not None and window_of(pool) is None:
        refusal = "the pooling has options that aren't fused"
    return refusal


@decided_once
def _unfit(input: Tensor, residual: Tensor | None, unbatched: bool, *geometry: Any) -> Callable[..., str | None]:
    """Why operands aren't those of a convolution of this `_geometry`, or None."""
    directions = len(geometry[0])
    if input.dim() != directions + 2 and (input.dim() != directions + 1 or not unbatched):
        return lambda *_: "not a batch of images"
    if residual is not None and not _fits(residual, input, *geometry):
        return lambda *_: "the residual is unlike the convolution's result"
    return lambda *_: None


def is_like_result(residual: Tensor, conv: _ConvNd, input: Tensor) -> bool:
    """Whether a residual has the shape and dtype of a convolution's result, so that their sum has too."""
    return _fits(residual, input, *_geometry(conv, input))


def _geometry(conv: _ConvNd, input: Tensor) -> tuple[Any, ...]:
    """What shape and dtype of a convolution's result depend on, besides those of its input: the filters as they are, of
    which people take some away, or make them larger.
    """
    dtype = None if input.dtype is torch.float64 else autocast_dtype(input)
    filters = conv.weight.shape
    extra, count = (conv.output_padding, filters[1] * conv.groups) if conv.transposed else (None, filters[0])
    return filters[2:], conv.stride, conv.padding, conv.dilation, extra, count, dtype


def _fits(
    residual: Tensor,
    input: Tensor,
    kernel_size: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    output_padding: Any,
    filters: int,
    dtype: torch.dtype | None,
) -> bool:
    """`is_like_result` by the convolution's `_geometry`."""
    directions = len(kernel_size)
    convolution = convolution_of(directions, stride, padding, dilation, 1, output_padding)
    if convolution is None:  # padding in words
        return False
    size = convolution.size(input.shape[-directions:], kernel_size)[-directions:]
    return are_alike(residual, (*input.shape[: -directions - 1], filters, *size), dtype or input.dtype)
