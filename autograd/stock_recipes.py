"""How PyTorch's operators that cost one pass over memory are made again: see `fusednn.autograd.recompute`.

By the class of their nodes in autograd's graph.  Each function takes a node, the region and what is known of the node's
result, and returns the operator with its options and the handles of its operands, or None.  An operand that the node
doesn't save may be noted where it was made.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import stock as F
from .handles import Kept, Result

__all__ = ["STOCK_RECIPES"]

_Found = tuple[Callable[..., Tensor], Sequence[Any]] | None


def _saved(node: Any, *names: str) -> list[Any] | None:
    """Handles of what the node saved, None where that is None; None where any isn't a handle."""
    found = []
    for name in names:
        handle = getattr(node, f"_raw_saved_{name}").data
        if handle is not None and isinstance(handle, Tensor):
            return None
        found.append(handle)
    return found


def _of_saved_input(function: Callable[..., Tensor], *options: str) -> Callable[..., _Found]:
    """Operators that save their input, with options by their names."""

    def find(node: Any, *_: Any) -> _Found:
        operands = _saved(node, "self")
        if operands is None or operands == [None]:
            return None
        return partial(function, **{name: getattr(node, f"_saved_{name}") for name in options}), operands

    return find


def _layer_norm(node: Any, region: Any, _: Result) -> _Found:
    operands = _saved(node, "input", "weight", "bias")
    if operands is None or (norm := region.norm_of(operands[1])) is None:
        return None
    shape, eps = node._saved_normalized_shape, norm.eps
    return (lambda x, weight, bias: F.layer_norm(x, shape, weight, bias, eps)), operands


def _rms_norm(node: Any, region: Any, _: Result) -> _Found:
    operands = _saved(node, "input", "weight")
    if operands is None or (norm := region.norm_of(operands[1])) is None:
        return None
    shape, eps = node._saved_normalized_shape, norm.eps
    return (lambda x, weight: F.rms_norm(x, shape, weight, eps)), operands


def _group_norm(node: Any, *_: Any) -> _Found:
    operands = _saved(node, "input", "weight")
    bias = node.next_functions[2][0]
    if operands is None or not hasattr(bias, "variable"):
        return None  # a bias without gradients looks like none at all
    sizes = (node._saved_N, node._saved_C, node._saved_HxW, node._saved_group, node._saved_eps)

    def again(x: Tensor, weight: Tensor | None, bias: Tensor) -> Tensor:
        return torch.native_group_norm(x, weight, bias, *sizes)[0]

    return again, (*operands, Kept(bias.variable))


def _operand(node: Any, region: Any, index: int, saved: str | None = None) -> Any:
    """The handle of an operand: saved by the node, or unchanged since it was noted where it was made."""
    if saved is not None:
        handle = getattr(node, f"_raw_saved_{saved}").data
        if isinstance(handle, Tensor):  # not packed by us: a number, or saved elsewhere
            return Kept(handle) if handle.dim() == 0 else None
        if handle is not None:
            return handle
    producer, output = node.next_functions[index]
    return None if producer is None else region.find_output(producer, output)


def _product(node: Any, region: Any, _: Result) -> _Found:
    one, other = _operand(node, region, 0, "self"), _operand(node, region, 1, "other")
    return None if one is None or other is None else (torch.mul, (one, other))


def _sum(node: Any, region: Any, _: Result) -> _Found:
    one, other = _operand(node, region, 0), _operand(node, region, 1)
    if one is None or other is None:
        return None
    return partial(torch.add, alpha=node._saved_alpha), (one, other)


# --- Copies -----------------------------------------------------------------------------------------------------------


def _signed(dimension: int) -> int:
    """A node tells of a negative dimension as of an unsigned integer."""
    return dimension - (1 << 64) if dimension >> 63 else dimension


def _reshaped(node: Any) -> Callable[[Tensor], Tensor]:
    return partial(torch.reshape, shape=node._input_metadata[0].shape)


_Views = dict[str, Callable[[Any], Callable[[Tensor], Tensor]]]
#: Views, by the name of their nodes' class.
_VIEWS: _Views = {
    "PermuteBackward0": lambda node: partial(torch.permute, dims=[_signed(dim) for dim in node._saved_dims]),
    "ReshapeAliasBackward0": _reshaped,
    "SqueezeBackward1": lambda node: partial(torch.squeeze, dim=_signed(node._saved_dim)),
    "TransposeBackward0": lambda node: partial(
        torch.transpose, dim0=_signed(node._saved_dim0), dim1=_signed(node._saved_dim1)
    ),
    "UnsafeViewBackward0": _reshaped,
    "UnsqueezeBackward0": lambda node: partial(torch.unsqueeze, dim=_signed(node._saved_dim)),
    "ViewBackward0": _reshaped,
}


def _copy(node: Any, region: Any, result: Result) -> _Found:
    """A copy in another layout (``contiguous``, ``reshape``) or dtype (autocast's), of a tensor or of a view of it."""
    views: list[Callable[[Tensor], Tensor]] = []
    copied = False
    operand = None
    while operand is None:
        if (view := _VIEWS.get(type(node).__name__)) is not None:
            views.insert(0, view(node))
        elif copied or type(node).__name__ not in _COPIES:  # two may round twice
            return None
        else:
            copied = True
        node, output = node.next_functions[0]
        if node is None or node._input_metadata[output].device != result.device:
            return None
        operand = region.parameter(node) or region.find_output(node, output)
    if not copied:
        return None  # a view: its memory is kept anyway
    size, strides, dtype = result.size, result.strides, result.dtype

    def again(x: Tensor) -> Tensor:
        y = x
        for view in views:
            y = view(y)
        if y.data_ptr() != x.data_ptr() and y.stride() == strides and y.dtype == dtype:
            return y  # reshaping has copied it
        return torch.empty_strided(size, strides, dtype=dtype, device=y.device).copy_(y)

    return again, (operand,)


_COPIES = ("CloneBackward0", "ToCopyBackward0")

#: What finds the recipe, by the name of the node's class.
STOCK_RECIPES: dict[str, Callable[[Any, Any, Result], _Found]] = {
    **dict.fromkeys((*_COPIES, "UnsafeViewBackward0"), _copy),
    "AddBackward0": _sum,
    "FusedRmsNormBackward0": _rms_norm,
    "GeluBackward0": _of_saved_input(F.gelu, "approximate"),
    "HardswishBackward0": _of_saved_input(F.hardswish),
    "MishBackward0": _of_saved_input(F.mish),
    "MulBackward0": _product,
    "NativeGroupNormBackward0": _group_norm,
    "NativeLayerNormBackward0": _layer_norm,
    "SiluBackward0": _of_saved_input(F.silu),
}
