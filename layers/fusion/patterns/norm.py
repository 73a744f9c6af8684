"""activation(norm(x) + residual), of which all but the norm may be missing."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn

from ... import batch_norm, sync_batch_norm
from ..members import (
    ACTIVATIONS,
    Activation,
    activated,
    activation_of,
    activation_refusal,
    call_refusal,
    computed,
    layer_refusal,
)
from .pattern import Finder, Match, Pattern, added, are_alike, distinct

__all__ = ["PATTERN"]

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def _match(search: Finder, node: fx.Node, norm: nn.Module) -> Match:
    nodes = [node]
    residual, in_place = search.sum(nodes)
    activation = search.extend(nodes, search.activation)
    members = {"norm": norm, "activation": activation, "in_place": in_place}
    return Match(nodes, _compute, (node.args[0], residual), members)


PATTERN = Pattern(NORMS, tuple(ACTIVATIONS), _match)


def _compute(input: Tensor, residual: Tensor | None, *, norm: Any, activation: Activation, in_place: bool) -> Tensor:
    """``in_place``: the code adds the residual in place."""
    if _refusal(input, residual, norm, activation) is not None:
        return activated(added(norm(input), residual, in_place), activation)
    forward = sync_batch_norm.forward if isinstance(norm, nn.SyncBatchNorm) else batch_norm.forward
    name, parameters = activation_of(activation)
    return computed(lambda: forward(norm, input, distinct(residual, input), name, parameters), norm, activation)


def _refusal(input: Tensor, residual: Tensor | None, norm: Any, activation: Activation) -> str | None:
    """Why the layers are called one by one, or None."""
    refusal = call_refusal(input) or layer_refusal(norm, *NORMS) or activation_refusal(activation)
    if refusal is None and residual is not None and not are_alike(residual, input.shape, input.dtype):
        refusal = "the residual is unlike the input"
    return refusal
