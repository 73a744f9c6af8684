"""Max pooling at the end of a chain: its layers and functions, what they are told, and how they are called apart."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn

from ....autograd import stock as F
from ... import pool as _pool  # noqa: F401 (for its twins)
from ..activations import Activation, slopes_of
from ..calls import pooling_function
from ..members import is_one_of
from .pattern import Finder

__all__ = ["POOLINGS", "Pooling", "ends_before_pooling", "is_one", "pooled", "pooling", "window_of"]

#: A layer, or the arguments of a function: size, stride and padding.
Pooling = nn.Module | tuple[Any, Any, Any] | None

#: By the number of directions.
POOLINGS = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
_FUNCTIONS = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


def pooling(search: Finder, directions: int, node: fx.Node) -> Pooling:
    """The pooling that a call is, in so many directions."""
    layer = search.layer(node, POOLINGS[directions])
    if layer is None:
        return pooling_function(node, directions)
    if window_of(layer):
        return layer
    search.stops[layer] = "has options that aren't fused"
    return None


def ends_before_pooling(search: Finder, nodes: list[fx.Node], activation: Activation) -> None:
    """Say of a pooling behind PReLU why it isn't part of the pattern."""
    if slopes_of(activation) is not None:
        search.ends_before(nodes, "the kernels of max pooling would have to read PReLU's slopes", *POOLINGS.values())


def window_of(pool: Any) -> tuple[Any, Any, Any] | None:
    """Size, stride and padding of a pooling, or None where it is a layer with options that can't be fused."""
    if isinstance(pool, tuple):
        return pool
    if (
        not is_one_of(pool, POOLINGS.values())
        or pool.return_indices
        or pool.ceil_mode
        or pool.kernel_size is None
        or not is_one(pool.dilation)
    ):
        return None
    return pool.kernel_size, pool.stride, pool.padding


def is_one(size: Any) -> bool:
    """Whether an option is 1 in every direction."""
    return all(type(each) is int and each == 1 for each in (size if isinstance(size, (tuple, list)) else (size,)))


def pooled(y: Tensor, directions: int, pool: Pooling) -> Tensor:
    """max_pool(y) as the code calls it, apart."""
    if isinstance(pool, nn.Module):
        result: Tensor = pool(y)
        return result
    return y if pool is None else _FUNCTIONS[directions](y, *pool)
