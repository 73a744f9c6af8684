"""Softmax, log-softmax and softmin with the signatures of ``torch.nn.functional``.

The output is saved, and suffices for the gradient.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import _get_softmax_dim  # type: ignore[attr-defined]  # it has no type

from ..kernels import softmax as kernels
from ..kernels.base.launch import DTYPES
from . import stock as F
from .decisions import decided_once
from .dispatch import autocast_dtype, or_stock, takes_kernel
from .function import Function
from .operators import operator
from .recompute import needs

__all__ = ["log_softmax", "softmax", "softmin"]


_forward = operator("softmax(Tensor x, int dim, str kind) -> Tensor", fake=lambda x, dim, kind: torch.empty_like(x))(
    kernels.softmax_forward
)
_backward = operator(
    "softmax_backward(Tensor g, Tensor y, int dim, str kind) -> Tensor",
    fake=lambda g, y, dim, kind: torch.empty_like(y),
)(kernels.softmax_backward)


class Softmax(Function):
    """A row of `fusednn.kernels.softmax.KINDS`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, kind: str) -> Tensor:
        y: Tensor = _forward(x, dim, kind)
        ctx.save_for_backward(y)
        ctx.arguments = (dim, kind)
        needs(ctx, x)
        return y

    @staticmethod
    def recipe(ctx: Any) -> Callable[..., Tensor]:
        arguments = ctx.arguments
        return lambda x: _forward(x, *arguments)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        (y,) = ctx.saved_tensors
        dim, kind = ctx.arguments
        if not torch.is_grad_enabled():
            dx = _backward(g, y, dim, kind)
        elif kind == "log_softmax":
            dx = torch.ops.aten._log_softmax_backward_data(g, y, dim, y.dtype)
        else:
            dx = torch.ops.aten._softmax_backward_data(g, y, dim, y.dtype)
            dx = -dx if kind == "softmin" else dx
        return dx, None, None


@or_stock
def softmax(input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Tensor:
    """exp(x) / sum(exp(x)) along ``dim``.  As `torch.nn.functional.softmax`; saves the output."""
    if dim is None:
        dim = _default_dim("softmax", input.dim(), _stacklevel + 1)
    y = _apply(input, dim, dtype, "softmax")
    return F.softmax(input, dim, _stacklevel, dtype) if y is None else y


@or_stock
def log_softmax(
    input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Tensor:
    """x - log(sum(exp(x))) along ``dim``.  As `torch.nn.functional.log_softmax`; saves the output."""
    if dim is None:
        dim = _default_dim("log_softmax", input.dim(), _stacklevel + 1)
    y = _apply(input, dim, dtype, "log_softmax")
    return F.log_softmax(input, dim, _stacklevel, dtype) if y is None else y


@or_stock
def softmin(input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Tensor:
    """exp(-x) / sum(exp(-x)) along ``dim``.  As `torch.nn.functional.softmin`; saves the output."""
    if dim is None:
        dim = _default_dim("softmin", input.dim(), _stacklevel + 1)
    y = _apply(input, dim, dtype, "softmin")
    return F.softmin(input, dim, _stacklevel, dtype) if y is None else y


#: The deprecated choice of a dimension, with its warning.
_default_dim: Callable[[str, int, int], int] = _get_softmax_dim


def _apply(input: Tensor, dim: int, dtype: torch.dtype | None, kind: str) -> Tensor | None:
    """The kernel's result, or None where stock has to do it."""
    if dtype is None and autocast_dtype(input) is not None and input.is_cuda and input.dtype.itemsize == 2:
        dtype = torch.float32  # CUDA's autocast does it in float32; the CPU's leaves it alone
    y: Tensor | None = _decided(input, dim, dtype, kind)
    return y


@decided_once
def _decided(input: Tensor, dim: int, dtype: torch.dtype | None, kind: str) -> Callable[..., Tensor | None]:
    """`_apply` in the dtype that it is computed in."""
    if not takes_kernel(kind, input, refusal=lambda: _refusal(input, dim, dtype)):
        return lambda *_: None
    place = dim % max(input.dim(), 1)
    function = Softmax.apply if torch.is_grad_enabled() and input.requires_grad else _forward

    def compute(x: Tensor, *_: object) -> Tensor:
        y: Tensor = function(x if dtype is None else x.to(dtype), place, kind)
        return y

    return compute


def _refusal(input: Tensor, dim: object, dtype: torch.dtype | None) -> str | None:
    if type(dim) is not int or not -max(input.dim(), 1) <= dim < max(input.dim(), 1):
        return "no such dimension"
    if dtype is not None and (type(dtype) is not torch.dtype or dtype not in DTYPES):
        return f"no kernel for {dtype}"
    return None
