"""How PyTorch's operators that cost one pass over memory are made again: see `fusednn.autograd.recompute`.

By the class of their nodes in autograd's graph.  Each function takes a node and returns the operator with its options
and the handles of its operands, or None.  An operand that the node doesn't save may be noted where it was made.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import stock as F
from .handles import Kept, noted

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


def _of_saved_input(function: Callable[..., Tensor], *options: str) -> Callable[[Any, Any], _Found]:
    """Operators that save their input, with options by their names."""

    def find(node: Any, _: Any) -> _Found:
        operands = _saved(node, "self")
        if operands is None or operands == [None]:
            return None
        return partial(function, **{name: getattr(node, f"_saved_{name}") for name in options}), operands

    return find


def _layer_norm(node: Any, region: Any) -> _Found:
    operands = _saved(node, "input", "weight", "bias")
    if operands is None or (norm := region.norm_of(operands[1])) is None:
        return None
    shape, eps = node._saved_normalized_shape, norm.eps
    return (lambda x, weight, bias: F.layer_norm(x, shape, weight, bias, eps)), operands


def _rms_norm(node: Any, region: Any) -> _Found:
    operands = _saved(node, "input", "weight")
    if operands is None or (norm := region.norm_of(operands[1])) is None:
        return None
    shape, eps = node._saved_normalized_shape, norm.eps
    return (lambda x, weight: F.rms_norm(x, shape, weight, eps)), operands


def _group_norm(node: Any, _: Any) -> _Found:
    operands = _saved(node, "input", "weight")
    bias = node.next_functions[2][0]
    if operands is None or not hasattr(bias, "variable"):
        return None  # a bias without gradients looks like none at all
    sizes = (node._saved_N, node._saved_C, node._saved_HxW, node._saved_group, node._saved_eps)

    def again(x: Tensor, weight: Tensor | None, bias: Tensor) -> Tensor:
        return torch.native_group_norm(x, weight, bias, *sizes)[0]

    return again, (*operands, Kept(bias.variable))


def _operand(node: Any, index: int, saved: str | None = None) -> Any:
    """The handle of an operand: saved by the node, or unchanged since it was noted where it was made."""
    if saved is not None:
        handle = getattr(node, f"_raw_saved_{saved}").data
        if isinstance(handle, Tensor):  # not packed by us: a number, or saved elsewhere
            return Kept(handle) if handle.dim() == 0 else None
        if handle is not None:
            return handle
    producer, output = node.next_functions[index]
    handle = None if producer is None else noted(producer, output)
    return None if handle is None or handle.changed else handle


def _product(node: Any, _: Any) -> _Found:
    one, other = _operand(node, 0, "self"), _operand(node, 1, "other")
    return None if one is None or other is None else (torch.mul, (one, other))


def _sum(node: Any, _: Any) -> _Found:
    one, other = _operand(node, 0), _operand(node, 1)
    if one is None or other is None:
        return None
    return partial(torch.add, alpha=node._saved_alpha), (one, other)


#: What finds the recipe, by the name of the node's class.
STOCK_RECIPES: dict[str, Callable[[Any, Any], _Found]] = {
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
