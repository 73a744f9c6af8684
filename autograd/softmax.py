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
from .dispatch import autocast_dtype, takes_kernel
from .function import Function
from .namesakes import namesake
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


def _of_kind(
    kind: str, input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Tensor:
    if dim is None:
        dim = _default_dim(kind, input.dim(), _stacklevel + 1)
    given = dtype
    if dtype is None and autocast_dtype(input) is not None and input.is_cuda and input.dtype.itemsize == 2:
        dtype = torch.float32  # CUDA's autocast does it in float32; the CPU's leaves it alone
    y: Tensor | None = _decided(input, dim, dtype, kind)
    return _STOCK[kind](input, dim, _stacklevel, given) if y is None else y


#: The deprecated choice of a dimension, with its warning.
_default_dim: Callable[[str, int, int], int] = _get_softmax_dim

_STOCK: dict[str, Callable[..., Tensor]] = {
    "softmax": F.softmax,
    "log_softmax": F.log_softmax,
    "softmin": F.softmin,
}
_DOC = "{} along ``dim``.  As `torch.nn.functional.{}`; saves the output."

softmax = namesake(_of_kind, "softmax", "softmax", _DOC.format("exp(x) / sum(exp(x))", "softmax"))
log_softmax = namesake(_of_kind, "log_softmax", "log_softmax", _DOC.format("x - log(sum(exp(x)))", "log_softmax"))
softmin = namesake(_of_kind, "softmin", "softmin", _DOC.format("exp(-x) / sum(exp(-x))", "softmin"))


@decided_once
def _decided(input: Tensor, dim: int, dtype: torch.dtype | None, kind: str) -> Callable[..., Tensor | None]:
    """The kernel's result in the dtype that it is computed in, or None where stock has to do it."""
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
