"""DropConnect: a linear map whose weights are dropped, each step anew."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ..kernels.base.random import with_seed
from . import stock as F
from .dispatch import in_low_precision, or_stock, takes_kernel
from .dropout import apply_dropout, dropout_gradient, probability_refusal

__all__ = ["drop_connect_linear"]


class DropConnectLinear(Function):
    """Saves the input, the weight and a seed: the backward pass drops the same weights again.

    The products are left to cuBLAS; dropping is a pass over the weight before them, and over its gradient after.  The
    backward pass consists of what can be differentiated again.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dropped: Tensor, seed: Tensor, p: float
    ) -> Tensor:
        ctx.save_for_backward(x, weight, seed)
        ctx.p = p
        return F.linear(x, dropped, bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, seed = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        dx = dw = db = None
        if needed[0]:
            dx = g @ apply_dropout(weight, ctx.p, False, seed=seed)
        rows = g.reshape(-1, g.shape[-1])
        if needed[1]:
            dw = rows.t() @ x.reshape(-1, x.shape[-1])
            dw = dropout_gradient(dw, seed, torch.empty_like(weight).stride(), ctx.p, False, 0)
        if needed[2]:
            db = rows.sum(0)
        return dx, dw, db, None, None, None


@or_stock
def drop_connect_linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, p: float = 0.5, training: bool = True
) -> Tensor:
    """x (m W / (1 - p))^T + b, with one m in {0, 1} for each weight and call, 0 with probability ``p``.

    In evaluation, and for p = 0, it is `torch.nn.functional.linear`: the weights' mean takes the place of the paper's
    sampling from a Gaussian, and the scale is applied in training instead.  The bias is not dropped; one mask serves
    the whole batch.  (..., in) and (out, in) give (..., out); autocast as in linear.  Beside its operands it saves a
    seed.  Source: Wan, Zeiler, Zhang, LeCun, Fergus, "Regularization of Neural Networks using DropConnect" (ICML 2013).
    """
    input, weight, bias = in_low_precision(input, weight, bias)
    operands = (weight, input) if bias is None else (weight, input, bias)
    if not takes_kernel("drop_connect_linear", *operands, refusal=lambda: probability_refusal(p, training)):
        return F.linear(input, F.dropout(weight, p, training), bias)

    def drop(seed: Tensor) -> tuple[Tensor, Tensor]:
        return apply_dropout(weight.detach(), p, False, seed=seed), seed

    # As in stock, the numbers are drawn once the weights are dropped, whatever becomes of the product.
    y: Tensor = DropConnectLinear.apply(input, weight, bias, *with_seed(weight.device, drop), float(p))
    return y
