"""PReLU with the signature of ``torch.nn.functional.prelu``."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..kernels import prelu as kernels
from . import stock as F
from .decisions import decided_once
from .dispatch import in_low_precision, or_stock, takes_kernel
from .function import Function
from .gradients import stock_gradients
from .operators import operator

__all__ = ["prelu"]


_forward = operator("prelu(Tensor x, Tensor weight) -> Tensor", fake=lambda x, weight: torch.empty_like(x))(
    kernels.prelu_forward
)
_backward = operator(
    "prelu_backward(Tensor g, Tensor x, Tensor weight) -> (Tensor, Tensor)",
    fake=lambda g, x, weight: (torch.empty_like(x), torch.empty_like(weight)),
)(kernels.prelu_backward)


class PReLU(Function):
    """Saves the input and the slopes; one pass gives both gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        y: Tensor = _forward(x, weight)
        return y

    @staticmethod
    def recipe(ctx: Any) -> Callable[..., Tensor]:
        return _forward

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        if torch.is_grad_enabled():
            dx, dw = stock_gradients(F.prelu, (x, weight), ctx.needs_input_grad, g)
        else:
            dx, dw = _backward(g, x, weight)
        return dx if ctx.needs_input_grad[0] else None, dw if ctx.needs_input_grad[1] else None


@or_stock
def prelu(input: Tensor, weight: Tensor) -> Tensor:
    """max(0, x) + weight min(0, x).  As `torch.nn.functional.prelu`.

    ``weight`` holds one slope, or one for each channel (dimension 1 of the input).  Autocast computes in its low
    precision, and so does this.  Source: He, Zhang, Ren, Sun, "Delving Deep into Rectifiers" (ICCV 2015).
    """
    y: Tensor = _prelu(*in_low_precision(input, weight))
    return y


@decided_once
def _prelu(input: Tensor, weight: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """`prelu` in the precision that it is computed in."""
    if not takes_kernel("prelu", input, weight, refusal=lambda: _refusal(input, weight)):
        return F.prelu
    function: Callable[[Tensor, Tensor], Tensor] = PReLU.apply if torch.is_grad_enabled() else _forward
    return function


def _refusal(input: Tensor, weight: Tensor) -> str | None:
    if weight.dim() > 1 or (weight.numel() != 1 and (input.dim() < 2 or weight.numel() != input.shape[1])):
        return "the slopes are neither one nor one per channel"
    return None
