"""drop(scale * x) + residual, the end of a block, of which the scale or what drops samples may be missing.

The scale is a layer's, or a parameter that code multiplies by; between it and what drops, dimensions may be permuted.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from ....autograd.block_end import block_end
from ..block_ends import BLOCK_ENDS, DROP_PATHS, SCALES, drop_options, drops, scale_of
from ..calls import summand
from ..members import apart, call_refusal, computed, layer_refusal
from .pattern import Finder, Match, Pattern, added, distinct, passed_on

__all__ = ["PATTERN"]

_SHAPING = ("reshape", "unsqueeze", "view")


def _match(search: Finder, node: fx.Node, _: nn.Module | None) -> Match | None:
    nodes = [node]
    input, scale = _scaled(node)
    layer = None if input is not None else search.layer(node, *SCALES)
    dims = None
    drop = None
    if input is None and layer is None:
        drop = search.layer(node, *DROP_PATHS)
        if drop is None:
            return None
    else:
        dims = search.extend(nodes, _permutation)
        drop = search.extend(nodes, lambda n: search.layer(n, *DROP_PATHS))
    identity = None if drop is not None else search.identity(nodes)
    # Not where layers that are called in between may draw random numbers, too.
    residual, in_place = search.extend(nodes, lambda n: summand(n, nodes[-1])) or (None, False)
    if residual is None:
        return None
    operands = (node.args[0] if input is None else input, scale, residual)
    members = {"layer": layer, "dims": dims, "identity": identity, "drop": drop, "in_place": in_place}
    members["leads"] = not in_place and nodes[-1].args[0] is residual
    return Match(nodes, _compute, operands, members)


PATTERN = Pattern(BLOCK_ENDS, (), _match, anywhere=True)


def _scaled(node: fx.Node) -> tuple[fx.Node | None, fx.Node | None]:
    """What a call multiplies by a parameter, and that; none where it does something else."""
    if node.target in (operator.mul, torch.mul, "mul") and len(node.args) == 2 and not node.kwargs:
        for value, scale in (node.args, node.args[::-1]):
            if isinstance(value, fx.Node) and isinstance(scale, fx.Node) and _is_parameter(scale):
                return (None, None) if _is_parameter(value) else (value, scale)
    return None, None


def _is_parameter(node: Any) -> bool:
    """Whether a value is an attribute of the module, or a view of one."""
    while node.op == "call_method" and node.target in _SHAPING and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return bool(node.op == "get_attr")


def _permutation(node: fx.Node) -> tuple[int, ...] | None:
    """The dimensions in their new order, if a call is ``permute``."""
    if node.target not in ("permute", torch.permute) or node.kwargs:
        return None
    _, *dims = node.args
    given = dims[0] if len(dims) == 1 else dims
    return tuple(given) if isinstance(given, tuple | list) and all(type(dim) is int for dim in given) else None


def _compute(
    input: Tensor,
    scale: Tensor | None,
    residual: Tensor,
    *,
    layer: nn.Module | None,
    dims: tuple[int, ...] | None,
    identity: nn.Module | None,
    drop: nn.Module | None,
    in_place: bool,
    leads: bool,
) -> Tensor:
    """``layer`` or ``scale``: what multiplies; ``dims``: how the code permutes; ``in_place``: how it adds.

    ``leads``: the residual comes first in the sum, which then lies in memory as the residual does.
    """
    if apart(_refusal(input, residual, scale, layer, identity, drop), layer, drop):
        y = layer(input) if layer is not None else input if scale is None else input * scale
        y = y if dims is None else y.permute(dims)
        y = passed_on(passed_on(y, identity), drop)
        return residual + y if leads else added(y, residual, in_place)
    p, mode = (0.0, "row") if drop is None else drop_options(drop)
    training = drop is not None and drop.training
    factor = scale if layer is None else scale_of(layer)
    if dims is not None and factor is not None:
        input = input.permute(dims)
        factor = factor.view([1] * (len(dims) - factor.dim()) + list(factor.shape)).permute(dims)
    if leads:
        input = _laid_out(input, residual)
    return computed(lambda: block_end(input, distinct(residual, input), factor, p, training, mode), layer, drop)


def _laid_out(x: Tensor, like: Tensor) -> Tensor:
    """x in the memory format of another tensor."""
    formats = (torch.contiguous_format, torch.channels_last) if x.stride() != like.stride() else ()
    for memory_format in formats:
        if like.is_contiguous(memory_format=memory_format):
            return x.contiguous(memory_format=memory_format)
    return x


def _refusal(
    input: Tensor,
    residual: Tensor,
    scale: Tensor | None,
    layer: Any,
    identity: nn.Module | None,
    drop: nn.Module | None,
) -> str | None:
    """Why the calls are made one by one, or None."""
    refusal = call_refusal(input) or layer_refusal(layer, *SCALES) or layer_refusal(identity, nn.Identity)
    refusal = refusal or layer_refusal(drop, *DROP_PATHS)
    if refusal is not None:
        return refusal
    if getattr(layer, "inplace", False):
        return "the layer that scales writes over its input"
    if drop is not None and drop.training:
        if not drops(*drop_options(drop), True):
            return "nothing is dropped, or by other rules"
    elif scale is None and layer is None:
        return "nothing is dropped in evaluation"
    if not isinstance(residual, Tensor) or residual.device != input.device:
        return "the residual is no tensor beside the input"
    return None
