"""activation(norm(x) + residual), of which all but the norm may be missing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, fx, nn

from ... import batch_norm, sync_batch_norm
from ..members import (
    ACTIVATIONS,
    Activation,
    activated,
    activation_of,
    activation_refusal,
    apart,
    call_refusal,
    computed,
    is_steady,
    layer_refusal,
)
from .pattern import Finder, Match, Pattern, added, are_alike, distinct, finished

__all__ = ["PATTERN"]

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def _match(search: Finder, node: fx.Node, norm: nn.Module) -> Match:
    nodes = [node]
    begun = len(nodes)
    residual, in_place = search.sum(nodes)
    activation = search.extend(nodes, search.activation)
    members = {"norm": norm, "activation": activation, "in_place": in_place}
    return Match(nodes, _compute, (node.args[0], residual), members, _begin, begun)


PATTERN = Pattern(NORMS, tuple(ACTIVATIONS), _match)


def _compute(input: Tensor, residual: Tensor | None, *, norm: Any, activation: Activation, in_place: bool) -> Tensor:
    """``in_place``: the code adds the residual in place."""
    if apart(_refusal(input, residual, norm, activation), norm, activation):
        return activated(added(norm(input), residual, in_place), activation)
    forward = sync_batch_norm.forward if isinstance(norm, nn.SyncBatchNorm) else batch_norm.forward
    name, parameters = activation_of(activation)
    return computed(lambda: forward(norm, input, distinct(residual, input), name, parameters), norm, activation)


def _begin(
    input: Tensor, *, norm: Any, activation: Activation, in_place: bool, between: tuple[nn.Module, ...]
) -> Callable[[Tensor], Tensor]:
    """`_compute` up to where it needs the residual: what the norm changes comes before what layers ``between`` do."""
    if all(is_steady(layer, ever=False) for layer in between):
        return partial(_compute, input, norm=norm, activation=activation, in_place=in_place)
    plain = _refusal(input, None, norm, None) is None and not isinstance(norm, nn.SyncBatchNorm)
    if not plain or not batch_norm.uses_batch_statistics(norm):
        y = norm(input)
        return lambda residual: activated(added(y, residual, in_place), activation)
    finish = computed(lambda: batch_norm.begin(norm, input), norm)

    def rest(residual: Tensor) -> Tensor:
        alike = are_alike(residual, input.shape, input.dtype)
        return finished(finish, residual, norm, activation, in_place, alike)

    return rest


def _refusal(input: Tensor, residual: Tensor | None, norm: Any, activation: Activation) -> str | None:
    """Why the layers are called one by one, or None."""
    refusal = call_refusal(input) or layer_refusal(norm, *NORMS) or activation_refusal(activation)
    if refusal is None and residual is not None and not are_alike(residual, input.shape, input.dtype):
        refusal = "the residual is unlike the input"
    return refusal
