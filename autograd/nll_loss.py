"""Negative log likelihood with the signature of ``torch.nn.functional.nll_loss``."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..kernels import nll_loss as kernels
from ..kernels.base.launch import DeviceAssertionError
from . import stock as F
from .decisions import decided_once
from .dispatch import in_single_precision, is_integer, or_stock, takes_kernel
from .function import Function
from .gradients import stock_gradients
from .loss_arguments import reduction_name, warn_of_deprecated
from .operators import operator

__all__ = ["nll_loss"]


def _stock(x: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str) -> Tensor:
    return F.nll_loss(x, target, weight, ignore_index=ignore_index, reduction=reduction)


@operator(
    "nll_loss(Tensor x, Tensor target, Tensor? weight, int ignore_index) -> Tensor",
    fake=lambda x, target, weight, ignore_index: x.new_empty(target.shape),
)
def _elements(x: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    try:
        return kernels.nll_loss(x, target, weight, ignore_index)
    except DeviceAssertionError:
        return _stock(x, target, weight, ignore_index, "none")  # raises the stock error


@operator(
    "nll_loss_reduced(Tensor x, Tensor target, Tensor? weight, int ignore_index, str reduction) -> (Tensor, Tensor)",
    fake=lambda x, target, weight, ignore_index, reduction: (
        x.new_empty(()),
        x.new_empty((), dtype=torch.float64),
    ),
)
def _reduced(
    x: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: kernels.Reduction
) -> tuple[Tensor, Tensor]:
    try:
        return kernels.nll_loss_reduced(x, target, weight, ignore_index, reduction)
    except DeviceAssertionError:
        loss = _stock(x, target, weight, ignore_index, reduction)  # raises the stock error
        return loss, loss.new_empty((), dtype=torch.float64)


_backward = operator(
    "nll_loss_backward(Tensor g, Tensor x, Tensor target, Tensor? weight, Tensor? weight_total, int ignore_index,"
    " str reduction) -> Tensor",
    fake=lambda g, x, *_: kernels.zero_gradient(x),
)(kernels.nll_loss_backward)


class NLLLoss(Function):
    """Saves the operands, and the sum of the weights that a mean was divided by."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, target: Tensor, weight: Tensor | None, *options: Any) -> Tensor:
        loss, weight_total = _forward(x, target, weight, *options)
        ctx.save_for_backward(x, target, weight, weight_total)
        ctx.arguments = options  # the ignored index and the reduction
        return loss

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None, None]:
        x, target, weight, weight_total = ctx.saved_tensors
        if torch.is_grad_enabled():
            # Contiguous: in four dimensions stock's own gradient refuses every other layout.
            (dx,) = stock_gradients(lambda x: _stock(x.contiguous(), target, weight, *ctx.arguments), (x,), (True,), g)
        else:
            dx = _backward(g, x, target, weight, weight_total, *ctx.arguments)
        return dx, None, None, None, None


def _forward(
    x: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: kernels.Reduction
) -> tuple[Tensor, Tensor | None]:
    """The loss, and the sum of the weights where it was divided by that."""
    if reduction == "none":
        return _elements(x, target, weight, ignore_index), None
    loss, weight_total = _reduced(x, target, weight, ignore_index, reduction)
    return loss, weight_total if reduction == "mean" else None


@or_stock
def nll_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """-weight[t] x[t], its sum, or its mean over the weights, of log-probabilities x and class indices t.

    As `torch.nn.functional.nll_loss`: input (C), (N, C) or (N, C, d1, ...), target (), (N) or (N, d1, ...), int64;
    weight (C).  Targets that are ``ignore_index`` count for nothing; others out of bounds raise PyTorch's IndexError on
    the CPU, and a device assertion on CUDA.  Autocast computes it in float32, and so does this.
    """
    name = reduction_name(size_average, reduce, reduction)
    x, w = in_single_precision(input, weight)
    loss: Tensor | None = _nll_loss(x, target, w, ignore_index, name)
    if loss is None:
        return F.nll_loss(input, target, weight, size_average, ignore_index, reduce, reduction)
    warn_of_deprecated(size_average, reduce)
    return loss


@decided_once
def _nll_loss(
    x: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: kernels.Reduction
) -> Callable[..., Tensor | None]:
    """The loss by its kernels, or None."""
    given = (x,) if weight is None else (x, weight)
    if not takes_kernel("nll_loss", *given, refusal=lambda: _refusal(x, target, weight, ignore_index, reduction)):
        return lambda *_: None
    if torch.is_grad_enabled() and x.requires_grad:
        function: Callable[..., Tensor] = NLLLoss.apply
        return function
    return lambda *arguments: _forward(*arguments)[0]


def _refusal(
    input: Tensor, target: object, weight: Tensor | None, ignore_index: object, reduction: object
) -> str | None:
    """Why the kernels don't take these arguments, or None."""
    if type(target) is not Tensor:
        return "not a plain tensor"
    if reduction not in ("none", "mean", "sum"):
        return "unknown reduction"
    if not is_integer(ignore_index):
        return "ignore_index is not an integer"
    if target.dtype is not torch.int64 or target.device != input.device or target.layout is not torch.strided:
        return "the targets are not int64 indices on the input's device"
    if input.dim() == 0:
        return "the input has no classes"
    samples, (classes, *places) = ((), input.shape) if input.dim() == 1 else (input.shape[:1], input.shape[1:])
    if target.shape != (*samples, *places):
        return "the targets don't fit the input"
    if math.prod(places) > kernels.LARGEST_PLACES:
        return "a sample has too many places"
    if weight is not None:
        if weight.requires_grad and torch.is_grad_enabled():
            return "the weights require gradients"
        if weight.shape != (classes,):
            return "the weights are not one for each class"
    return None
