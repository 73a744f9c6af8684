"""Convolution with the signatures of ``torch.nn.functional``, and fused with bias, activation and max pooling.

A plain convolution is cuDNN's: no kernel here was measured faster.  With an activation or pooling behind it, it is made
by a single kernel together with them, or the bias, the activation and the pooling are one pass over cuDNN's result,
which is then forgotten (`fusednn.kernels.conv.takes_single` chooses).  Either way the backward pass needs the code of
each pooling window (see `fusednn.kernels.pool_window`), and makes from it, in one kernel, the gradient of the
convolution's result and that of the bias; cuDNN does the rest.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from ..kernels import conv as kernels
from ..kernels.conv import conv_size
from ..kernels.functions.activation import Activated, activated
from ..kernels.pool_window import POINT, Pooled, Window, images, kept_beside_code
from . import stock as F
from .activation import resolve_activation
from .anchors import anchors_of
from .batch_norm import apply_activation
from .decisions import decided_once
from .dispatch import in_low_precision, or_stock, takes_kernel
from .onednn import sound_convolution
from .operators import given, operator
from .pool import (
    Pair,
    activate_,
    activated_pool_gradient,
    code_or_empty,
    operator_window,
    pairs,
    pool,
    pool_backward,
    window_of,
    window_refusal,
)

__all__ = ["conv1d", "conv2d", "conv_act_pool2d", "conv_size", "conv_statistics2d"]


class Convolution(NamedTuple):
    """The arguments of a convolution besides its operands; each pair is (along the height, along the width)."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int


# --- Operators --------------------------------------------------------------------------------------------------------


def _flops(x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int]) -> int:
    height, width = kernels.conv_size(x.shape, weight.shape, tuple(stride), tuple(padding))
    return 2 * x.shape[0] * height * width * weight.numel()


def _conv_pool(function: Callable[..., Pooled], x: Tensor, weight: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """``function`` of an operator's arguments."""
    *given, stride, padding, name, a, b, kernel_size, pool_stride, pool_padding, keeps = arguments
    window = operator_window(kernel_size, pool_stride, pool_padding, (1, 1), False)
    results = function(*(x, weight, *given, tuple(stride), tuple(padding), activated(name, a, b), window), keeps=keeps)
    return results.y, results.code, results.pre_activation


@operator(
    "conv_pool(Tensor x, Tensor weight, Tensor? bias, int[] stride, int[] padding, str name, float a, float b,"
    " int[] kernel_size, int[] pool_stride, int[] pool_padding, bool keeps) -> (Tensor, Tensor, Tensor)",
    fake=lambda x, weight, bias, *arguments: _conv_pool(kernels.conv_pooled_like, x, weight, *arguments),
    flops=lambda x, weight, bias, stride, padding, *_: _flops(x, weight, stride, padding),
    planned=False,  # products obey PyTorch's switches of precision
)
def conv_pool(x: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
    return _conv_pool(kernels.conv_pool_forward, x, weight, bias, *arguments)


@operator(
    "conv_statistics(Tensor x, Tensor weight, Tensor? bias, int[] stride, int[] padding) -> (Tensor, Tensor)",
    fake=lambda x, weight, bias, stride, padding: kernels.statistics_like(x, weight, tuple(stride), tuple(padding)),
    flops=lambda x, weight, bias, stride, padding: _flops(x, weight, stride, padding),
    planned=False,  # products obey PyTorch's switches of precision
)
def _conv_statistics(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any
) -> tuple[Tensor, Tensor]:
    return kernels.conv_statistics(x, weight, bias, tuple(stride), tuple(padding))


# --- Gradients --------------------------------------------------------------------------------------------------------


_convolution_backward = torch.ops.aten.convolution_backward.default

#: What is kept beside a code where gradients are linear, and don't depend on what they are of.
_LINEAR = ("nothing", "mask")


class ConvActPool(Function):
    """Saves the operands of the convolution and the code of each window.

    Beside these the maxima before the activation, or without pooling the result, where its gradient needs them.  The
    maxima are a result, too, so that second derivatives reach all operands by way of them, and neither the bias nor the
    residual is saved; where bits suffice ``anchors`` are those of the two.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        convolution: Convolution,
        activation: Activated,
        window: Window,
        anchors: tuple[Tensor, ...],
    ) -> tuple[Tensor, Tensor]:
        y, code, pre_activation, layout = _forward(
            x, weight, bias, residual, convolution, activation, window, keeps=True
        )
        saved = {"output": y, "input": pre_activation}.get(kept_beside_code(activation.row, window.fixed))
        ctx.save_for_backward(x, weight, given(code), saved)
        ctx.arguments = (convolution, activation, window)
        ctx.layout = layout
        ctx.anchors = anchors
        ctx.set_materialize_grads(False)
        return y, pre_activation

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, g_pre_activation: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, code, saved = ctx.saved_tensors
        convolution, activation, window = ctx.arguments
        x_needed, weight_needed, bias_needed, residual_needed, *_ = ctx.needs_input_grad
        dx, dw, db = None, None, None
        once = torch.compiler.is_compiling() or (g_pre_activation is None and not torch.is_grad_enabled())
        if g is not None and once:  # compiled code has no second derivatives
            rest = (*ctx.layout, *activation.arguments, *window, bias_needed)
            dz, db = pool_backward(g, code_or_empty(code, g), saved, *rest)
            db = db.to(dz.dtype)
        else:
            anchors = (*ctx.anchors, *(() if saved is not None else anchors_of(x, weight)))
            dz = activated_pool_gradient(g, g_pre_activation, code, saved, ctx.layout, activation, window, anchors)
            db = dz.sum((0, 2, 3)) if bias_needed and dz is not None else None
        if dz is not None and (x_needed or weight_needed):
            stride, padding, dilation, groups = convolution
            with sound_convolution(weight, stride):
                dx, dw, _ = _convolution_backward(
                    *(dz, x, weight, None, stride, padding, dilation, False, (0, 0), groups),
                    (x_needed, weight_needed, False),
                )
        return dx, dw, db if bias_needed else None, dz if residual_needed else None, None, None, None, None


class ConvStatistics(Function):
    """A convolution, and the partial statistics of its channels, which aren't differentiated."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, convolution: Convolution
    ) -> tuple[Tensor, Tensor]:
        z, partial = _conv_statistics(x, weight, bias, convolution.stride, convolution.padding)
        ctx.save_for_backward(x, weight)
        ctx.convolution = convolution
        ctx.mark_non_differentiable(partial)
        ctx.set_materialize_grads(False)
        return z, partial

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        if g is None:
            return None, None, None, None
        x, weight = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.convolution
        with sound_convolution(weight, stride):
            dx, dw, db = _convolution_backward(
                *(g, x, weight, [weight.shape[0]], stride, padding, dilation, False, (0, 0), groups),
                ctx.needs_input_grad[:3],
            )
        return dx, dw, db, None


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    convolution: Convolution,
    activation: Activated,
    window: Window,
    *,
    keeps: bool,
) -> tuple[Tensor, Tensor, Tensor, tuple[Sequence[int], bool]]:
    """The result; the windows' codes, and the maxima before the activation, where these are kept; and the layout of the
    convolution's result: its size, and whether channels are last.
    """
    stride, padding, dilation, groups = convolution
    if residual is None and kernels.takes_single(x, weight, dilation, groups, window):
        y, code, pre_activation = conv_pool(x, weight, bias, stride, padding, *activation.arguments, *window[:3], keeps)
        return y, code, pre_activation, (kernels.conv_size(x.shape, weight.shape, stride, padding), True)
    z, channels_last = images(F.conv2d(x, weight, None, *convolution))
    layout = (z.shape[2:], channels_last)
    if window == POINT:
        code, pre_activation = activate_(z, residual, bias, *activation.arguments, keeps)
        return z, code, pre_activation, layout
    y, code, pre_activation, _ = pool(z, residual, None, None, bias, *activation.arguments, *window, keeps, False)
    return y, code, pre_activation, layout


# --- Functions --------------------------------------------------------------------------------------------------------

_CUDNN = "cuDNN: no kernel of a plain convolution was measured faster"


@or_stock
def conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
    groups: int = 1,
) -> Tensor:
    """The cross-correlation of (N, C, L) or (C, L) with filters (O, C / groups, K).  `torch.nn.functional.conv1d`.

    cuDNN computes it.
    """
    takes_kernel("conv1d", input, refusal=lambda: _CUDNN)
    return F.conv1d(input, weight, bias, stride, padding, dilation, groups)


@or_stock
def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
    groups: int = 1,
) -> Tensor:
    """The cross-correlation of (N, C, H, W) or (C, H, W) with filters (O, C / groups, K, L).
    `torch.nn.functional.conv2d`.

    cuDNN computes it.
    """
    takes_kernel("conv2d", input, refusal=lambda: _CUDNN)
    return F.conv2d(input, weight, bias, stride, padding, dilation, groups)


@or_stock
def conv_act_pool2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
    groups: int = 1,
    *,
    activation: str | None = "relu",
    activation_parameters: Sequence[float] = (),
    pool_size: Pair | None = None,
    pool_stride: Pair | None = None,
    pool_padding: Pair = 0,
    residual: Tensor | None = None,
) -> Tensor:
    """max_pool(activation(conv(x) + bias + residual)), in one.

    Arguments as of `conv2d`, and:

    activation: a name of `fusednn.autograd`'s activations, ``"gelu_tanh"``, or None.  Raises ValueError for others.
    activation_parameters: its scalar parameters in PyTorch's order; its defaults, where they are missing.
    pool_size, pool_stride, pool_padding: as of `max_pool2d`; a ``pool_size`` of None leaves the pooling out.
    residual: added before the activation; of the shape of the convolution's result.

    Only the pooled result is written, and the code of each window, which the backward pass needs: at most a byte, a bit
    where there is no pooling.  Autocast computes it in its low precision, as it does convolutions.
    """
    operands = in_low_precision(input, weight, bias, residual)
    sizes = (stride, padding, dilation, groups, pool_size, pool_stride, pool_padding)
    y: Tensor = _conv_act_pool(*operands, *sizes, activation, *activation_parameters)
    return y


@decided_once
def _conv_act_pool(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Pair,
    padding: Pair | str,
    dilation: Pair,
    groups: int,
    pool_size: Pair | None,
    pool_stride: Pair | None,
    pool_padding: Pair,
    activation: str | None,
    *parameters: float,
) -> Callable[..., Tensor]:
    """`conv_act_pool2d` of operands in the precision that they are computed in, by its kernels or stock operators."""
    resolved = resolve_activation(activation, parameters)
    window = POINT if pool_size is None else window_of(2, pool_size, pool_stride, pool_padding, 1, False)
    odd, border = _numbers(weight, stride, padding, dilation)
    convolution = _convolution(stride, border, dilation, groups)
    described = (input, odd, weight, bias, residual, convolution, resolved, window)
    given = [input, weight, *(operand for operand in (bias, residual) if operand is not None)]
    if not takes_kernel("conv_act_pool2d", *given, refusal=lambda: _refusal(*described)):

        def chained(input: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, *_: object) -> Tensor:
            y = apply_activation(F.conv2d(input, weight, bias, stride, padding, dilation, groups), residual, resolved)
            return y if pool_size is None else F.max_pool2d(y, pool_size, pool_stride, pool_padding)

        return chained
    assert convolution is not None
    assert window is not None
    options = (convolution, resolved, window)
    pads, batched = any(odd), input.dim() == 4
    differentiable = torch.is_grad_enabled() and any(operand.requires_grad for operand in given)
    anchored = kept_beside_code(resolved.row, window.fixed) in _LINEAR

    def together(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, *_: object) -> Tensor:
        x = F.pad(x, odd) if pads else x
        if not batched:
            x, residual = x.unsqueeze(0), None if residual is None else residual.unsqueeze(0)
        y: Tensor
        if differentiable:
            anchors = anchors_of(bias, residual) if anchored else ()
            y, _pre_activation = ConvActPool.apply(x, weight, bias, residual, *options, anchors)
        else:
            y, *_results = _forward(x, weight, bias, residual, *options, keeps=False)
        return y if batched else y.squeeze(0)

    return together


def conv_statistics2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair | str,
    dilation: Pair,
    groups: int,
) -> tuple[Tensor, Tensor | None]:
    """`conv2d`, and the partial statistics of its channels, where a kernel makes both; else None."""
    operands = in_low_precision(input, weight, bias)
    geometry: Any = (stride, padding, dilation, groups)
    results: tuple[Tensor, Tensor | None] | None
    results = _statistics2d(*operands, *geometry, kernels.precision(operands[0]))
    return (F.conv2d(input, weight, bias, *geometry), None) if results is None else results


@decided_once
def _statistics2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair | str,
    dilation: Pair,
    groups: int,
    precision: str,
) -> Callable[..., tuple[Tensor, Tensor] | None]:
    """`conv_statistics2d` by its kernel, or None; PyTorch's switches of ``precision`` decide, too."""
    odd, border = _numbers(weight, stride, padding, dilation)
    convolution = _convolution(stride, border, dilation, groups)
    described = (x, odd, weight, bias, None, convolution, resolve_activation("relu"), POINT)

    def refusal() -> str | None:
        if reason := _refusal(*described):
            return reason
        if convolution is None or x.dim() != 4:
            return "not a batch of images"
        single = kernels.takes_single(x, weight, convolution.dilation, convolution.groups, POINT)
        return None if single else _CUDNN

    if not takes_kernel("conv2d", *((x, weight) if bias is None else (x, weight, bias)), refusal=refusal):
        return lambda *_: None
    pads = any(odd)

    def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, *_: object) -> tuple[Tensor, Tensor]:
        z: Tensor
        partial: Tensor
        z, partial = ConvStatistics.apply(F.pad(x, odd) if pads else x, weight, bias, convolution)
        return z, partial

    return convolve


_EVEN = (0, 0, 0, 0)


def _numbers(weight: Any, stride: Any, padding: Any, dilation: Any) -> tuple[tuple[int, int, int, int], Any]:
    """A padding in words as numbers: what `pad` adds first, where the two ends differ, and the padding that is left."""
    if padding == "valid":
        return _EVEN, 0
    if padding != "same" or not isinstance(weight, Tensor) or weight.dim() != 4:
        return _EVEN, padding
    spread = pairs(dilation, 2)
    if pairs(stride, 2) != (1, 1) or spread is None:
        return _EVEN, None
    height, width = (step * (size - 1) for step, size in zip(spread, weight.shape[2:], strict=True))
    return (0, width % 2, 0, height % 2), (height // 2, width // 2)


def _convolution(stride: Any, padding: Any, dilation: Any, groups: Any) -> Convolution | None:
    """The arguments, or None where one isn't what PyTorch takes."""
    found = [pairs(argument, 2) for argument in (stride, padding, dilation)]
    if any(pair is None for pair in found) or type(groups) is not int:
        return None
    step, border, spread = (pair for pair in found if pair is not None)
    return Convolution(step, border, spread, groups)


def _refusal(
    input: Tensor,
    odd: tuple[int, int, int, int],
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    convolution: Convolution | None,
    activation: Activated,
    window: Window | None,
) -> str | None:
    """Why the kernels don't take these arguments, or None."""
    if convolution is None or window is None:
        return "a size is not an integer for each direction"
    if activation.saves == "nothing" and residual is None and window == POINT:
        return _CUDNN
    if min(*convolution.stride, *convolution.dilation, convolution.groups) < 1 or min(convolution.padding) < 0:
        return "a size of the convolution is not positive"
    if input.dim() not in (3, 4) or weight.dim() != 4 or input.numel() == 0 or weight.numel() == 0:
        return "not a batch of images and their filters"
    filters, channels, *_ = weight.shape
    if input.shape[-3] != channels * convolution.groups or filters % convolution.groups:
        return "the filters don't fit the channels"
    if bias is not None and bias.shape != (filters,):
        return "the bias is not one for each filter"
    padded = (*input.shape[:-2], input.shape[-2] + odd[3], input.shape[-1] + odd[1])
    size = kernels.conv_size(padded, weight.shape, *convolution[:3])
    if min(size) < 1:
        return "the image is smaller than the filter"
    if residual is not None and residual.shape != (*input.shape[:-3], filters, *size):
        return "the residual has another shape"
    return activation.refusal() or window_refusal(window, *size, masked=activation.saves == "mask")
