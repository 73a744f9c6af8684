"""Convolution followed by batch norm, an activation and max pooling, in as few passes as there can be.

In evaluation the batch norm is folded into the filters, and the rest is `conv_act_pool2d`.  In training its statistics
have to be complete before it can be applied.  The single kernel of a shallow convolution leaves them on the way, behind
cuDNN's a pass over the result takes them; then one pass normalises, adds the residual, activates and pools.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels.base.launch import ACCUMULATOR
from ..kernels.functions.activation import IDENTITY, Activated
from ..kernels.pool_window import Window, images, kept_beside_code, point
from . import stock as F
from .activation import resolve_activation
from .batch_norm import BatchNorm, apply_activation, batch_norm_act, normalise
from .batch_norm_arguments import NormArguments, norm_and_rest, those_given
from .batch_norm_operators import backward as norm_backward
from .batch_norm_operators import merge_statistics, statistics
from .batch_norm_operators import reduce as norm_reduce
from .conv import conv_act_pool, conv_statistics
from .decisions import decided_once
from .dispatch import takes_kernel
from .function import Function
from .gradients import stock_gradients
from .handles import stream_of
from .pool import Sizes, max_pool, pool, pool_backward, squeezed, window_of, window_refusal
from .recompute import decides

__all__ = ["batch_norm_act_pool", "conv_batch_norm_act", "conv_batch_norm_act2d"]


class BatchNormActPool(Function):
    """Max pooling of activation(normalised x * weight + bias + residual), with the statistics of x: images or volumes.

    Saves the input, the statistics and the code of each window; beside these the maxima before the activation, where
    its gradient needs them.  Codes and maxima are made again with the result, where that is.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *operands, eps, activation, window = arguments
        again = decides()
        y, *beside = _forward(operands, eps, activation, window, keeps=not again)
        # The residual is kept for second derivatives alone; its memory is its owner's.
        ctx.save_for_backward(*operands, *((None, None) if again else beside))
        ctx.arguments = (eps, activation, window)
        ctx.beside = None
        ctx.beside_again = again
        return y

    @staticmethod
    def recipe(ctx: Any) -> Callable[..., Tensor]:
        def again(*saved: Tensor | None) -> Tensor:
            *operands, _code, _pre_activation = saved
            y, *beside = _forward(operands, *ctx.arguments, keeps=ctx.beside_again)
            if ctx.beside_again:
                ctx.beside = stream_of(y.device), *beside
            return y

        return again

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        *operands, code, saved = ctx.saved_tensors
        x, residual, weight, bias, mean, variance = operands
        eps, activation, window = ctx.arguments
        needed = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled():

            def chained(x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> Tensor:
                y = F.batch_norm(x, None, None, weight, bias, True, 0.0, eps)
                y = apply_activation(y, residual, activation)
                pooling = F.max_pool2d if y.dim() == 4 else F.max_pool3d
                return pooling(y, window.kernel, window.stride, window.padding)

            return *stock_gradients(chained, (x, residual, weight, bias), needed, g), None, None, None, None, None
        if ctx.beside_again:
            made, ctx.beside = ctx.beside, None
            if made is not None and made[0] == stream_of(x.device):
                _, code, saved = made
            else:  # no consumer has asked for the result in this pass
                _, code, saved = _forward(operands, *ctx.arguments, keeps=True)
        _, channels_last = images(x)
        dz, _ = pool_backward(g, code, saved, x.shape[2:], channels_last, *activation.arguments, *window, False)
        dx: Any = None
        dweight: Any = None
        dbias: Any = None
        if needed[0] or needed[2] or needed[3]:
            vectors = (mean, variance, weight, bias, eps, *IDENTITY.arguments)
            partial, _ = norm_reduce(dz, x, None, None, *vectors)
            merges = needed[0] and weight is not None
            if needed[0]:
                dx, dweight, dbias = norm_backward(dz, x, partial, x.shape[1] / x.numel(), *vectors, merges)
            if not merges:
                dbias, dweight = partial.sum(0)
            dweight = dweight.to(weight.dtype) if needed[2] else None
            dbias = dbias.to(bias.dtype) if needed[3] else None
        return dx, dz if needed[1] else None, dweight, dbias, None, None, None, None, None


def _forward(
    operands: Sequence[Any], eps: float, activation: Activated, window: Window, *, keeps: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The result; the windows' codes, and the maxima before the activation, where the gradient needs these."""
    x, residual, weight, bias, mean, variance = operands
    vectors = (mean, variance, weight, bias, eps)
    y, code, pre_activation, _ = pool(x, residual, *vectors, *activation.arguments, *window, keeps, False)
    return y, code, pre_activation if kept_beside_code(activation.row, window.fixed) == "input" else None


# --- Functions --------------------------------------------------------------------------------------------------------


def conv_batch_norm_act2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    *,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    batches: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = "relu",
    activation_parameters: Sequence[float] = (),
    pool_size: Sizes | None = None,
    pool_stride: Sizes | None = None,
    pool_padding: Sizes = 0,
) -> Tensor:
    """max_pool(activation(batch_norm(conv(x) + bias) + residual)).

    Arguments as of `conv2d`, `batch_norm_act` (``training``: the statistics are those of the batch) and `max_pool2d`; a
    ``pool_size`` of None leaves the pooling out.  In evaluation the batch norm is folded into the filters; in training
    the convolution's result is read twice, for its statistics and to make the result, and is saved.  Source: Ioffe and
    Szegedy, "Batch Normalization" (ICML 2015).
    """
    vectors = (running_mean, running_var, norm_weight, norm_bias)
    norm = NormArguments(*vectors, training, momentum, eps, batches)
    options: dict[str, Any] = {"activation": activation, "activation_parameters": activation_parameters}
    options |= {"pool_size": pool_size, "pool_stride": pool_stride, "pool_padding": pool_padding}
    geometry = (stride, padding, dilation, groups, None)
    return conv_batch_norm_act(2, input, weight, bias, norm, *geometry, residual=residual, **options)


def conv_batch_norm_act(
    directions: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: NormArguments,
    *geometry: Any,
    **options: Any,
) -> Tensor:
    """`conv_batch_norm_act2d` for so many directions; ``geometry`` and ``options`` are those of `conv_act_pool`."""
    if not norm.training and norm.running_mean is not None and norm.running_var is not None:
        filters, bias = _folded(weight, bias, norm, *geometry[-2:])
        return conv_act_pool(directions, input, filters, bias, *geometry, **options)
    z, partial = conv_statistics(directions, input, weight, bias, *geometry)
    return batch_norm_act_pool(z, partial, norm if norm.training else norm._replace(training=True), **options)


def batch_norm_act_pool(
    input: Tensor,
    partial: Tensor | None,
    norm: NormArguments,
    *,
    residual: Tensor | None,
    activation: str | None,
    activation_parameters: Sequence[float],
    pool_size: Any = None,
    pool_stride: Any = None,
    pool_padding: Any = 0,
) -> Tensor:
    """What `conv_batch_norm_act` does in training with a convolution's result, and its ``partial`` statistics."""
    if pool_size is None and partial is None:
        plain: Any = norm[:-1]
        options: dict[str, Any] = {"activation": activation, "activation_parameters": activation_parameters}
        return batch_norm_act(input, *plain, batches=norm.batches, residual=residual, **options)
    arguments = (input, partial, residual, *norm, pool_size, pool_stride, pool_padding)
    y: Tensor = _batch_norm_act_pool(*arguments, activation, *activation_parameters)
    return y


@decided_once
def _batch_norm_act_pool(
    input: Tensor, partial: Tensor | None, residual: Tensor | None, *arguments: Any
) -> Callable[..., Tensor]:
    """`batch_norm_act_pool` where it isn't batch norm alone, by its kernels or as one operation after another."""
    norm, (pool_size, pool_stride, pool_padding, activation, *parameters) = norm_and_rest(arguments)
    resolved = resolve_activation(activation, parameters)
    directions = input.dim() - 2
    window: Window | None = point(max(directions, 2))
    if pool_size is not None:
        window = window_of(directions, pool_size, pool_stride, pool_padding, 1, False)

    def refusal() -> str | None:
        return norm.refusal_in_any_mode(input, residual) or _refusal(input, resolved, window)

    def apart(input: Tensor, _: Tensor | None, residual: Tensor | None, *arguments: Any) -> Tensor:
        plain, batches = arguments[:7], arguments[7]
        if torch.compiler.is_compiling() and pool_size is not None and batches is None:
            # The compiler makes one kernel of this and the pooling.
            y = apply_activation(F.batch_norm(input, *plain), residual, resolved)
        else:
            options: dict[str, Any] = {"activation": activation, "activation_parameters": parameters}
            y = batch_norm_act(input, *plain, batches=batches, residual=residual, **options)
        return y if pool_size is None else max_pool(directions, y, pool_size, pool_stride, pool_padding)

    name = f"batch_norm_act_pool{directions}d"
    if not takes_kernel(name, *those_given(input, residual), parameters=norm.vectors, refusal=refusal):
        return apart
    assert window is not None
    operands = those_given(input, residual, norm.weight, norm.bias)
    differentiable = torch.is_grad_enabled() and any(operand.requires_grad for operand in operands)

    def together(input: Tensor, partial: Tensor | None, residual: Tensor | None, *arguments: Any) -> Tensor:
        running_mean, running_var, weight, bias, _, momentum, eps, batches, *_ = arguments
        running = (running_mean, running_var, batches, float(momentum))
        moments = statistics(input.detach(), *running) if partial is None else merge_statistics(partial, *running)
        if window.is_point:
            return normalise(BatchNorm, (input, residual, weight, bias, *moments), True, eps, resolved)
        if directions == 1:
            input, residual = input.unsqueeze(2), None if residual is None else residual.unsqueeze(2)
        operands, options = (input, residual, weight, bias, *moments), (float(eps), resolved, window)
        y: Tensor
        if differentiable:
            y = BatchNormActPool.apply(*operands, *options)
        else:
            y, *_results = _forward(operands, *options, keeps=False)
        return squeezed(y, directions == 1, False, tracked=differentiable)

    return together


def _folded(
    weight: Tensor, bias: Tensor | None, norm: NormArguments, groups: int, output_padding: object
) -> tuple[Tensor, Tensor]:
    """Filters and bias of the convolution that also normalises; differentiable.

    Of a transposed one, which has an ``output_padding``, the filters are (C, O / groups, *).
    """
    mean, variance, norm_weight, norm_bias, *_ = norm
    assert mean is not None
    assert variance is not None
    dtype = ACCUMULATOR[weight.dtype]
    deviation = (variance.to(dtype) + norm.eps).sqrt()
    scale = 1 / deviation if norm_weight is None else norm_weight.to(dtype) / deviation
    shift = -mean if bias is None else bias - mean
    shift = shift * scale if norm_bias is None else shift * scale + norm_bias
    if output_padding is None:
        filters = weight * scale.view(-1, *[1] * (weight.dim() - 1))
    else:
        grouped = weight.unflatten(0, (groups, -1))
        filters = (grouped * scale.view(groups, 1, -1, *[1] * (weight.dim() - 2))).flatten(0, 1)
    return filters.to(weight.dtype), shift.to(weight.dtype)


def _refusal(z: Tensor, activation: Activated, window: Window | None) -> str | None:
    """Why the kernels don't take such images, or None."""
    if window is None:
        return "a size is not an integer for each direction"
    if z.dim() not in (3, 4, 5) or z.numel() == z.shape[1]:
        return "not a batch of images"
    size = z.shape[2:] if z.dim() > 3 else (1, z.shape[2])
    return activation.refusal() or window_refusal(window, size, masked=activation.saves == "mask")
