"""Convolution with the signatures of ``torch.nn.functional``, and fused with bias, activation and max pooling.

A plain convolution is cuDNN's: no kernel here was measured faster.  With an activation or pooling behind it, it is made
by a single kernel together with them, or the bias, the activation and the pooling are one pass over cuDNN's result,
which is then forgotten (`fusednn.kernels.conv.takes_single` chooses).  Either way the backward pass needs the code of
each pooling window (see `fusednn.kernels.pool_window`), and makes from it, in one kernel, the gradient of the
convolution's result and that of the bias; cuDNN does the rest.

Volumes, and transposed convolutions, differ in the product alone.  What has one direction is an image of one line, as
it is to PyTorch.
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from ..kernels import conv as kernels
from ..kernels.functions.activation import Activated, activated
from ..kernels.pool_window import POINT, Pooled, Window, images, kept_beside_code, point
from . import stock as F
from .activation import resolve_activation
from .anchors import anchors_of
from .batch_norm import apply_activation
from .convolution import Convolution, convolution_of, padding_of, stock_convolution
from .decisions import decided_once
from .dispatch import in_low_precision, takes_kernel
from .function import Function
from .inductor import divides
from .namesakes import named
from .operators import given, operator
from .pool import (
    Sizes,
    activate_,
    activated_pool_gradient,
    activation_again,
    code_or_empty,
    operator_window,
    pool,
    pool_backward,
    squeezed,
    window_of,
    window_refusal,
)

__all__ = [
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_act_pool",
    "conv_act_pool2d",
    "conv_statistics",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
]


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
    def recipe(ctx: Any) -> Callable[..., Tensor] | None:
        _, *of_result = ctx.arguments
        return activation_again(*of_result)

    #: Of what is saved: neither the images nor the filters.
    recipe_takes = (3,)

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
            db = dz.sum([dim for dim in range(dz.dim()) if dim != 1]) if bias_needed and dz is not None else None
        if dz is not None and (x_needed or weight_needed):
            dx, dw, _ = convolution.gradients(dz, x, weight, (x_needed, weight_needed, False))
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
        dx, dw, db = ctx.convolution.gradients(g, x, weight, ctx.needs_input_grad[:3], bias=weight.shape[:1])
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
    if residual is None and _takes_single(x, weight, convolution, window):
        sizes = (convolution.stride, convolution.padding)
        y, code, pre_activation = conv_pool(x, weight, bias, *sizes, *activation.arguments, *window[:3], keeps)
        return y, code, pre_activation, (convolution.size(x.shape[2:], weight.shape[2:]), True)
    z, channels_last = images(convolution.product(x, weight))
    layout = (z.shape[2:], channels_last)
    if window.is_point:
        code, pre_activation = activate_(z, residual, bias, *activation.arguments, keeps)
        return z, code, pre_activation, layout
    y, code, pre_activation, _ = pool(
        z, residual, None, None, None, bias, 0.0, *activation.arguments, *window, keeps, False
    )
    return y, code, pre_activation, layout


def _takes_single(x: Tensor, weight: Tensor, convolution: Convolution, window: Window) -> bool:
    if convolution.output_padding is not None:
        return False
    return kernels.takes_single(x, weight, convolution.dilation, convolution.groups, window)


# --- Functions --------------------------------------------------------------------------------------------------------

_CUDNN = "cuDNN: no kernel of a plain convolution was measured faster"


#: A function with the signature of the stock one that it stands for.
_Stock = TypeVar("_Stock", bound=Callable[..., Tensor])


def _convolution(stock: _Stock, size: str, taps: str) -> _Stock:
    """The namesake of ``stock``, by which observers are told of it, for images and filters of these sizes."""
    name = stock.__name__

    def convolve(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Sizes = 1,
        padding: Sizes | str = 0,
        dilation: Sizes = 1,
        groups: int = 1,
    ) -> Tensor:
        takes_kernel(name, input, refusal=lambda: _CUDNN)
        return stock(input, weight, bias, stride, padding, dilation, groups)

    doc = f"""The cross-correlation of (N, C, {size}) or (C, {size}) with filters (O, C / groups, {taps}).
    `torch.nn.functional.{name}`.

    cuDNN computes it.
    """
    return cast(_Stock, named(convolve, __name__, name, doc))


def _transposed(stock: _Stock, size: str, taps: str) -> _Stock:
    """`_convolution` of a transposed one."""
    name = stock.__name__

    def convolve(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Sizes = 1,
        padding: Sizes = 0,
        output_padding: Sizes = 0,
        groups: int = 1,
        dilation: Sizes = 1,
    ) -> Tensor:
        takes_kernel(name, input, refusal=lambda: _CUDNN)
        return stock(input, weight, bias, stride, padding, output_padding, groups, dilation)

    doc = f"""What a convolution's gradient is of its result: (N, C, {size}) or (C, {size}) with filters
    (C, O / groups, {taps}).  `torch.nn.functional.{name}`.

    cuDNN computes it.
    """
    return cast(_Stock, named(convolve, __name__, name, doc))


conv1d = _convolution(F.conv1d, "L", "K")
conv2d = _convolution(F.conv2d, "H, W", "K, L")
conv3d = _convolution(F.conv3d, "D, H, W", "J, K, L")
conv_transpose1d = _transposed(F.conv_transpose1d, "L", "K")
conv_transpose2d = _transposed(F.conv_transpose2d, "H, W", "K, L")
conv_transpose3d = _transposed(F.conv_transpose3d, "D, H, W", "J, K, L")

#: By the number of directions.
_POOLINGS = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


def conv_act_pool2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    *,
    activation: str | None = "relu",
    activation_parameters: Sequence[float] = (),
    pool_size: Sizes | None = None,
    pool_stride: Sizes | None = None,
    pool_padding: Sizes = 0,
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
    options: dict[str, Any] = {"activation": activation, "activation_parameters": activation_parameters}
    options |= {"pool_size": pool_size, "pool_stride": pool_stride, "pool_padding": pool_padding}
    geometry = (stride, padding, dilation, groups, None)
    return conv_act_pool(2, input, weight, bias, *geometry, residual=residual, **options)


def conv_act_pool(
    directions: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *geometry: Any,
    activation: str | None,
    activation_parameters: Sequence[float],
    pool_size: Any = None,
    pool_stride: Any = None,
    pool_padding: Any = 0,
    residual: Tensor | None = None,
) -> Tensor:
    """`conv_act_pool2d` for so many directions; the ``geometry`` is all that of `stock_convolution`."""
    operands = in_low_precision(input, weight, bias, residual)
    pooling = (pool_size, pool_stride, pool_padding)
    y: Tensor = _conv_act_pool(*operands, directions, *geometry, *pooling, activation, *activation_parameters)
    return y


@decided_once
def _conv_act_pool(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    directions: int,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    output_padding: Any,
    pool_size: Any,
    pool_stride: Any,
    pool_padding: Any,
    activation: str | None,
    *parameters: float,
) -> Callable[..., Tensor]:
    """`conv_act_pool` of operands in the precision that they are computed in, by its kernels or stock operators."""
    resolved = resolve_activation(activation, parameters)
    window: Window | None = point(max(directions, 2))
    if pool_size is not None:
        window = window_of(directions, pool_size, pool_stride, pool_padding, 1, False)
    odd, border = padding_of(directions, weight, stride, padding, dilation)
    convolution = convolution_of(directions, stride, border, dilation, groups, output_padding)
    described = (directions, input, odd, weight, bias, residual, convolution, resolved, window)
    given = [input, weight, *(operand for operand in (bias, residual) if operand is not None)]
    name = f"conv_act{directions}d" if pool_size is None else f"conv_act_pool{directions}d"
    if not takes_kernel(
        name,
        *given,
        refusal=lambda: _refusal(*described),
        outdoes_compiler=lambda: _outdoes_compiler(directions, input, weight, convolution, resolved),
    ):
        arguments = (stride, padding, dilation, groups, output_padding)

        def chained(input: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, *_: object) -> Tensor:
            y = stock_convolution(directions, input, weight, bias, *arguments)
            y = apply_activation(y, residual, resolved)
            return y if pool_size is None else _POOLINGS[directions](y, pool_size, pool_stride, pool_padding)

        return chained
    assert convolution is not None
    assert window is not None
    options = (convolution, resolved, window)
    pads, lines, unbatched = any(odd), directions == 1, input.dim() == directions + 1
    differentiable = torch.is_grad_enabled() and any(operand.requires_grad for operand in given)
    anchored = kept_beside_code(resolved.row, window.fixed) in _LINEAR

    def together(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, *_: object) -> Tensor:
        x = F.pad(x, odd) if pads else x
        if unbatched:
            x, residual = x.unsqueeze(0), None if residual is None else residual.unsqueeze(0)
        if lines:
            x, weight = x.unsqueeze(2), weight.unsqueeze(2)
            residual = None if residual is None else residual.unsqueeze(2)
        y: Tensor
        if differentiable:
            anchors = anchors_of(bias, residual) if anchored else ()
            y, _pre_activation = ConvActPool.apply(x, weight, bias, residual, *options, anchors)
        else:
            y, *_results = _forward(x, weight, bias, residual, *options, keeps=False)
        return squeezed(y, lines, unbatched, tracked=differentiable)

    return together


def _outdoes_compiler(
    directions: int, input: Tensor, weight: Tensor, convolution: Convolution | None, activation: Activated
) -> bool:
    """Whether with the activation alone ours moves less than compiled code, in no more launches.

    It keeps bits, where that keeps booleans or the result; the bias's gradient takes it a second launch, and that where
    it sums up in parts.
    """
    batched = {input.dim(), weight.dim()} == {directions + 2}
    if not batched or convolution is None or min(convolution.stride) < 1 or activation.saves != "mask":
        return False
    filters = weight.shape[0] if convolution.output_padding is None else weight.shape[1] * convolution.groups
    return divides(filters, filters * input.shape[0] * prod(convolution.size(input.shape[2:], weight.shape[2:])))


def conv_statistics(
    directions: int, input: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any
) -> tuple[Tensor, Tensor | None]:
    """`stock_convolution`, and the partial statistics of its channels, where a kernel makes both; else None."""
    operands = in_low_precision(input, weight, bias)
    results: tuple[Tensor, Tensor | None] | None
    results = _statistics(*operands, directions, *geometry, kernels.precision(operands[0]))
    return (stock_convolution(directions, input, weight, bias, *geometry), None) if results is None else results


@decided_once
def _statistics(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    directions: int,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    output_padding: Any,
    precision: str,
) -> Callable[..., tuple[Tensor, Tensor] | None]:
    """`conv_statistics` by its kernel, or None; PyTorch's switches of ``precision`` decide, too."""
    odd, border = padding_of(directions, weight, stride, padding, dilation)
    convolution = convolution_of(directions, stride, border, dilation, groups, output_padding)
    described = (directions, x, odd, weight, bias, None, convolution, resolve_activation("relu"), POINT)

    def refusal() -> str | None:
        if directions != 2:
            return _CUDNN
        if reason := _refusal(*described):
            return reason
        if convolution is None or x.dim() != 4:
            return "not a batch of images"
        return None if _takes_single(x, weight, convolution, POINT) else _CUDNN

    name = f"conv{directions}d" if output_padding is None else f"conv_transpose{directions}d"
    if not takes_kernel(name, *((x, weight) if bias is None else (x, weight, bias)), refusal=refusal):
        return lambda *_: None
    pads = any(odd)

    def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, *_: object) -> tuple[Tensor, Tensor]:
        z: Tensor
        partial: Tensor
        z, partial = ConvStatistics.apply(F.pad(x, odd) if pads else x, weight, bias, convolution)
        return z, partial

    return convolve


def _refusal(
    directions: int,
    input: Tensor,
    odd: tuple[int, ...],
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
    if activation.saves == "nothing" and residual is None and window.is_point:
        return _CUDNN
    if min(*convolution.stride, *convolution.dilation, convolution.groups) < 1 or min(convolution.padding) < 0:
        return "a size of the convolution is not positive"
    whole = input.dim() in (directions + 1, directions + 2) and weight.dim() == directions + 2
    if not whole or input.numel() == 0 or weight.numel() == 0:
        return "not a batch of images and their filters"
    groups, extra = convolution.groups, convolution.output_padding
    if extra is None:
        filters, channels = weight.shape[0], weight.shape[1] * groups
    else:
        filters, channels = weight.shape[1] * groups, weight.shape[0]
        limits = map(max, convolution.stride, convolution.dilation)
        if not all(0 <= one < limit for one, limit in zip(extra, limits, strict=True)):
            return "the output padding is not smaller than stride or dilation"
    if input.shape[-directions - 1] != channels or filters % groups or channels % groups:
        return "the filters don't fit the channels"
    if bias is not None and bias.shape != (filters,):
        return "the bias is not one for each filter"
    added = [odd[2 * axis + 1] for axis in reversed(range(directions))]
    extents = [extent + one for extent, one in zip(input.shape[-directions:], added, strict=True)]
    size = convolution.size(extents, weight.shape[2:])
    if min(size) < 1:
        return "the image is smaller than the filter"
    if residual is not None and residual.shape != (*input.shape[: -directions - 1], filters, *size[-directions:]):
        return "the residual has another shape"
    return activation.refusal() or window_refusal(window, size, masked=activation.saves == "mask")
