"""Max pooling with the signatures of ``torch.nn.functional``, and its gradient."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ..kernels import pool as kernels
from ..kernels.base.launch import ACCUMULATOR
from ..kernels.functions.activation import IDENTITY, Activated, activated
from ..kernels.pool_window import (
    LARGEST_EXTENT,
    POINT,
    Window,
    images,
    kept_beside_code,
    most_positions,
    point_codes,
    pooled_like,
    winner_indices,
)
from . import stock as F
from .activation import differentiable_gradient
from .anchors import anchors_of
from .decisions import decided_once
from .dispatch import is_integer, or_stock, takes_kernel
from .operators import given, operator
from .recompute import needs

__all__ = [
    "WINDOW",
    "Pair",
    "activate_",
    "activated_pool_gradient",
    "code_or_empty",
    "max_pool1d",
    "max_pool2d",
    "operator_window",
    "pairs",
    "pool",
    "pool_backward",
    "window_of",
    "window_refusal",
]

#: What PyTorch takes for a size in each direction: one for all, or one for each.
Pair = int | tuple[int, ...] | list[int]

#: A `Window` in an operator's schema.
WINDOW = "int[] kernel_size, int[] stride, int[] padding, int[] dilation, bool ceil_mode"


# --- Operators --------------------------------------------------------------------------------------------------------


def operator_window(kernel_size: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool) -> Window:
    """From an operator's arguments, whose pairs are lists."""
    return Window(tuple(kernel_size), tuple(stride), tuple(padding), tuple(dilation), ceil_mode)


def _fake_pool(
    x: Tensor,
    residual: Tensor | None,
    mean: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    name: str,
    a: float,
    b: float,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    *sizes, keeps, emits_indices = arguments
    x, channels_last = images(x)
    window = operator_window(*sizes)
    results = pooled_like(
        x, x.shape, channels_last, window, activated(name, a, b), keeps=keeps, emits_indices=emits_indices
    )
    return tuple(results)


@operator(
    "pool(Tensor x, Tensor? residual, Tensor? mean, Tensor? scale, Tensor? bias, str name, float a, float b,"
    f" {WINDOW}, bool keeps, bool emits_indices) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_pool,
)
def pool(
    x: Tensor,
    residual: Tensor | None,
    mean: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    name: str,
    a: float,
    b: float,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    """`fusednn.kernels.pool.pool_forward`."""
    *sizes, keeps, emits_indices = arguments
    results = kernels.pool_forward(
        *(x, bias, operator_window(*sizes), activated(name, a, b)),
        keeps=keeps,
        emits_indices=emits_indices,
        mean=mean,
        scale=scale,
        residual=residual,
    )
    return tuple(results)


def _fake_activate(
    x: Tensor, residual: Tensor | None, bias: Tensor | None, name: str, a: float, b: float, keeps: bool
) -> tuple[Tensor, Tensor]:
    _, channels_last = images(x)
    results = pooled_like(x, x.shape, channels_last, POINT, activated(name, a, b), keeps=keeps)
    return results.code, results.pre_activation


@operator(
    "activate_(Tensor(a!) x, Tensor? residual, Tensor? bias, str name, float a, float b, bool keeps)"
    " -> (Tensor, Tensor)",
    fake=_fake_activate,
)
def activate_(
    x: Tensor, residual: Tensor | None, bias: Tensor | None, name: str, a: float, b: float, keeps: bool
) -> tuple[Tensor, Tensor]:
    """`pool` with windows of one position, in place: bias and activation."""
    results = kernels.pool_forward(
        *(x, bias, POINT, activated(name, a, b)), keeps=keeps, residual=residual, inplace=True
    )
    return results.code, results.pre_activation


def _fake_backward(
    g: Tensor, code: Tensor, saved: Tensor | None, size: Any, channels_last: bool, *arguments: Any
) -> tuple[Tensor, Tensor]:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    shape = (*g.shape[:2], *size)
    dx = torch.empty(shape, dtype=g.dtype, device=g.device, memory_format=memory_format)
    sums_bias = arguments[-1]
    return dx, g.new_empty(g.shape[1], dtype=ACCUMULATOR[g.dtype]) if sums_bias else g.new_empty(0)


@operator(
    "pool_backward(Tensor g, Tensor code, Tensor? saved, SymInt[] size, bool channels_last, str name,"
    f" float a, float b, {WINDOW}, bool sums_bias) -> (Tensor, Tensor)",
    fake=_fake_backward,
)
def pool_backward(
    g: Tensor,
    code: Tensor,
    saved: Tensor | None,
    size: Any,
    channels_last: bool,
    name: str,
    a: float,
    b: float,
    *arguments: Any,
) -> tuple[Tensor, Tensor]:
    """`fusednn.kernels.pool.pool_backward`; the caller, whose code a compiler sees, rounds the bias's gradient."""
    *sizes, sums_bias = arguments
    window = operator_window(*sizes)
    activation = activated(name, a, b)
    return kernels.pool_backward(g, code, saved, tuple(size), channels_last, window, activation, sums_bias=sums_bias)


# --- Gradients --------------------------------------------------------------------------------------------------------


def _pool(x: Tensor, window: Window, keeps: bool, emits_indices: bool) -> tuple[Tensor, ...]:
    """Max pooling alone."""
    results: tuple[Tensor, ...]
    results = pool(x, None, None, None, None, *IDENTITY.arguments, *window, keeps, emits_indices)
    return results


def _pool_backward(
    g: Tensor, code: Tensor, size: Sequence[int], channels_last: bool, activation: Activated, window: Window
) -> Tensor:
    """The gradient of max pooling, and of an activation of one bit, from the code."""
    dx: Tensor
    dx, _ = pool_backward(g, code, None, size, channels_last, *activation.arguments, *window, False)
    return dx


def code_or_empty(code: Tensor | None, like: Tensor) -> Tensor:
    """A code that was saved, or the empty one of windows of one position."""
    return like.new_empty(0, dtype=torch.uint8) if code is None else code


class MaxPool(Function):
    """Saves the code of each window, at most a byte.  ``anchors`` are those of ``x``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, channels_last: bool, window: Window, emits_indices: bool, anchors: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor]:
        y, code, _, indices = _pool(x, window, True, emits_indices)
        ctx.save_for_backward(given(code))
        ctx.arguments = (x.shape[2:], channels_last, IDENTITY, window)
        ctx.anchors = anchors
        ctx.mark_non_differentiable(indices)
        ctx.set_materialize_grads(False)
        needs(ctx, x)
        return y, indices

    @staticmethod
    def recipe(ctx: Any) -> Callable[..., Tensor]:
        *_, window = ctx.arguments
        return lambda code, x: _pool(x, window, False, False)[0]

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if g is None:
            return None, None, None, None, None
        (code,) = ctx.saved_tensors
        code = code_or_empty(code, g)
        if torch.is_grad_enabled():
            dx = PoolGradient.apply(g, code, *ctx.arguments, *ctx.anchors)
        else:
            dx = _pool_backward(g, code, *ctx.arguments)
        return dx, None, None, None, None


class PoolGradient(Function):
    """The gradient of max pooling and an activation of one bit, or none, as a differentiable function.

    It is linear: its derivative takes what lies at the maxima, where the activation's bit lets it pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        g: Tensor,
        code: Tensor,
        size: Sequence[int],
        channels_last: bool,
        activation: Activated,
        window: Window,
        *anchors: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(given(code))
        ctx.arguments = (g.shape, size, channels_last, activation, window)
        ctx.anchors = anchors
        return _pool_backward(g, code, size, channels_last, activation, window)

    @staticmethod
    def backward(ctx: Any, gg: Tensor) -> tuple[Tensor | None, ...]:
        (code,) = ctx.saved_tensors
        code = code_or_empty(code, gg)
        shape, size, channels_last, activation, window = ctx.arguments
        masked = activation.saves == "mask"
        indices = winner_indices(code, shape, size, channels_last, window, masked=masked)
        # Not flattened, for which batches of gradients have no rule.
        flat = (*indices.shape[:2], -1)
        dg = gg.reshape(flat).gather(2, indices.view(flat)).view(indices.shape)
        if masked:
            bits = point_codes(code, shape, channels_last, window)
            dg = PoolGradient.apply(dg, bits, shape[2:], channels_last, activation, POINT)
        return dg, None, None, None, None, None, *map(torch.zeros_like, ctx.anchors)


def activated_pool_gradient(
    g: Tensor | None,
    g_pre_activation: Tensor | None,
    code: Tensor | None,
    saved: Tensor | None,
    layout: tuple[Sequence[int], bool],
    activation: Activated,
    window: Window,
    anchors: tuple[Tensor, ...],
) -> Tensor | None:
    """`pool_backward` of the gradient of the result, and of that of the maxima before the activation, differentiably.

    ``saved`` is a result of the function whose gradient this is: what it was made of has its gradient by way of it.
    """
    dx: Tensor | None = None
    if g is not None:
        code_of_g = code_or_empty(code, g)
        if saved is not None:
            g = differentiable_gradient(g, saved, activation, kept_beside_code(activation.row, window.fixed))
            activation = IDENTITY
        dx = PoolGradient.apply(g, code_of_g, *layout, activation, window, *anchors)
    if g_pre_activation is not None:
        through_it: Tensor = PoolGradient.apply(
            g_pre_activation, code_or_empty(code, g_pre_activation), *layout, IDENTITY, window
        )
        dx = through_it if dx is None else dx + through_it
    return dx


# --- Functions --------------------------------------------------------------------------------------------------------


def pairs(value: object, dims: int) -> tuple[int, int] | None:
    """(along the height, along the width) from an argument of ``dims`` dimensions, or None where it isn't integers.

    What has one dimension is an image of height 1, where every size is 1 and the padding 0: see `window_of`.
    """
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    if len(values) == 1:
        values *= dims
    if len(values) != dims or not all(is_integer(item) for item in values):
        return None
    return values[0], values[-1]


def window_of(
    dims: int, kernel_size: object, stride: object, padding: object, dilation: object, ceil_mode: object
) -> Window | None:
    """The windows of a pooling layer of ``dims`` dimensions, or None where an argument isn't what PyTorch takes."""
    if stride is None or (isinstance(stride, (tuple, list)) and not stride):
        stride = kernel_size
    found = [pairs(argument, dims) for argument in (kernel_size, stride, padding, dilation)]
    if any(pair is None for pair in found) or type(ceil_mode) is not bool:
        return None
    kernel, step, border, spread = (pair for pair in found if pair is not None)
    if dims == 1:
        kernel, step, border, spread = (1, kernel[1]), (1, step[1]), (0, border[1]), (1, spread[1])
    return Window(kernel, step, border, spread, ceil_mode)


def window_refusal(window: Window, height: int, width: int, *, masked: bool = False) -> str | None:
    """Why the kernels don't take these windows on images of this size, or None."""
    if min(*window.kernel, *window.stride, *window.dilation) < 1 or min(window.padding) < 0:
        return "a size of the window is not positive"
    if window.positions > most_positions(masked):
        return "the window has more positions than a byte can tell"
    for size, kernel, padding, dilation in zip(
        (height, width), window.kernel, window.padding, window.dilation, strict=True
    ):
        if 2 * padding > kernel:  # whatever the dilation
            return "the padding is more than half of the window"
        if padding and dilation > size:
            return "a window may lie beside the image"
        if max(size, kernel * dilation) > LARGEST_EXTENT:
            return "the image is too large"
    if min(window.pooled(height, width)) < 1:
        return "the image is smaller than the window"
    return None


@decided_once
def _max_pool(
    input: Tensor,
    dims: int,
    kernel_size: Pair,
    stride: Pair | None,
    padding: Pair,
    dilation: Pair,
    ceil_mode: bool,
    return_indices: bool,
) -> Callable[..., tuple[Tensor, Tensor] | None]:
    """Maxima and their indices (empty unless asked for), or None where the stock operator has to be taken."""
    window = window_of(dims, kernel_size, stride, padding, dilation, ceil_mode)

    def refusal() -> str | None:
        if input.dim() not in (dims + 1, dims + 2):
            return "not a batch of images"
        if window is None or type(return_indices) is not bool:
            return "a size is not an integer for each direction"
        height, width = (1, *input.shape[-dims:])[-2:]
        return window_refusal(window, height, width) if input.numel() else None

    if not takes_kernel(f"max_pool{dims}d", input, refusal=refusal):
        return lambda *_: None
    assert window is not None
    unbatched = input.dim() == dims + 1
    differentiable = torch.is_grad_enabled() and input.requires_grad
    # A view that was made without gradients couldn't be changed with them.
    squeeze = Tensor.squeeze if differentiable else Tensor.squeeze_

    def pooled(input: Tensor, *_: object) -> tuple[Tensor, Tensor]:
        x = input.unsqueeze(0) if unbatched else input
        x, channels_last = images(x.unsqueeze(2) if dims == 1 else x)
        if differentiable:
            y, indices = MaxPool.apply(x, channels_last, window, return_indices, anchors_of(x))
        else:
            y, _code, _pre_activation, indices = _pool(x, window, False, return_indices)
        if dims == 1:
            y, indices = squeeze(y, 2), indices.squeeze(2) if return_indices else indices
        if unbatched:
            y, indices = squeeze(y, 0), indices.squeeze(0) if return_indices else indices
        return y, indices

    return pooled


@or_stock
def max_pool1d(
    input: Tensor,
    kernel_size: Pair,
    stride: Pair | None = None,
    padding: Pair = 0,
    dilation: Pair = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The maximum of each window of (C, L) or (N, C, L).  As `torch.nn.functional.max_pool1d`.

    Padding counts as negative infinity.  With ``return_indices`` also the maxima's int64 indices.  Saves at most a byte
    for each window; windows of more than 256 positions take the stock operator.
    """
    arguments = (input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)
    results: tuple[Tensor, Tensor] | None = _max_pool(input, 1, *arguments[1:])
    if results is None:
        return F.max_pool1d(*arguments)  # type: ignore[no-any-return, call-overload]
    return results if return_indices else results[0]


@or_stock
def max_pool2d(
    input: Tensor,
    kernel_size: Pair,
    stride: Pair | None = None,
    padding: Pair = 0,
    dilation: Pair = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The maximum of each window of (C, H, W) or (N, C, H, W).  As `torch.nn.functional.max_pool2d`.

    Padding counts as negative infinity.  With ``return_indices`` also the maxima's int64 indices in their channel's
    H x W.  Saves at most a byte for each window; windows of more than 256 positions take the stock operator.
    """
    arguments = (input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)
    results: tuple[Tensor, Tensor] | None = _max_pool(input, 2, *arguments[1:])
    if results is None:
        return F.max_pool2d(*arguments)  # type: ignore[no-any-return, call-overload]
    return results if return_indices else results[0]
