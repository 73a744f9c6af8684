"""max_pool(activation(x)), with no convolution before it that would take both."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, fx, nn

from ....autograd.pool import act_pool
from ..activations import ACTIVATIONS, Activation, activated, activation_of, first_refusal
from ..members import apart, computed, layer_refusal
from .pattern import Finder, Match, Pattern
from .pooling import POOLINGS, Pooling, pooled, pooling, window_of

__all__ = ["PATTERN"]


def _match(search: Finder, node: fx.Node, _: nn.Module | None) -> Match | None:
    activation = search.activation(node)
    if activation is None:
        return None
    for directions in POOLINGS:
        nodes = [node]
        pool: Any = search.extend(nodes, partial(pooling, search, directions))
        if pool is not None:
            members = {"directions": directions, "activation": activation, "pool": pool}
            return Match(nodes, _compute, (node.args[0],), members)
    return None


PATTERN = Pattern(ACTIVATIONS, tuple(POOLINGS.values()), _match, anywhere=True)


def _compute(input: Tensor, *, directions: int, activation: Activation, pool: Pooling) -> Tensor:
    if apart(_refusal(input, directions, activation, pool), activation, pool):
        return pooled(activated(input, activation), directions, pool)
    arguments = (*(window_of(pool) or ()), *activation_of(activation))
    return computed(lambda: act_pool(directions, input, *arguments), activation, pool)


def _refusal(input: Tensor, directions: int, activation: Activation, pool: Pooling) -> str | None:
    """Why the activation and the pooling are computed one by one, or None."""
    refusal = first_refusal(input, activation) or layer_refusal(pool, POOLINGS[directions])
    if refusal is None and window_of(pool) is None:
        refusal = "the pooling has options that aren't fused"
    return refusal
