"""The maximum over pieces of linear(x): by max pooling, or by a view and ``max``."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from ....autograd.maxout import maxout_linear
from ... import pool as _pool  # noqa: F401 (for its twins)
from ..calls import is_values
from ..members import apart, call_refusal, computed, layer_refusal
from .pattern import Finder, Match, Pattern
from .pooling import is_one

__all__ = ["POOLING", "VIEW"]


# --- Max pooling ------------------------------------------------------------------------------------------------------


def _match_pooling(search: Finder, node: fx.Node, linear: nn.Linear) -> Match | None:
    nodes = [node]
    pool = search.extend(nodes, lambda n: _pooling(search, n, linear))
    return None if pool is None else Match(nodes, _compute_pooling, (node.args[0],), {"linear": linear, "pool": pool})


def _pooling(search: Finder, node: fx.Node, linear: nn.Linear) -> nn.Module | None:
    layer = search.layer(node, nn.MaxPool1d)
    return layer if layer is not None and _pieces_of(layer, linear) else None


POOLING = Pattern((nn.Linear,), (nn.MaxPool1d,), _match_pooling)


def _compute_pooling(input: Tensor, *, linear: nn.Linear, pool: nn.MaxPool1d) -> Tensor:
    refusal = call_refusal(input) or layer_refusal(linear, nn.Linear) or layer_refusal(pool, nn.MaxPool1d)
    pieces = _pieces_of(pool, linear) if refusal is None and input.dim() in (2, 3) else None
    if pieces is None:
        apart(refusal or "the windows are no pieces of the features", linear, pool)
        maxima: Tensor = pool(linear(input))
        return maxima
    return computed(lambda: _maxima(input, linear, (linear.weight.shape[0] // pieces, pieces), -1), linear, pool)


def _pieces_of(pool: Any, linear: nn.Linear) -> int | None:
    """How many features of a linear layer the windows of a pooling hold that share none, or None."""
    sizes = [value[0] if isinstance(value, tuple) else value for value in (pool.kernel_size, pool.stride)]
    options = (pool.padding in (0, (0,)), is_one(pool.dilation), not pool.ceil_mode, not pool.return_indices)
    fits = all(options) and sizes[0] == sizes[1] and linear.weight.shape[0] % sizes[0] == 0
    return sizes[0] if fits else None


# --- Views ------------------------------------------------------------------------------------------------------------


class _Split(NamedTuple):
    """Features split into two sizes, as the code has them, and how: the dimension that it unflattens, or ``view``'s
    first size, which is "rest" (-1) or "rows".  But for "rest" one of the two may be -1.
    """

    sizes: tuple[int, int]
    how: int | str


def _match_view(search: Finder, node: fx.Node, linear: nn.Linear) -> Match | None:
    nodes = [node]
    split = search.extend(nodes, lambda n: _split(n, node.args[0], linear.weight.shape[0]))
    dim = None if split is None else search.extend(nodes, lambda n: _maximum(n, split))
    if split is None or dim is None or search.extend(nodes, is_values) is None:
        return None
    members = {"linear": linear, "sizes": split.sizes, "dim": dim, "how": split.how}
    return Match(nodes, _compute_view, (node.args[0],), members)


VIEW = Pattern((nn.Linear,), (), _match_view)


def _compute_view(input: Tensor, *, linear: nn.Linear, sizes: tuple[int, int], dim: int, how: int | str) -> Tensor:
    """The maxima along ``dim``, -1 or -2; ``sizes`` and ``how`` as of `_Split`."""
    refusal = call_refusal(input) or layer_refusal(linear, nn.Linear)
    if refusal is None and (how == -1 or input.dim() == 2):
        split = _sizes(sizes, how, linear.weight.shape[0])
        if split is not None:
            return computed(lambda: _maxima(input, linear, split, dim), linear)
    apart(refusal or "the view isn't one of the features", linear)
    y = linear(input)
    if isinstance(how, int):
        y = y.unflatten(how, sizes)
    else:
        y = y.view(-1 if how == "rest" else input.shape[0], *sizes)
    maxima: Tensor = y.max(dim).values
    return maxima


def _maxima(input: Tensor, linear: nn.Linear, sizes: tuple[int, int], dim: int) -> Tensor:
    weight = linear.weight.unflatten(0, sizes)
    bias = None if linear.bias is None else linear.bias.unflatten(0, sizes)
    if dim == -1:  # the pieces come last
        weight, bias = weight.transpose(0, 1), None if bias is None else bias.t()
    return maxout_linear(input, weight, bias)


def _split(node: fx.Node, input: Any, features: int) -> _Split | None:
    """How a call splits the features of a linear layer, of which ``input`` is the input."""
    arguments: Any = node.args[1:]
    if node.op != "call_method" or node.kwargs:
        return None
    if node.target == "unflatten" and len(arguments) == 2 and arguments[0] in (1, -1):
        how, sizes = arguments
    elif node.target in ("view", "reshape") and len(arguments) == 3 and arguments[0] == -1:
        how, sizes = "rest", arguments[1:]
    elif node.target in ("view", "reshape") and len(arguments) == 3 and _is_rows(arguments[0], input):
        how, sizes = "rows", arguments[1:]
    else:
        return None
    if len(sizes) != 2 or any(type(size) is not int for size in sizes):
        return None
    return _Split(tuple(sizes), how) if _sizes(tuple(sizes), how, features) is not None else None


def _sizes(sizes: tuple[int, int], how: int | str, features: int) -> tuple[int, int] | None:
    """The two sizes of so many features, or None where these aren't split so."""
    first, second = sizes
    if how != "rest" and -1 in sizes and 0 not in sizes:
        first, second = (features // second, second) if first == -1 else (first, features // first)
    return (first, second) if first > 0 and first * second == features else None


def _is_rows(size: Any, input: Any) -> bool:
    """Whether a value is the first size of ``input``."""
    if not isinstance(size, fx.Node):
        return False
    if size.op == "call_method":
        return size.target == "size" and size.args == (input, 0)
    shape = size.args[0] if size.target is operator.getitem and size.args[1] == 0 else None
    return isinstance(shape, fx.Node) and shape.target is getattr and shape.args == (input, "shape")


def _maximum(node: fx.Node, split: _Split) -> int | None:
    """The dimension, -1 or -2, along which a call takes the maximum.

    Of ``max`` only, whose gradient goes to one of equal elements; that of ``amax`` is shared among them.
    """
    if node.target not in ("max", torch.max) or len(node.args) + len(node.kwargs) != 2:
        return None
    given: Any = node.args[1] if len(node.args) == 2 else node.kwargs.get("dim")
    dims = {-1: -1, -2: -2} if split.how == -1 else {-1: -1, -2: -2, 2: -1, 1: -2}
    return dims.get(given) if type(given) is int else None
