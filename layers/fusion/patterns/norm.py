"""activation(norm(x) + residual), of which all but the norm may be missing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, fx, nn

from ... import batch_norm, sync_batch_norm
from ..activations import ACTIVATIONS, SLOPED, Activation, activated, activation_of, activation_refusal
from ..members import apart, call_refusal, computed, layer_refusal
from ..norms import NORMS, state_of, within_refusal
from ..steady import is_steady
from ..unchanged import while_unchanged
from . import places
from .pattern import Finder, Match, Pattern, added, are_alike, behind, distinct, finished, passed_on

__all__ = ["PATTERN"]


def _match(search: Finder, node: fx.Node, norm: nn.Module) -> Match:
    nodes = [node]
    identity, residual, in_place, activation = behind(search, nodes, norm)
    if activation is None and isinstance(norm, nn.SyncBatchNorm):
        search.ends_before(nodes, "sums over all ranks would have to hold those of PReLU's slopes", *SLOPED)
    if residual is not None:
        search.ends_before(nodes, "the reduction over all places would have to read a residual", *places.POOLINGS)
    begun = 1 if identity is None else 2
    members = {"norm": norm, "identity": identity, "activation": activation, "in_place": in_place}
    return Match(nodes, _compute, (node.args[0], residual), members, _begin, begun)


PATTERN = Pattern(NORMS, tuple(ACTIVATIONS), _match)


def _compute(
    input: Tensor,
    residual: Tensor | None,
    *,
    norm: Any,
    identity: nn.Module | None,
    activation: Activation,
    in_place: bool,
) -> Tensor:
    """``in_place``: the code adds the residual in place."""
    if apart(_refusal(input, residual, (norm, identity, activation)), norm, activation):
        return activated(added(passed_on(norm(input), identity), residual, in_place), activation)
    forward = sync_batch_norm.forward if isinstance(norm, nn.SyncBatchNorm) else batch_norm.forward
    named, state = activation_of(activation), state_of(norm)
    return computed(lambda: forward(state, input, distinct(residual, input), named), norm, activation)


def _begin(
    input: Tensor,
    *,
    norm: Any,
    identity: nn.Module | None,
    activation: Activation,
    in_place: bool,
    between: tuple[nn.Module, ...],
) -> Callable[[Tensor], Tensor]:
    """`_compute` up to where it needs the residual: what the norm changes comes before what layers ``between`` do."""
    if all(is_steady(layer, ever=False) for layer in between):
        members: Any = {"norm": norm, "identity": identity, "activation": activation}
        return partial(_compute, input, in_place=in_place, **members)
    plain = _refusal(input, None, (norm, identity, None)) is None and not isinstance(norm, nn.SyncBatchNorm)
    if not plain or not batch_norm.uses_batch_statistics(state_of(norm)):
        y = passed_on(norm(input), identity)
        return lambda residual: activated(added(y, residual, in_place), activation)
    finish = computed(lambda: batch_norm.begin(norm, input), norm)

    def rest(residual: Tensor) -> Tensor:
        alike = are_alike(residual, input.shape, input.dtype)
        return finished(finish, residual, norm, activation, in_place, alike)

    return rest


def _refusal(input: Tensor, residual: Tensor | None, members: tuple[Any, ...]) -> str | None:
    """Why the layers are called one by one, or None, with ``members`` as of `_layers_refusal`."""
    # A norm with an activation of its own was alone, and is none of these.
    refusal = call_refusal(input) or _layers_refusal(*members) or within_refusal(members[0], input, ends=False)
    if refusal is None and residual is not None and not are_alike(residual, input.shape, input.dtype):
        refusal = "the residual is unlike the input"
    return refusal


@while_unchanged
def _layers_refusal(norm: Any, identity: nn.Module | None, activation: Activation) -> str | None:
    """`_refusal` by what the layers are."""
    return layer_refusal(norm, *NORMS) or activation_refusal(activation) or layer_refusal(identity, nn.Identity)
