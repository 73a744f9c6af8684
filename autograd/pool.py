"""Max pooling with the signatures of ``torch.nn.functional``, and its gradient."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels import pool as kernels
from ..kernels.base.launch import ACCUMULATOR
from ..kernels.functions.activation import IDENTITY, Activated, activated
from ..kernels.pool_window import (
    LARGEST_EXTENT,
    Window,
    images,
    kept_beside_code,
    memory_format,
    most_positions,
    point,
    point_codes,
    pooled_like,
    winner_indices,
)
from . import stock as F
from .activation import differentiable_gradient, resolve_activation, stock_activation
from .anchors import anchors_of
from .decisions import decided_once
from .dispatch import is_integer, or_stock, takes_kernel
from .function import Function
from .namesakes import namesake
from .operators import given, operator
from .recompute import needs

__all__ = [
    "WINDOW",
    "Sizes",
    "act_pool",
    "activate_",
    "activated_pool_gradient",
    "activation_again",
    "code_or_empty",
    "max_pool",
    "max_pool1d",
    "max_pool2d",
    "max_pool3d",
    "operator_window",
    "pool",
    "pool_backward",
    "sizes_of",
    "squeezed",
    "window_of",
    "window_refusal",
]

#: What PyTorch takes for a size in each direction: one for all, or one for each.
Sizes = int | tuple[int, ...] | list[int]

#: A `Window` in an operator's schema.
WINDOW = "int[] kernel_size, int[] stride, int[] padding, int[] dilation, bool ceil_mode"


# --- Operators --------------------------------------------------------------------------------------------------------


def operator_window(kernel_size: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool) -> Window:
    """From an operator's arguments, whose tuples are lists."""
    return Window(tuple(kernel_size), tuple(stride), tuple(padding), tuple(dilation), ceil_mode)


def _fake_pool(x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *_, name, a, b, kernel_size, stride, padding, dilation, ceil_mode, keeps, emits_indices = arguments
    x, channels_last = images(x)
    window = operator_window(kernel_size, stride, padding, dilation, ceil_mode)
    results = pooled_like(
        x, x.shape, channels_last, window, activated(name, a, b), keeps=keeps, emits_indices=emits_indices
    )
    return tuple(results)


@operator(
    "pool(Tensor x, Tensor? residual, Tensor? mean, Tensor? variance, Tensor? weight, Tensor? bias, float eps,"
    " str name, float a, float b,"
    f" {WINDOW}, bool keeps, bool emits_indices) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_pool,
)
def pool(
    x: Tensor,
    residual: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    name: str,
    a: float,
    b: float,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    """`fusednn.kernels.pool.pool_forward`."""
    *sizes, keeps, emits_indices = arguments
    operands = (x, bias, operator_window(*sizes), activated(name, a, b))
    norm: dict[str, Any] = {"mean": mean, "variance": variance, "weight": weight, "eps": eps}
    results = kernels.pool_forward(*operands, keeps=keeps, emits_indices=emits_indices, residual=residual, **norm)
    return tuple(results)


def _fake_activate(
    x: Tensor, residual: Tensor | None, bias: Tensor | None, name: str, a: float, b: float, keeps: bool
) -> tuple[Tensor, Tensor]:
    _, channels_last = images(x)
    results = pooled_like(x, x.shape, channels_last, point(x.dim() - 2), activated(name, a, b), keeps=keeps)
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
        *(x, bias, point(x.dim() - 2), activated(name, a, b)), keeps=keeps, residual=residual, inplace=True
    )
    return results.code, results.pre_activation


def _fake_backward(
    g: Tensor, code: Tensor, saved: Tensor | None, size: Any, channels_last: bool, *arguments: Any
) -> tuple[Tensor, Tensor]:
    shape, order = (*g.shape[:2], *size), memory_format(len(size), channels_last)
    dx = torch.empty(shape, dtype=g.dtype, device=g.device, memory_format=order)
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
    results = pool(x, None, None, None, None, None, 0.0, *IDENTITY.arguments, *window, keeps, emits_indices)
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


class PoolGradient(torch.autograd.Function):
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
            dg = PoolGradient.apply(dg, bits, shape[2:], channels_last, activation, point(len(size)))
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


def activation_again(activation: Activated, window: Window) -> Callable[[Tensor], Tensor] | None:
    """What makes the pooled result again of the maxima before the activation, where these are kept.

    By the kernel that has made it: others may be coarser.
    """
    if kept_beside_code(activation.row, window.fixed) != "input":
        return None
    nothing = (None, None, None, None, None, 0.0)
    return lambda x: pool(x, *nothing, *activation.arguments, *point(x.dim() - 2), False, False)[0]


class ActPool(Function):
    """Saves the code of each window, and beside it the maxima before the activation, where its gradient needs them.

    These are a result, too, by way of which second derivatives reach the images; else ``anchors`` are those of ``x``.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, channels_last: bool, activation: Activated, window: Window, anchors: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor]:
        y, code, pre_activation = _act_pool_forward(x, activation, window, keeps=True)
        saved = {"output": y, "input": pre_activation}.get(kept_beside_code(activation.row, window.fixed))
        ctx.save_for_backward(given(code), saved)
        ctx.arguments = (activation, window)
        ctx.layout = (x.shape[2:], channels_last)
        ctx.anchors = anchors
        ctx.set_materialize_grads(False)
        if saved is None:
            needs(ctx, x)
        return y, pre_activation

    @staticmethod
    def recipe(ctx: Any) -> Callable[..., Tensor]:
        activation, window = ctx.arguments
        again = activation_again(activation, window)
        if again is not None:
            return lambda _, saved: again(saved)
        return lambda _, __, x: _act_pool_forward(x, activation, window, keeps=False)[0]

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, g_pre_activation: Tensor | None) -> tuple[Tensor | None, ...]:
        code, saved = ctx.saved_tensors
        activation, window = ctx.arguments
        once = torch.compiler.is_compiling() or (g_pre_activation is None and not torch.is_grad_enabled())
        dx: Tensor | None
        if g is not None and once:  # compiled code has no second derivatives
            rest = (*ctx.layout, *activation.arguments, *window, False)
            dx, _ = pool_backward(g, code_or_empty(code, g), saved, *rest)
        else:
            dx = activated_pool_gradient(g, g_pre_activation, code, saved, ctx.layout, activation, window, ctx.anchors)
        return dx, None, None, None, None


def _act_pool_forward(
    x: Tensor, activation: Activated, window: Window, *, keeps: bool
) -> tuple[Tensor, Tensor, Tensor]:
    y, code, pre_activation, _ = pool(
        x, None, None, None, None, None, 0.0, *activation.arguments, *window, keeps, False
    )
    return y, code, pre_activation


# --- Functions --------------------------------------------------------------------------------------------------------


def sizes_of(value: object, directions: int) -> tuple[int, ...] | None:
    """An argument of so many directions, one for each, or None where it isn't integers."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    if len(values) == 1:
        values *= directions
    return values if len(values) == directions and all(is_integer(item) for item in values) else None


def window_of(
    directions: int, kernel_size: object, stride: object, padding: object, dilation: object, ceil_mode: object
) -> Window | None:
    """The windows of a pooling layer of so many directions, or None where an argument isn't what PyTorch takes.

    What has one direction is an image of one line.
    """
    if stride is None or (isinstance(stride, (tuple, list)) and not stride):
        stride = kernel_size
    found = [sizes_of(argument, directions) for argument in (kernel_size, stride, padding, dilation)]
    if any(sizes is None for sizes in found) or type(ceil_mode) is not bool:
        return None
    kernel, step, border, spread = (sizes for sizes in found if sizes is not None)
    if directions == 1:
        kernel, step, border, spread = (1, *kernel), (1, *step), (0, *border), (1, *spread)
    return Window(kernel, step, border, spread, ceil_mode)


def window_refusal(window: Window, size: Sequence[int], *, masked: bool = False) -> str | None:
    """Why the kernels don't take these windows on images of this size, or None."""
    if min(*window.kernel, *window.stride, *window.dilation) < 1 or min(window.padding) < 0:
        return "a size of the window is not positive"
    if window.positions > most_positions(masked):
        return "the window has more positions than a byte can tell"
    for extent, kernel, padding, dilation in zip(size, window.kernel, window.padding, window.dilation, strict=True):
        if 2 * padding > kernel:  # whatever the dilation
            return "the padding is more than half of the window"
        if padding and dilation > extent:
            return "a window may lie beside the image"
        if max(extent, kernel * dilation) > LARGEST_EXTENT:
            return "the image is too large"
    if min(window.pooled(*size)) < 1:
        return "the image is smaller than the window"
    return None


def _images_refusal(input: Tensor, directions: int, window: Window | None, *, masked: bool = False) -> str | None:
    """Why the kernels don't pool these images, or None."""
    if input.dim() not in (directions + 1, directions + 2):
        return "not a batch of images"
    if window is None:
        return "a size is not an integer for each direction"
    size = input.shape[-directions:] if directions > 1 else (1, input.shape[-1])
    return window_refusal(window, size, masked=masked) if input.numel() else None


@decided_once
def _max_pool(
    input: Tensor,
    name: str,
    kernel_size: Sizes,
    stride: Sizes | None,
    padding: Sizes,
    dilation: Sizes,
    ceil_mode: bool,
    return_indices: bool,
) -> Callable[..., tuple[Tensor, Tensor] | None]:
    """Maxima and their indices (empty unless asked for), or None where the stock operator has to be taken."""
    directions = int(name[-2])  # a constant for compilers, which make a variable of a number that they are given
    window = window_of(directions, kernel_size, stride, padding, dilation, ceil_mode)

    def refusal() -> str | None:
        return _images_refusal(input, directions, window if type(return_indices) is bool else None)

    if not takes_kernel(name, input, refusal=refusal):
        return lambda *_: None
    assert window is not None
    lines, unbatched = directions == 1, input.dim() == directions + 1
    differentiable = torch.is_grad_enabled() and input.requires_grad

    def pooled(input: Tensor, *_: object) -> tuple[Tensor, Tensor]:
        x = input.unsqueeze(0) if unbatched else input
        x, channels_last = images(x.unsqueeze(2) if lines else x)
        if differentiable:
            y, indices = MaxPool.apply(x, channels_last, window, return_indices, anchors_of(x))
        else:
            y, _code, _pre_activation, indices = _pool(x, window, False, return_indices)
        if return_indices:
            indices = squeezed(indices, lines, unbatched, tracked=True)
        return squeezed(y, lines, unbatched, tracked=differentiable), indices

    return pooled


@or_stock
def act_pool(
    directions: int,
    input: Tensor,
    kernel_size: Sizes,
    stride: Sizes | None,
    padding: Sizes,
    activation: str | None,
    parameters: Sequence[float] = (),
) -> Tensor:
    """max_pool(activation(x)) in so many directions, of which the activated images aren't written."""
    y: Tensor = _act_pool(input, directions, kernel_size, stride, padding, activation, *parameters)
    return y


@decided_once
def _act_pool(
    input: Tensor,
    directions: int,
    kernel_size: Sizes,
    stride: Sizes | None,
    padding: Sizes,
    name: str | None,
    *parameters: float,
) -> Callable[..., Tensor]:
    activation = resolve_activation(name, parameters)
    window = window_of(directions, kernel_size, stride, padding, 1, False)

    def refusal() -> str | None:
        return activation.refusal() or _images_refusal(input, directions, window, masked=activation.saves == "mask")

    if not takes_kernel(f"act_pool{directions}d", input, refusal=refusal):
        return lambda input, *_: max_pool(directions, stock_activation(input, activation), kernel_size, stride, padding)
    assert window is not None
    lines, unbatched = directions == 1, input.dim() == directions + 1
    differentiable = torch.is_grad_enabled() and input.requires_grad
    anchored = kept_beside_code(activation.row, window.fixed) in ("nothing", "mask")

    def together(input: Tensor, *_: object) -> Tensor:
        x = input.unsqueeze(0) if unbatched else input
        x, channels_last = images(x.unsqueeze(2) if lines else x)
        if differentiable:
            y, _pre_activation = ActPool.apply(x, channels_last, activation, window, anchors_of(x) if anchored else ())
        else:
            y, *_results = _act_pool_forward(x, activation, window, keeps=False)
        return squeezed(y, lines, unbatched, tracked=differentiable)

    return together


def squeezed(y: Tensor, line: bool, unbatched: bool, *, tracked: bool) -> Tensor:
    """A new result without the dimensions that its images were given: of a line, and of a batch of one.

    ``tracked``: it has a gradient.  A view that was made without couldn't be changed with one.
    """
    squeeze = Tensor.squeeze if tracked else Tensor.squeeze_
    if line:
        y = squeeze(y, 2)
    return squeeze(y, 0) if unbatched else y


def _max_pool_of(
    name: str,
    input: Tensor,
    kernel_size: Sizes,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    dilation: Sizes = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    arguments = (kernel_size, stride, padding, dilation, ceil_mode, return_indices)
    results: tuple[Tensor, Tensor] | None = _max_pool(input, name, *arguments)
    if results is None:
        return _STOCK[name](input, *arguments)
    return results if return_indices else results[0]


_STOCK: dict[str, Callable[..., Tensor | tuple[Tensor, Tensor]]] = {
    "max_pool1d": F.max_pool1d,
    "max_pool2d": F.max_pool2d,
    "max_pool3d": F.max_pool3d,
}
_DOC = """The maximum of each window of (C, {size}) or (N, C, {size}).  As `torch.nn.functional.{name}`.

    Padding counts as negative infinity.  With ``return_indices`` also the maxima's int64 indices in their channel's
    {places}.  Saves at most a byte for each window; windows of more than 256 positions take the stock operator.
    """

_FUNCTIONS = {
    number: namesake(_max_pool_of, name, name, _DOC.format(size=size, name=name, places=size.replace(",", " x")))
    for number, (name, size) in enumerate(zip(_STOCK, ("L", "H, W", "D, H, W"), strict=True), 1)
}
max_pool1d, max_pool2d, max_pool3d = _FUNCTIONS.values()


def max_pool(directions: int, input: Tensor, kernel_size: Sizes, stride: Sizes | None, padding: Sizes) -> Tensor:
    """The function of so many directions."""
    y: Tensor = _FUNCTIONS[directions](input, kernel_size, stride, padding)  # type: ignore[assignment]
    return y
