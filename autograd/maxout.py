"""Maxout: the maximum over pieces, of features, of a linear layer's outputs, or of a convolution's."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ..kernels import linear_maxout
from ..kernels import maxout as kernels
from ..kernels.base.device import device_of
from ..kernels.base.random import with_seed
from . import stock as F
from .dispatch import in_low_precision, or_stock, report_stock, takes_kernel
from .operators import operator

__all__ = ["maxout", "maxout_conv2d", "maxout_linear"]

# --- Operators ------------------------------------------------------------------------------------------------------
#
# Winners are empty where they aren't kept, and so is the gradient of a bias that isn't asked for.


def _fake_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, seed: Tensor | None, p: float, keeps_winner: bool
) -> tuple[Tensor, Tensor]:
    y = x.new_empty((*x.shape[:-1], weight.shape[1]))
    return y, y.new_empty(y.shape if keeps_winner else (0,), dtype=torch.uint8)


@operator(
    "maxout_linear(Tensor x, Tensor weight, Tensor? bias, Tensor? seed, float p, bool keeps_winner)"
    " -> (Tensor, Tensor)",
    fake=_fake_linear,
    flops=lambda x, weight, *_: 2 * x.numel() // x.shape[-1] * weight.numel(),
    planned=False,  # products obey PyTorch's switches of precision
)
def _linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, seed: Tensor | None, p: float, keeps_winner: bool
) -> tuple[Tensor, Tensor]:
    pieces, units, features = weight.shape
    if linear_maxout.takes_fused(features, pieces, x.dtype, device_of(x)):
        return linear_maxout.linear_maxout_forward(x, weight, bias, seed, p, keeps_winner)
    products = F.linear(x.reshape(-1, features), weight.flatten(0, 1), None if bias is None else bias.flatten())
    y, winner = kernels.maxout_forward(products, None, seed, pieces, 1, False, p, keeps_winner)
    # In place: nobody could change a view that a function returns.
    y.resize_(*x.shape[:-1], units)
    return y, winner.view(y.shape) if keeps_winner else winner


def _fake_linear_backward(
    g: Tensor, winner: Tensor, x: Tensor | None, weight: Tensor | None, pieces: int, p: float, sums_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    units = g.shape[-1]
    dx = g.new_empty((0,) if weight is None else (*g.shape[:-1], weight.shape[-1]))
    dw = g.new_empty((0,) if x is None else (pieces, units, x.shape[-1]))
    return dx, dw, g.new_empty((pieces, units) if sums_bias else (0,))


@operator(
    "maxout_linear_backward(Tensor g, Tensor winner, Tensor? x, Tensor? weight, int pieces, float p, bool sums_bias)"
    " -> (Tensor, Tensor, Tensor)",
    fake=_fake_linear_backward,
    flops=lambda g, winner, x, weight, pieces, *_: (
        2 * g.numel() * pieces * sum(operand.shape[-1] for operand in (x, weight) if operand is not None)
    ),
    planned=False,  # products obey PyTorch's switches of precision
)
def _linear_backward(
    g: Tensor, winner: Tensor, x: Tensor | None, weight: Tensor | None, pieces: int, p: float, sums_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    *batch, units = g.shape
    rows = g.numel() // units
    features = max(0 if operand is None else operand.shape[-1] for operand in (x, weight))
    # The kernel of the weight's gradient sums the bias's.
    summed = x is not None or not sums_bias
    if summed and linear_maxout.takes_fused_backward(rows, units, features, pieces, g.dtype, device_of(g)):
        return linear_maxout.linear_maxout_backward(g, winner, x, weight, pieces, p, sums_bias)
    g, winner = g.reshape(rows, units), winner.view(rows, units)
    dz, db = kernels.maxout_backward(g, winner, (pieces * units, 1), pieces, 1, False, p, sums_bias)
    nothing = g.new_empty(0)
    dx = nothing if weight is None else (dz @ weight.flatten(0, 1)).view(*batch, features)
    dw = nothing if x is None else (dz.t() @ x.reshape(rows, features)).view(pieces, units, features)
    return dx, dw, db


def _fake_maximum(
    x: Tensor, bias: Tensor | None, pieces: int, dim: int, adjacent: bool, keeps_winner: bool
) -> tuple[Tensor, Tensor]:
    shape, strides = kernels.maxima_layout(x.shape, torch.empty_like(x).stride(), pieces, dim)
    y = x.new_empty_strided(shape, strides)
    return y, torch.empty_like(y, dtype=torch.uint8) if keeps_winner else y.new_empty(0, dtype=torch.uint8)


@operator(
    "maxout(Tensor x, Tensor? bias, int pieces, int dim, bool adjacent, bool keeps_winner) -> (Tensor, Tensor)",
    fake=_fake_maximum,
)
def _maximum(
    x: Tensor, bias: Tensor | None, pieces: int, dim: int, adjacent: bool, keeps_winner: bool
) -> tuple[Tensor, Tensor]:
    return kernels.maxout_forward(x, bias, None, pieces, dim, adjacent, 0.0, keeps_winner)


def _fake_expansion(
    g: Tensor, winner: Tensor, strides: Sequence[int], pieces: int, dim: int, adjacent: bool, sums_bias: bool
) -> tuple[Tensor, Tensor]:
    shape = [size * pieces if d == dim else size for d, size in enumerate(g.shape)]
    return g.new_empty_strided(shape, strides), g.new_empty((pieces, g.shape[dim]) if sums_bias else (0,))


@operator(
    "maxout_backward(Tensor g, Tensor winner, SymInt[] strides, int pieces, int dim, bool adjacent, bool sums_bias)"
    " -> (Tensor, Tensor)",
    fake=_fake_expansion,
)
def _expansion(
    g: Tensor, winner: Tensor, strides: Sequence[int], pieces: int, dim: int, adjacent: bool, sums_bias: bool
) -> tuple[Tensor, Tensor]:
    return kernels.maxout_backward(g, winner, strides, pieces, dim, adjacent, 0.0, sums_bias)


# --- Gradients ------------------------------------------------------------------------------------------------------


def _expand(
    g: Tensor, winner: Tensor, pieces: int, dim: int, adjacent: bool, sums_bias: bool
) -> tuple[Tensor, Tensor | None]:
    """The gradient of the features, zero but for the winners, and the sum that is the bias's, (pieces, units).

    By PyTorch's operators, which can be differentiated again: given the winners everything is linear.
    """
    where = dim + 1 if adjacent else dim
    piece = torch.arange(pieces, device=g.device).view(-1, *[1] * (g.dim() - where))
    apart = torch.where(winner.unsqueeze(where) == piece, g.unsqueeze(where), 0)
    others = [d for d in range(apart.dim()) if d not in (dim, dim + 1)]
    # Not flattened, for which batches of gradients have no rule.
    together = apart.reshape(*g.shape[:dim], pieces * g.shape[dim], *g.shape[dim + 1 :])
    return together, apart.sum(others) if sums_bias else None


class Maximum(Function):
    """The maximum over the pieces of features, plus a bias.  Saves the winners, a byte each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, pieces: int, dim: int, adjacent: bool) -> Tensor:
        y: Tensor
        y, winner = _maximum(x, bias, pieces, dim, adjacent, True)
        ctx.save_for_backward(winner)
        ctx.strides = torch.empty_like(x).stride()
        ctx.arguments = (pieces, dim, adjacent)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        (winner,) = ctx.saved_tensors
        (pieces, dim, adjacent), sums_bias = ctx.arguments, ctx.needs_input_grad[1]
        if torch.is_grad_enabled():
            return *_expand(g, winner, pieces, dim, adjacent, sums_bias), None, None, None
        dx, db = _expansion(g, winner, ctx.strides, pieces, dim, adjacent, sums_bias)
        return dx, db if sums_bias else None, None, None, None


class LinearMaximum(Function):
    """A linear layer and the maximum over its pieces.  Saves its operands, and the winners, a byte each.

    The backward pass is that of the linear layer of all pieces, with a gradient that is zero but for the winners.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, seed: Tensor | None, p: float) -> Tensor:
        y: Tensor
        y, winner = _linear(x, weight, bias, seed, p, True)
        needs_x, needs_weight, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None, winner)
        ctx.pieces, ctx.p = weight.shape[0], p
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        x, weight, winner = ctx.saved_tensors
        sums_bias = ctx.needs_input_grad[2]
        if torch.is_grad_enabled():
            return *_differentiable_gradients(g, winner, x, weight, ctx.pieces, ctx.p, sums_bias), None, None
        dx, dw, db = _linear_backward(g, winner, x, weight, ctx.pieces, ctx.p, sums_bias)
        return dx if weight is not None else None, dw if x is not None else None, db if sums_bias else None, None, None


def _differentiable_gradients(
    g: Tensor, winner: Tensor, x: Tensor | None, weight: Tensor | None, pieces: int, p: float, sums_bias: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    units = g.shape[-1]
    kept = g / (1 - p) if p < 1 else g * 0
    dz, db = _expand(kept.reshape(-1, units), winner.view(-1, units), pieces, 1, False, sums_bias)
    dx = dw = None
    if weight is not None:
        dx = (dz @ weight.flatten(0, 1)).view(*g.shape[:-1], weight.shape[2])
    if x is not None:
        dw = (dz.t() @ x.reshape(len(dz), -1)).view(pieces, units, -1)
    return dx, dw, db


# --- Functions ------------------------------------------------------------------------------------------------------


@or_stock
def maxout(input: Tensor, pieces: int, dim: int = -1) -> Tensor:
    """The maximum over groups of ``pieces`` adjacent features: y_i = max(x_(pieces i), ..., x_(pieces i + pieces - 1)).

    Args:
        input: any shape with at least one dimension; channels are dimension 1 of (N, C, *).
        pieces: features per group; divides the size of ``dim``.
        dim: the dimension of the features.

    Returns:
        The maxima, in the memory format of the input; ``dim`` is ``pieces`` times smaller.  A NaN wins, as in
        ``torch.amax``; the gradient goes to the first of equal features.  Saves one byte for each maximum.

    Raises:
        ValueError: ``pieces`` is not a positive integer, or doesn't divide the size of ``dim``.
        IndexError: there is no dimension ``dim``.

    Source: Goodfellow et al., "Maxout Networks" (ICML 2013).
    """
    size = input.size(dim)
    if type(pieces) is not int or pieces < 1:
        raise ValueError(f"pieces must be a positive integer, not {pieces!r}")
    if size % pieces:
        raise ValueError(f"{pieces} pieces don't divide the {size} features of dimension {dim}")
    dim %= input.dim()
    if not takes_kernel("maxout", input, refusal=lambda: _refusal(pieces)):
        return _first_maximum(input.unflatten(dim, (size // pieces, pieces)), dim + 1)
    return _apply_maximum(input, None, pieces, dim, adjacent=True)


@or_stock
def maxout_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None, *, dropout: float = 0.0) -> Tensor:
    """y = max over p of (x W_p^T + b_p): the maximum over the pieces of linear layers that share their input.

    Args:
        input: (*, in_features).
        weight: (pieces, out_features, in_features).
        bias: (pieces, out_features), or None.
        dropout: the probability with which each maximum is dropped; the others are multiplied by 1 / (1 - dropout).

    Returns:
        (*, out_features).  A NaN wins, as in ``torch.amax``; the gradient goes to the first of equal pieces.  Autocast
        computes in its low precision, as it does in a linear layer.  Saves input and weight, and one byte for each
        maximum.

    Raises:
        ValueError: the weight isn't 3-dimensional, or the bias isn't of the weight's first two sizes; ``dropout`` is
            not a probability.
        RuntimeError: as `torch.nn.functional.linear`.

    Source: Goodfellow et al., "Maxout Networks" (ICML 2013).
    """
    _check_weight(weight, bias, 3)
    if not 0.0 <= dropout <= 1.0:
        raise ValueError(f"dropout must be a probability, not {dropout}")
    pieces, units, features = weight.shape
    input, weight, bias = in_low_precision(input, weight, bias)
    operands = (input, weight) if bias is None else (input, weight, bias)

    def refusal() -> str | None:
        if input.dim() == 0 or input.shape[-1] != features:
            return "the input hasn't as many features as the weight"
        return "no elements" if units == 0 else _refusal(pieces)

    if not takes_kernel("maxout_linear", *operands, refusal=refusal):
        products = F.linear(input, weight.flatten(0, 1), None if bias is None else bias.flatten())
        return F.dropout(_first_maximum(products.unflatten(-1, (pieces, units)), -2), dropout)

    report_stock("linear", lambda: linear_maxout.fused_refusal(features, pieces, input.dtype, device_of(input)))

    def compute(seed: Tensor | None) -> Tensor:
        y: Tensor
        if torch.is_grad_enabled() and any(operand.requires_grad for operand in operands):
            y = LinearMaximum.apply(input, weight, bias, seed, float(dropout))
        else:
            y, _ = _linear(input, weight, bias, seed, float(dropout), False)
        return y

    return with_seed(input.device, compute) if dropout else compute(None)


@or_stock
def maxout_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """The maximum over the pieces of convolutions that share their input.

    Args:
        input: (N, in_channels, H, W) or (in_channels, H, W).
        weight: (pieces, out_channels, in_channels / groups, kernel height, kernel width).
        bias: (pieces, out_channels), or None.
        stride, padding, dilation, groups: as `torch.nn.functional.conv2d`'s.

    Returns:
        (N, out_channels, H', W') or (out_channels, H', W'), in the memory format of the convolution's output.  A NaN
        wins, as in ``torch.amax``; the gradient goes to the first of equal pieces.  Autocast computes in its low
        precision.  The convolution is PyTorch's; one pass adds the bias and takes the maximum, and saves one byte for
        each.

    Raises:
        ValueError: the weight isn't 5-dimensional, or the bias isn't of the weight's first two sizes.
        RuntimeError: as `torch.nn.functional.conv2d`.

    Source: Goodfellow et al., "Maxout Networks" (ICML 2013).
    """
    _check_weight(weight, bias, 5)
    pieces = weight.shape[0]
    input, weight, bias = in_low_precision(input, weight, bias)
    operands = (input, weight) if bias is None else (input, weight, bias)
    takes = takes_kernel("maxout_conv2d", *operands, refusal=lambda: _refusal(pieces))
    fused = takes and groups == 1
    added = None if fused or bias is None else _as_channels(bias, groups)
    products = F.conv2d(input, _as_channels(weight, groups), added, stride, padding, dilation, groups)
    dim = products.dim() - 3
    if fused:
        return _apply_maximum(products, bias, pieces, dim, adjacent=False)
    products = products.unflatten(dim, (groups, products.shape[dim] // groups))
    if takes:
        maxima = _apply_maximum(products, None, pieces, dim + 1, adjacent=False)
    else:
        maxima = _first_maximum(products.unflatten(dim + 1, (pieces, -1)), dim + 1)
    return maxima.flatten(dim, dim + 1)


def _first_maximum(x: Tensor, dim: int) -> Tensor:
    """PyTorch's maximum whose gradient goes to the first of equal elements, in the memory order of ``x``."""
    order = sorted(range(x.dim()), key=x.stride, reverse=True)
    dim %= x.dim()
    maxima: Tensor = x.permute(order).max(order.index(dim)).values
    order.remove(dim)
    return maxima.permute([order.index(kept) for kept in sorted(order)])


def _apply_maximum(x: Tensor, bias: Tensor | None, pieces: int, dim: int, *, adjacent: bool) -> Tensor:
    y: Tensor
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        y = Maximum.apply(x, bias, pieces, dim, adjacent)
    else:
        y, _ = _maximum(x, bias, pieces, dim, adjacent, False)
    return y


def _refusal(pieces: int) -> str | None:
    if pieces == 1:
        return "one piece is its own maximum"
    return None if pieces <= kernels.MOST_PIECES else f"more than {kernels.MOST_PIECES} pieces"


def _check_weight(weight: Tensor, bias: Tensor | None, dimensions: int) -> None:
    if weight.dim() != dimensions or weight.shape[0] == 0:
        raise ValueError(f"the weight must have {dimensions} dimensions, pieces first, not {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:2]:
        raise ValueError(f"the bias must be {tuple(weight.shape[:2])}, not {tuple(bias.shape)}")


def _as_channels(parameter: Tensor, groups: int) -> Tensor:
    """(pieces, channels, *) as (pieces channels, *).  A group is a run of channels, which must hold all pieces."""
    if groups > 1:
        by_group: Tensor = parameter.unflatten(1, (groups, -1))
        parameter = by_group.transpose(0, 1).flatten(0, 1)
    return parameter.flatten(0, 1)
