"""An output layer and its cross-entropy in one, with the signature of ``torch.nn.functional.linear_cross_entropy``.

The logits exist a chunk at a time.  Gradients are computed on the way, for an upstream gradient of 1, by which the
backward pass multiplies them; but where each sample has its own (``reduction="none"``), and in float16, whose range the
upstream gradient (a `torch.amp.GradScaler`'s) is there to save, the backward pass computes the logits again.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import Function

from ..kernels.base.launch import ACCUMULATOR, DeviceAssertionError
from . import stock as F
from .chunked_cross_entropy import Options, chunked_cross_entropy
from .cross_entropy import refusal_of
from .dispatch import (
    AUTOCAST_TYPES,
    PLAIN_TYPES,
    autocast_dtype,
    in_low_precision,
    or_stock,
    takes_kernel,
    transform_refusal,
)
from .gradients import stock_gradients
from .operators import operator

if TYPE_CHECKING:
    from torch.nn import LinearCrossEntropyOptions

__all__ = ["linear_cross_entropy"]


def _fake(x: Tensor, linear_weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *_, reduction, _, _, dtype, needs_input, needs_weight, needs_bias = rest
    shape = (x.shape[0], *linear_weight.shape[1:-1]) if reduction == "none" else ()
    return (
        x.new_empty(shape, dtype=dtype),
        x.new_empty(x.shape if needs_input else 0),
        x.new_empty(linear_weight.shape if needs_weight else 0),
        x.new_empty(linear_weight.shape[:-1] if needs_bias else 0),
    )


@operator(
    "linear_cross_entropy(Tensor x, Tensor linear_weight, Tensor? linear_bias, Tensor target, Tensor? weight,"
    " Tensor? g, str reduction, int ignore_index, float smoothing, ScalarType dtype, bool needs_input,"
    " bool needs_weight, bool needs_bias) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake,
    flops=lambda x, linear_weight, *rest: 2 * x.shape[0] * linear_weight.numel() * (1 + sum(rest[-3:-1])),
    planned=False,  # products obey PyTorch's switches of precision
)
def _by_kernels(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, linear_weight, linear_bias, target, weight, _, _, ignore_index, *_ = arguments
    try:
        loss, *gradients = _in_chunks(*arguments, by_kernels=True)
    except DeviceAssertionError:
        logits = _logits(x, linear_weight, linear_bias)
        F.cross_entropy(logits, target, weight, ignore_index=ignore_index)  # raises the stock error
        raise
    dx, dweight, dbias = (x.new_empty(0) if gradient is None else gradient for gradient in gradients)
    return loss, dx, dweight, dbias


def _by_stock(*arguments: Any) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The same chunks, each by PyTorch's own operators."""
    return _in_chunks(*arguments, by_kernels=False)


def _in_chunks(
    x: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    g: Tensor | None,
    *rest: Any,
    by_kernels: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Loss and gradients of the operator's arguments."""
    reduction, ignore_index, smoothing, dtype, *needed = rest
    options = Options(weight, reduction, ignore_index, smoothing)
    return chunked_cross_entropy(
        x, linear_weight, linear_bias, target, g, options, dtype, tuple(needed), by_kernels=by_kernels
    )


class LinearCrossEntropy(Function):
    """Saves the operands, and for a reduced loss their gradients for an upstream gradient of 1."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        linear_weight: Tensor,
        linear_bias: Tensor | None,
        target: Tensor,
        weight: Tensor | None,
        *options: Any,
    ) -> Tensor:
        reduction, ignore_index, smoothing, dtype, kernel = options
        ctx.run = _by_kernels if kernel else _by_stock
        ctx.arguments = (reduction, ignore_index, smoothing)
        ctx.gradients_in_forward = reduction != "none" and x.dtype is not torch.float16
        needed = [needs and ctx.gradients_in_forward for needs in ctx.needs_input_grad[:3]]
        operands = (x, linear_weight, linear_bias, target, weight)
        loss, *gradients = ctx.run(*operands, None, *ctx.arguments, dtype, *needed)
        kept = zip(gradients, needed, strict=True) if ctx.gradients_in_forward else ()
        ctx.save_for_backward(*operands, *(gradient if needs else None for gradient, needs in kept))
        result: Tensor = loss
        return result

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, linear_weight, linear_bias, target, weight, *gradients = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            gradients = _differentiable_gradients(ctx, g)
        elif ctx.gradients_in_forward:
            gradients = [gradient * g if needs else None for gradient, needs in zip(gradients, needed, strict=True)]
        else:
            _, *gradients = ctx.run(x, linear_weight, linear_bias, target, weight, g, *ctx.arguments, g.dtype, *needed)
        gradients = [gradient if needs else None for gradient, needs in zip(gradients, needed, strict=True)]
        return *gradients, None, None, None, None, None, None, None


def _differentiable_gradients(ctx: Any, g: Tensor) -> list[Tensor | None]:
    """Gradients of input, weight and bias from stock operators, with all logits at once."""
    *operands, target, weight = ctx.saved_tensors[:5]
    reduction, ignore_index, smoothing = ctx.arguments
    options: Any = {"ignore_index": ignore_index, "reduction": reduction, "label_smoothing": smoothing}

    def loss(*operands: Any) -> Tensor:
        return F.cross_entropy(_logits(*operands), target, weight, **options).to(g.dtype)

    return stock_gradients(loss, operands, ctx.needs_input_grad[:3], g)


def _logits(x: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> Tensor:
    """(N, C, d1, ...) for x (N, features), linear_weight (C, d1, ..., features), linear_bias (C, d1, ...)."""
    flat = F.linear(x, linear_weight.flatten(0, -2), None if linear_bias is None else linear_bias.flatten())
    return flat.reshape(*x.shape[:-1], *linear_weight.shape[:-1])


@or_stock
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: "LinearCrossEntropyOptions | None" = None,
) -> Tensor:
    """cross_entropy(linear(input, linear_weight, linear_bias), target), without ever holding all logits.

    As `torch.nn.functional.linear_cross_entropy` (torch 2.13), also with older PyTorch.  ``input`` is (features) or
    (N, features), ``linear_weight`` (C, features) or (C, d1, ..., features), ``linear_bias`` its shape without the
    features; the other arguments are those of `cross_entropy`, with the logits (N, C, d1, ...).  ``ignore_index``
    defaults to -100 for class indices, and mustn't be given for probabilities.  Chunks follow from the shapes;
    ``options`` asks for PyTorch's own.

    Raises what PyTorch raises.
    """
    x, matrix, vector = in_low_precision(input, linear_weight, linear_bias)
    operands = (x, matrix) if vector is None else (x, matrix, vector)
    ignored = -100 if ignore_index is None else ignore_index
    described = (x, matrix, vector, target, weight, reduction, ignore_index, label_smoothing, options)
    kernel = takes_kernel("linear_cross_entropy", *operands, refusal=lambda: _refusal(*described))
    if not kernel and not (_takes_chunks(*operands) and _refusal(*described) is None):
        return _stock(
            *(input, linear_weight, target),
            linear_bias=linear_bias,
            weight=weight,
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            options=options,
        )
    low = autocast_dtype(x) is not None and x.dtype in AUTOCAST_TYPES
    dtype = torch.float32 if low else x.dtype
    batched = x.dim() == 2
    if not batched:
        x, target = x[None], target[None]
    if not torch.is_grad_enabled():
        # Else a function takes it that the parameters' gradients are needed, and computes them with the loss.
        x, matrix, vector = (None if operand is None else operand.detach() for operand in (x, matrix, vector))
    loss: Tensor = LinearCrossEntropy.apply(
        *(x, matrix, vector, target, weight),
        *(reduction, ignored, float(label_smoothing), dtype, kernel),
    )
    return loss if batched or reduction != "none" else loss[0]


def _refusal(
    x: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: object,
    weight: object,
    reduction: object,
    ignore_index: object,
    smoothing: object,
    options: object,
) -> str | None:
    """Why chunks don't take these arguments, or None."""
    if options is not None:
        return "options ask for PyTorch's own chunks"
    if x.dim() not in (1, 2) or linear_weight.dim() < 2 or x.shape[-1] != linear_weight.shape[-1]:
        return "input and linear_weight don't fit"
    if not linear_weight.numel():
        return "no classes"
    if x.dim() == 1 and linear_weight.dim() > 2:
        return "an unbatched input with a K-dimensional loss"
    if linear_bias is not None and linear_bias.shape != linear_weight.shape[:-1]:
        return "linear_bias doesn't fit linear_weight"
    shape = torch.Size((*x.shape[:-1], *linear_weight.shape[:-1]))
    if isinstance(target, Tensor) and target.shape == shape:
        if ignore_index is not None:
            return "ignore_index for probabilities"
        if target.requires_grad and torch.is_grad_enabled():
            return "the probabilities require gradients"
    ignored = -100 if ignore_index is None else ignore_index
    return refusal_of(shape, x, target, weight, reduction, ignored, smoothing)


def _takes_chunks(*operands: Tensor) -> bool:
    """Whether stock operators can work through chunks: on any device, but nothing must look inside."""
    first = operands[0]
    return (
        transform_refusal() is None
        and not torch.compiler.is_compiling()
        and all(type(operand) in PLAIN_TYPES and operand.layout is torch.strided for operand in operands)
        and first.device.type != "meta"
        and first.dtype in ACCUMULATOR
        and all(operand.numel() for operand in operands)
        and all(operand.dtype == first.dtype and operand.device == first.device for operand in operands)
    )


def _stock(input: Tensor, linear_weight: Tensor, target: Tensor, **options: Any) -> Tensor:
    if hasattr(F, "linear_cross_entropy"):
        return F.linear_cross_entropy(input, linear_weight, target, **options)
    return composed(input, linear_weight, target, **options)


def composed(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int | None,
    label_smoothing: float,
    options: object,
) -> Tensor:
    """What torch 2.13 computes and raises, for older versions."""
    if options is not None:
        raise RuntimeError(f"options of linear_cross_entropy need torch 2.13; this is {torch.__version__}")
    if input.dim() not in (1, 2) or linear_weight.dim() < 2 or input.shape[-1] != linear_weight.shape[-1]:
        raise RuntimeError(
            "expected input (features) or (N, features) and linear_weight (C, d1, ..., features),"
            f" got {tuple(input.shape)} and {tuple(linear_weight.shape)}"
        )
    if linear_bias is not None and linear_bias.shape != linear_weight.shape[:-1]:
        raise RuntimeError(
            f"expected linear_bias of shape {tuple(linear_weight.shape[:-1])}, got {tuple(linear_bias.shape)}"
        )
    if input.dim() == 1 and linear_weight.dim() > 2:
        raise RuntimeError("a K-dimensional loss needs batched input (N, features)")
    logits = _logits(input, linear_weight, linear_bias)
    if target.shape == logits.shape and ignore_index is not None:
        raise RuntimeError("ignore_index can't be given for probabilities")
    return F.cross_entropy(
        logits,
        target,
        weight,
        reduction=reduction,
        ignore_index=-100 if ignore_index is None else ignore_index,
        label_smoothing=label_smoothing,
    )
