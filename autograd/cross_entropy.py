"""Cross-entropy with the signature of ``torch.nn.functional.cross_entropy``.

Saves the logits, which their layer keeps anyway, and the log-sum-exp of each line, never probabilities.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels import cross_entropy as kernels
from ..kernels.base.launch import ACCUMULATOR, DeviceAssertionError
from . import stock as F
from .decisions import decided_once
from .dispatch import AUTOCAST_TYPES, PLAIN_TYPES, autocast_dtype, is_integer, or_stock, takes_kernel
from .function import Function
from .gradients import stock_gradients
from .loss_arguments import reduction_name, warn_of_deprecated
from .operators import given, operator

__all__ = ["cross_entropy"]


def _stock(
    x: Tensor, target: Tensor, weight: Tensor | None, reduction: str, ignore_index: int, smoothing: float
) -> Tensor:
    return F.cross_entropy(x, target, weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=smoothing)


def _fake_forward(x: Tensor, target: Tensor, _: object, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    reduction, _, smoothing, dtype = options
    logits = torch.empty_like(x)  # dense
    accumulator = ACCUMULATOR[x.dtype]
    shape = kernels.statistics_shape(logits, kernels.targets_of(x, target, smoothing))
    statistics = x.new_empty(shape, dtype=accumulator)
    if reduction == "none":
        loss = x.new_empty_strided(kernels.line_shape(logits.shape), kernels.line_strides(logits), dtype=dtype)
    else:
        loss = x.new_empty((), dtype=dtype)
    return loss, statistics, x.new_empty(kernels.weight_total_shape(reduction), dtype=torch.float64)


@operator(
    "cross_entropy(Tensor x, Tensor target, Tensor? weight, str reduction, int ignore_index, float smoothing,"
    " ScalarType dtype) -> (Tensor, Tensor, Tensor)",
    fake=_fake_forward,
)
def _forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    try:
        return kernels.cross_entropy_forward(*arguments)
    except DeviceAssertionError:
        loss = _stock(*arguments[:-1])  # raises the stock error
        return loss, loss.new_empty(0), loss.new_empty(())


def _fake_backward(g: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    dx, dtarget = (torch.empty_like(x) if needed else x.new_empty(0) for needed in rest[-2:])
    return dx, dtarget


@operator(
    "cross_entropy_backward(Tensor g, Tensor x, Tensor target, Tensor? weight, Tensor statistics, Tensor weight_total,"
    " str reduction, int ignore_index, float smoothing, bool needs_input, bool needs_target) -> (Tensor, Tensor)",
    fake=_fake_backward,
)
def _backward(*arguments: Any) -> tuple[Tensor, Tensor]:
    *others, needs_input, needs_target = arguments
    return kernels.cross_entropy_backward(*(*others, (needs_input, needs_target)))


class CrossEntropy(Function):
    """Saves the logits and, for each line, the log-sum-exp; where probabilities are targets, also those."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, target: Tensor, weight: Tensor | None, *options: Any) -> Tensor:
        loss: Tensor
        loss, statistics, weight_total = _forward(x, target, weight, *options)
        ctx.save_for_backward(x, target, weight, given(statistics), given(weight_total))
        ctx.arguments = options[:-1]  # reduction, ignored index and smoothing
        return loss

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, target, weight, statistics, weight_total = ctx.saved_tensors
        needed = ctx.needs_input_grad[:2]
        dx: Tensor | None
        dtarget: Tensor | None
        if torch.is_grad_enabled():
            dx, dtarget = stock_gradients(
                lambda x, target: _stock(x, target, weight, *ctx.arguments).to(g.dtype), (x, target), needed, g
            )
        else:
            if statistics is None:
                statistics = x.new_empty(0, dtype=ACCUMULATOR[x.dtype])
            if weight_total is None:
                weight_total = x.new_empty(0, dtype=torch.float64)
            dx, dtarget = _backward(g, x, target, weight, statistics, weight_total, *ctx.arguments, *needed)
        return dx if needed[0] else None, dtarget if needed[1] else None, None, None, None, None, None


@or_stock
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """-sum(weight q log softmax(x)) over the classes.  As `torch.nn.functional.cross_entropy`.

    ``input`` holds logits, (C), (N, C) or (N, C, d1, ...).  ``target`` holds class indices, int64, in the shape of the
    input without its classes, from which ``q`` is 1 at the target; or probabilities ``q`` in the shape and dtype of the
    input.  Label smoothing mixes ``q`` with 1 / C.  "mean" divides by the weights of the targets that aren't ignored,
    or by the number of probability distributions.

    Raises what PyTorch raises; for a class index out of bounds, IndexError on a CPU and a device assertion on a GPU.
    Source: Szegedy et al., "Rethinking the Inception Architecture for Computer Vision" (CVPR 2016), for the smoothing.
    """
    name = reduction_name(size_average, reduce, reduction)
    x, q = input, target
    low = isinstance(x, Tensor) and autocast_dtype(x) is not None and x.dtype in AUTOCAST_TYPES
    if low and isinstance(q, Tensor) and q.dtype in AUTOCAST_TYPES and q.dtype != x.dtype:
        x, q = x.float(), q.float()
    # Autocast computes the loss in float32, from logits as they are.
    loss: Tensor | None = _cross_entropy(x, q, weight, name, ignore_index, label_smoothing, low)
    if loss is None:
        return F.cross_entropy(input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing)
    warn_of_deprecated(size_average, reduce)
    return loss


def cross_entropy_in_float32(
    input: Tensor, target: Tensor, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    """cross_entropy(input.float(), target), without the copy: logits of 16 bits are widened in registers."""
    loss: Tensor | None = _cross_entropy(input, target, None, reduction, ignore_index, 0.0, True)
    if loss is None:
        return F.cross_entropy(input.float(), target, ignore_index=ignore_index, reduction=reduction)
    return loss


@decided_once
def _cross_entropy(x: Tensor, target: Tensor, weight: Tensor | None, *arguments: Any) -> Callable[..., Tensor | None]:
    """The loss by its kernels, or None; ``single``: in float32."""
    reduction, ignore_index, smoothing, single = arguments
    described = (target, weight, reduction, ignore_index, smoothing)
    if not takes_kernel("cross_entropy", x, refusal=lambda: refusal_of(x.shape, x, *described)):
        return lambda *_: None
    options = (reduction, ignore_index, float(smoothing), torch.float32 if single else x.dtype)
    differentiable = torch.is_grad_enabled()

    def compute(x: Tensor, target: Tensor, weight: Tensor | None, *_: object) -> Tensor:
        loss: Tensor = (
            CrossEntropy.apply(x, target, weight, *options)
            if differentiable
            else _forward(x, target, weight, *options)[0]
        )
        return loss

    return compute


def refusal_of(
    shape: Sequence[int],
    x: Tensor,
    target: object,
    weight: object,
    reduction: object,
    ignore_index: object,
    smoothing: object,
) -> str | None:
    """Why the kernels don't take such a loss of logits of this shape and of the dtype and device of ``x``, or None."""
    if not shape:
        return "no classes"
    if reduction not in ("none", "mean", "sum"):
        return "unknown reduction"
    if not is_integer(ignore_index):
        return "ignore_index is not an int"
    if not isinstance(smoothing, (float, int)) or not 0 <= smoothing <= 1:
        return "label_smoothing is not a number from 0 to 1"
    if type(target) is not Tensor or target.device != x.device or target.layout is not torch.strided:
        return "the target is not a plain tensor on the input's device"
    if target.shape == shape:
        if target.dtype != x.dtype or ignore_index >= 0:
            return "probabilities of another dtype, or with an ignore_index"
    elif target.dtype is not torch.int64 or tuple(target.shape) != kernels.line_shape(shape):
        return "the target holds neither int64 indices nor probabilities of the input's shape"
    if weight is None:
        return None
    if not isinstance(weight, Tensor) or type(weight) not in PLAIN_TYPES or weight.device != x.device:
        return "the weights are not a plain tensor on the input's device"
    if weight.dtype != x.dtype and not (autocast_dtype(x) is not None and weight.dtype in AUTOCAST_TYPES):
        return "the weights are of another dtype"
    if weight.shape != (shape[kernels.class_dim(shape)],):
        return "the weights are not one for each class"
    if weight.requires_grad and torch.is_grad_enabled():
        return "the weights require gradients"
    return None
