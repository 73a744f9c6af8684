"""Pointwise losses with the signatures of ``torch.nn.functional``, and their gradients.

Each saves its operands, no intermediate result; one pass over them gives the gradients that are wanted, of the input
and of the target.  Operands of different shapes, which PyTorch broadcasts with a warning, take the stock path.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..kernels import pointwise_loss as kernels
from ..kernels.base.launch import DeviceAssertionError
from ..kernels.functions.loss import LOSSES
from . import stock as F
from .decisions import decided_once
from .dispatch import autocast_dtype, else_stock, in_single_precision, is_number, takes_kernel
from .function import Function
from .gradients import stock_gradients
from .loss_arguments import reduction_name, warn_of_deprecated
from .operators import operator

__all__ = [
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "huber_loss",
    "kl_div",
    "l1_loss",
    "mse_loss",
    "smooth_l1_loss",
]

# --- Stock ----------------------------------------------------------------------------------------------------------

# The stock loss of each element, of (x, target, weight, positive_weight, a, b); see the table for a and b.
_STOCK: dict[str, Callable[[Tensor, Tensor, Tensor | None, Tensor | None, float, float], Tensor]] = {
    "binary_cross_entropy": lambda x, t, w, p, a, b: F.binary_cross_entropy(x, t, w, reduction="none"),
    "binary_cross_entropy_with_logits": lambda x, t, w, p, a, b: F.binary_cross_entropy_with_logits(
        x, t, w, reduction="none", pos_weight=p
    ),
    "huber_loss": lambda x, t, w, p, a, b: F.huber_loss(x, t, reduction="none", delta=a, weight=w) / b,  # type: ignore[call-arg]
    "kl_div": lambda x, t, w, p, a, b: F.kl_div(x, t, reduction="none", log_target=a != 0),
    "l1_loss": lambda x, t, w, p, a, b: F.l1_loss(x, t, reduction="none", weight=w),  # type: ignore[call-arg]
    "mse_loss": lambda x, t, w, p, a, b: F.mse_loss(x, t, reduction="none", weight=w),  # type: ignore[call-arg]
}


def _stock_loss(x: Tensor, target: Tensor, *arguments: Any) -> Tensor:
    """The loss by stock operators, which can be differentiated again.

    The arguments are weight, positive weight, the row's name and its two numbers, and the reduction.
    """
    weight, positive_weight, name, a, b, reduction = arguments
    y = _STOCK[name](x, target, weight, positive_weight, a, b)
    if reduction == "none":
        return y
    if reduction == "weighted_mean":
        total: Tensor = weight.sum()
        return y.sum() / total
    return y.sum() / kernels.divisor(reduction, x)


# --- Operators ------------------------------------------------------------------------------------------------------


@operator(
    "pointwise_loss(Tensor x, Tensor target, Tensor? weight, Tensor? positive_weight, str name, float a, float b)"
    " -> Tensor",
    fake=lambda x, target, weight, positive_weight, name, a, b: torch.empty_like(x),
)
def _elements(*arguments: Any) -> Tensor:
    try:
        return kernels.pointwise_loss(*arguments)
    except DeviceAssertionError:
        return _stock_loss(*(*arguments, "none"))  # raises the stock error


@operator(
    "pointwise_loss_reduced(Tensor x, Tensor target, Tensor? weight, Tensor? positive_weight, str name, float a,"
    " float b, str reduction) -> (Tensor, Tensor)",
    fake=lambda x, target, weight, positive_weight, name, a, b, reduction: (
        x.new_empty(()),
        x.new_empty((), dtype=torch.float64),
    ),
)
def _reduced(*arguments: Any) -> tuple[Tensor, Tensor]:
    try:
        return kernels.pointwise_loss_reduced(*arguments)
    except DeviceAssertionError:
        loss = _stock_loss(*arguments)  # raises the stock error
        return loss, loss.new_empty((), dtype=torch.float64)


_backward = operator(
    "pointwise_loss_backward(Tensor g, Tensor x, Tensor target, Tensor? weight, Tensor? positive_weight,"
    " Tensor? weight_total, str name, float a, float b, str reduction, bool wants_dx, bool wants_dt)"
    " -> (Tensor, Tensor)",
    fake=lambda g, x, *rest: tuple(torch.empty_like(x) if wants else x.new_empty(0) for wants in rest[-2:]),
)(kernels.pointwise_loss_backward)


# --- Gradients ------------------------------------------------------------------------------------------------------


class PointwiseLoss(Function):
    """Of the arguments of `_stock_loss`.  Saves the operands, and the sum of the weights where it was divided by it."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        loss, weight_total = _forward(*arguments)
        ctx.save_for_backward(*arguments[:4], weight_total)
        ctx.arguments = arguments[4:]
        return loss

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, target, weight, positive_weight, weight_total = ctx.saved_tensors
        wants_dx, wants_dt, *_ = ctx.needs_input_grad
        dx: Tensor | None
        dt: Tensor | None
        if torch.is_grad_enabled():
            dx, dt = stock_gradients(
                lambda x, target: _stock_loss(x, target, weight, positive_weight, *ctx.arguments),
                (x, target),
                (wants_dx, wants_dt),
                g,
            )
        else:
            dx, dt = _backward(g, x, target, weight, positive_weight, weight_total, *ctx.arguments, wants_dx, wants_dt)
        return dx if wants_dx else None, dt if wants_dt else None, None, None, None, None, None, None


def _forward(*arguments: Any) -> tuple[Tensor, Tensor | None]:
    """The loss of the arguments of `_stock_loss`, and the sum of the weights where it was divided by that."""
    *others, reduction = arguments
    if reduction == "none":
        return _elements(*others), None
    loss, weight_total = _reduced(*arguments)
    return loss, weight_total if reduction == "weighted_mean" else None


def _apply_kernel(input: Tensor, target: Tensor, weight: Tensor | None, *others: Any) -> Tensor:
    """The loss of the arguments of `_stock_loss`, differentiable where the input or the target requires gradients."""
    *rest, reduction = others
    _, name, _, _ = rest
    if reduction == "mean" and weight is not None and LOSSES[name].has_weighted_mean:
        reduction = "weighted_mean"
    arguments = (input, target, weight, *rest, reduction)
    if torch.is_grad_enabled() and (input.requires_grad or target.requires_grad):
        loss: Tensor = PointwiseLoss.apply(*arguments)
        return loss
    return _forward(*arguments)[0]


# --- Arguments ------------------------------------------------------------------------------------------------------


def _try_kernel(
    operation: str,
    deprecated: tuple[bool | None, bool | None],
    reduction: str,
    input: Tensor,
    *operands: Tensor | None,
    row: tuple[str, float, float] | None = None,
    refusal: str | None = None,
) -> Tensor | None:
    """The loss of (input, target, weight, positive weight), of which the last ones may be left out, by kernels.

    None where ``operation`` has to take the stock path; ``refusal``: for its options.  The row of the table, with its
    two numbers, has the operation's name where none is given.
    """
    operands += (None,) * (3 - len(operands))
    by_autocast = autocast_dtype(input) is not None
    loss: Tensor | None = _loss(
        *(operation, refusal, by_autocast, *in_single_precision(input, *operands)),
        *(*(row or (operation, 0.0, 0.0)), reduction_name(*deprecated, reduction)),
    )
    if loss is not None:
        warn_of_deprecated(*deprecated)
    return loss


@decided_once
def _loss(
    operation: str,
    refusal: str | None,
    by_autocast: bool,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    positive_weight: Tensor | None,
    *options: Any,
) -> Callable[..., Tensor | None]:
    """The loss of operands in the precision that it is computed in, or None."""
    name, a, b, reduction = options

    def any_refusal() -> str | None:
        if reason := _refusal(operation, input, target, weight, positive_weight) or refusal:
            return reason
        if reduction not in ("none", "mean", "sum") and not (reduction == "batchmean" and operation == "kl_div"):
            return "unknown reduction"
        if not by_autocast:
            return None
        if weight is not None and name in _UNWEIGHTED_UNDER_AUTOCAST:
            return "autocast takes a weighted loss apart"
        return "autocast rejects it" if name == "binary_cross_entropy" and input.is_cuda else None

    weights = [tensor for tensor in (weight, positive_weight) if tensor is not None]
    if not takes_kernel(operation, input, target, *weights, refusal=any_refusal):
        return lambda *_: None
    arguments = (name, float(a), float(b), reduction)
    return lambda operation, refusal, by_autocast, input, target, weight, positive_weight, *_: _apply_kernel(
        input, target, weight, positive_weight, *arguments
    )


# Losses whose weights PyTorch multiplies outside the operator that autocast knows.
_UNWEIGHTED_UNDER_AUTOCAST = ("huber_loss", "l1_loss", "mse_loss")


def _refusal(
    operation: str, input: Tensor, target: Tensor, weight: Tensor | None, positive_weight: Tensor | None
) -> str | None:
    """Why the kernels don't take these operands, or None."""
    if input.shape != target.shape:
        return "input and target differ in shape"
    for weights in (weight, positive_weight):
        if weights is None:
            continue
        if weights.requires_grad and torch.is_grad_enabled():
            return "the weights require gradients"
        if not _broadcasts_to(weights, input):
            return "the weights don't fit the input"
    if weight is not None and operation in _UNBROADCAST and weight.shape != input.shape:
        return "the weights don't have the shape of the input"
    return None


# Losses whose weights PyTorch doesn't broadcast.
_UNBROADCAST = ("huber_loss", "l1_loss", "mse_loss")


def _broadcasts_to(small: Tensor, large: Tensor) -> bool:
    pairs = zip(reversed(small.shape), reversed(large.shape), strict=False)
    return small.dim() <= large.dim() and all(ours in (1, theirs) for ours, theirs in pairs)


def _threshold_refusal(threshold: object) -> str | None:
    if not is_number(threshold):
        return "a parameter is not a Python number"
    return None if threshold > 0 else "the threshold is not positive"


# --- Functions ------------------------------------------------------------------------------------------------------
#
# Autocast computes all of them in float32, and so do these.


@else_stock(F.mse_loss)
def mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor | None:
    """weight (x - t)^2, its sum, or its mean over the weights.  As `torch.nn.functional.mse_loss`."""
    return _try_kernel("mse_loss", (size_average, reduce), reduction, input, target, weight)


@else_stock(F.l1_loss)
def l1_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor | None:
    """weight |x - t|, its sum, or its mean over the weights.  As `torch.nn.functional.l1_loss`."""
    return _try_kernel("l1_loss", (size_average, reduce), reduction, input, target, weight)


@else_stock(F.smooth_l1_loss)
def smooth_l1_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    beta: float = 1.0,
) -> Tensor | None:
    """(x - t)^2 / (2 beta) where |x - t| < beta, else |x - t| - beta / 2.  As `torch.nn.functional.smooth_l1_loss`.

    With beta = 0 that is the L1 loss.  Source: Girshick, "Fast R-CNN" (ICCV 2015).
    """
    is_l1 = type(beta) in (float, int) and beta == 0
    row, refusal = (("l1_loss", 0.0, 0.0), None) if is_l1 else (("huber_loss", beta, beta), _threshold_refusal(beta))
    operands = (input, target)
    return _try_kernel("smooth_l1_loss", (size_average, reduce), reduction, *operands, row=row, refusal=refusal)


@else_stock(F.huber_loss)
def huber_loss(
    input: Tensor,
    target: Tensor,
    reduction: str = "mean",
    delta: float = 1.0,
    weight: Tensor | None = None,
) -> Tensor | None:
    """weight (x - t)^2 / 2 where |x - t| < delta, else weight delta (|x - t| - delta / 2).

    As `torch.nn.functional.huber_loss`; its mean is over the elements.  Source: Huber, "Robust Estimation of a Location
    Parameter" (1964).
    """
    row, refusal = ("huber_loss", delta, 1.0), _threshold_refusal(delta)
    return _try_kernel("huber_loss", (None, None), reduction, input, target, weight, row=row, refusal=refusal)


@else_stock(F.binary_cross_entropy)
def binary_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor | None:
    """-weight (t log x + (1 - t) log(1 - x)), logarithms clamped at -100.

    As `torch.nn.functional.binary_cross_entropy`.  An input or target outside [0, 1] raises PyTorch's RuntimeError on
    the CPU, and a device assertion on CUDA.
    """
    return _try_kernel("binary_cross_entropy", (size_average, reduce), reduction, input, target, weight)


@else_stock(F.binary_cross_entropy_with_logits)
def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Tensor | None:
    """-weight (pos_weight t log sigmoid(x) + (1 - t) log(1 - sigmoid(x))), stable for any x.

    As `torch.nn.functional.binary_cross_entropy_with_logits`.
    """
    operands = (input, target, weight, pos_weight)
    return _try_kernel("binary_cross_entropy_with_logits", (size_average, reduce), reduction, *operands)


@else_stock(F.kl_div)
def kl_div(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    log_target: bool = False,
) -> Tensor | None:
    """t (log t - x), or exp(t) (t - x) with ``log_target``; x is a logarithm.  As `torch.nn.functional.kl_div`.

    "batchmean" divides the sum by the number of samples.  Source: Kullback and Leibler, "On Information and
    Sufficiency" (1951).
    """
    modern = size_average is None and reduce is None
    refusal = None if type(log_target) is bool else "log_target is not a bool"
    if not modern and type(reduction) is str and reduction == "batchmean":
        refusal = "deprecated arguments together with batchmean"
    row = ("kl_div", 1.0 if log_target is True else 0.0, 0.0)
    loss = _try_kernel("kl_div", (size_average, reduce), reduction, input, target, row=row, refusal=refusal)
    if loss is not None and modern and reduction == "mean" and not torch.compiler.is_compiling():
        warnings.warn(_KL_DIV_MEAN, stacklevel=2)
    return loss


_KL_DIV_MEAN = (
    "reduction: 'mean' divides the total loss by both the batch size and the support size."
    "'batchmean' divides only by the batch size, and aligns with the KL div math definition."
    "'mean' will be changed to behave the same as 'batchmean' in the next major release."
)
