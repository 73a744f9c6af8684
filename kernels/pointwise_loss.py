"""Pointwise losses: the three kernels that apply a row of `LOSSES`, element by element, summed, and backward.

Weights multiply the value.  They may be one for each element, or repeat: a weight per class, per sample, or one for
all, which are read as they are and never expanded in memory (`Weights`).
"""

from collections.abc import Iterator
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .base._triton import tl, triton
from .base.launch import DTYPES, Configuration, kernel, launch, ships
from .base.layout import dense, dense_like
from .base.numerics import divide, require, scalar, widen
from .base.partial_sums import combination, combine, divisor_of, finish_sum, sum_programs
from .base.tiles import TILE, configure_flat, flat_tile, load, place_tile, programs_for, store
from .functions.loss import LOSSES, Reduction

__all__ = ["divisor", "pointwise_loss", "pointwise_loss_backward", "pointwise_loss_reduced"]

# --- Kernels --------------------------------------------------------------------------------------------------------


class Weights(NamedTuple):
    """Weights as the kernels read them: the flat element i has the weight ``memory[i // inner % period]``.

    No weights: period 0.  One for each element: inner 0, in the memory order of the input.
    """

    memory: Any
    inner: Any
    period: Any


@triton.jit
def load_weights(weights, tile, COMPUTE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The `Weights` of a tile."""
    if weights.period == 0:
        values = tl.full((ROWS, COLUMNS), 1.0, COMPUTE)
    elif weights.inner == 0:
        values = load(weights.memory, tile, COMPUTE)
    else:
        first = (tile.start % (weights.inner.to(tl.int64) * weights.period)).to(tl.int32)
        places = (first + tile.offsets) // weights.inner % weights.period
        values = widen(tl.load(weights.memory + places), COMPUTE)
    return values


@triton.jit
def load_operands(x_pointer, t_pointer, weight, positive, tile, POSITIVE, COMPUTE, ROWS, COLUMNS):
    """Input, target, weights, and weights of positive targets (where ``POSITIVE``), of a tile."""
    # Widened only when the weights are there: until then they take half the registers.
    x = load(x_pointer, tile, x_pointer.dtype.element_ty)
    t = load(t_pointer, tile, t_pointer.dtype.element_ty)
    w = load_weights(weight, tile, COMPUTE, ROWS, COLUMNS)
    p = w
    if POSITIVE:
        p = load_weights(positive, tile, COMPUTE, ROWS, COLUMNS)
    return widen(x, COMPUTE), widen(t, COMPUTE), w, p


@kernel
def pointwise_loss_kernel(
    x_pointer,  # input, flat
    t_pointer,  # target, flat
    weight_pointer,  # weights, or anything where there are none
    positive_pointer,  # weights of positive targets, or anything
    y_pointer,  # loss of each element, flat
    numel: tl.int64,
    weight_inner: tl.int32,
    weight_period: tl.int32,
    positive_inner: tl.int32,
    positive_period: tl.int32,
    a: tl.float64,
    b: tl.float64,
    VALUE: tl.constexpr,
    VALID: tl.constexpr,
    COMPLAINT: tl.constexpr,
    POSITIVE: tl.constexpr,  # VALUE uses the weights of positive targets
    COMPUTE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    _, tile = flat_tile(numel, ROWS, COLUMNS)
    a, b = scalar(a, COMPUTE), scalar(b, COMPUTE)

    weight = Weights(weight_pointer, weight_inner, weight_period)
    positive = Weights(positive_pointer, positive_inner, positive_period)
    x, t, w, p = load_operands(x_pointer, t_pointer, weight, positive, tile, POSITIVE, COMPUTE, ROWS, COLUMNS)
    if VALID is not None:
        require(VALID(x, t), COMPLAINT)
    y = w * VALUE(x, t, p, a, b)
    store(y_pointer, tile, y)


@kernel
def pointwise_loss_sum_kernel(
    x_pointer,  # input, flat
    t_pointer,  # target, flat
    weight_pointer,  # weights, or anything where there are none
    positive_pointer,  # weights of positive targets, or anything
    partial_pointer,  # partial sums, see `partial_sums`
    value_pointer,  # the loss, one element
    weight_total_pointer,  # sum of the weights, one element; written where ``divisor`` is 0
    numel: tl.int64,
    weight_inner: tl.int32,
    weight_period: tl.int32,
    positive_inner: tl.int32,
    positive_period: tl.int32,
    divisor: tl.float64,
    a: tl.float64,
    b: tl.float64,
    VALUE: tl.constexpr,
    VALID: tl.constexpr,
    COMPLAINT: tl.constexpr,
    POSITIVE: tl.constexpr,
    COMPUTE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    a, b = scalar(a, COMPUTE), scalar(b, COMPUTE)
    weight = Weights(weight_pointer, weight_inner, weight_period)
    positive = Weights(positive_pointer, positive_inner, positive_period)
    totals = tl.zeros((COLUMNS,), COMPUTE)
    weight_totals = tl.zeros((COLUMNS,), COMPUTE)
    first = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(numel, ROWS * COLUMNS)
    # Hoisted out of the loop, the addresses of the masked branches would take twice the registers.
    for tile_index in tl.range(first, tiles, tl.num_programs(0).to(tl.int64), disable_licm=True):
        tile = place_tile(tile_index, numel, ROWS, COLUMNS)
        x, t, w, p = load_operands(x_pointer, t_pointer, weight, positive, tile, POSITIVE, COMPUTE, ROWS, COLUMNS)
        if VALID is not None:
            require(VALID(x, t), COMPLAINT)
        totals += tl.sum(tl.where(tile.inside, w * VALUE(x, t, p, a, b), 0.0), axis=0)
        weight_totals += tl.sum(tl.where(tile.inside, w, 0.0), axis=0)
    finish_sum(partial_pointer, value_pointer, weight_total_pointer, totals, weight_totals, divisor, COMPUTE)


@kernel
def pointwise_loss_backward_kernel(
    g_pointer,  # gradient of the loss: one element where ``g_repeats``, else flat
    x_pointer,  # input, flat
    t_pointer,  # target, flat
    weight_pointer,  # weights, or anything where there are none
    positive_pointer,  # weights of positive targets, or anything
    weight_total_pointer,  # sum of the weights, one element; read where ``divisor`` is 0
    dx_pointer,  # gradient of the input, flat; written where ``wants_dx``
    dt_pointer,  # gradient of the target, flat; written where ``wants_dt``
    numel: tl.int64,
    weight_inner: tl.int32,
    weight_period: tl.int32,
    positive_inner: tl.int32,
    positive_period: tl.int32,
    g_repeats: tl.int32,
    wants_dx: tl.int32,
    wants_dt: tl.int32,
    divisor: tl.float64,
    a: tl.float64,
    b: tl.float64,
    GRADIENT: tl.constexpr,
    TARGET_GRADIENT: tl.constexpr,
    POSITIVE: tl.constexpr,
    COMPUTE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    _, tile = flat_tile(numel, ROWS, COLUMNS)
    a, b = scalar(a, COMPUTE), scalar(b, COMPUTE)
    divisor = divisor_of(divisor, weight_total_pointer, COMPUTE)

    weight = Weights(weight_pointer, weight_inner, weight_period)
    positive = Weights(positive_pointer, positive_inner, positive_period)
    x, t, w, p = load_operands(x_pointer, t_pointer, weight, positive, tile, POSITIVE, COMPUTE, ROWS, COLUMNS)
    if g_repeats:
        g = divide(widen(tl.load(g_pointer), COMPUTE), divisor) * w
    else:
        g = load(g_pointer, tile, COMPUTE) * w
    if wants_dx:
        dx = g * GRADIENT(x, t, p, a, b)
        store(dx_pointer, tile, dx)
    if wants_dt:
        dt = g * TARGET_GRADIENT(x, t, p, a, b)
        store(dt_pointer, tile, dt)


# --- Configurations -------------------------------------------------------------------------------------------------

_Kind = Literal["forward", "sum", "backward"]
_KERNELS = {
    "forward": pointwise_loss_kernel,
    "sum": pointwise_loss_sum_kernel,
    "backward": pointwise_loss_backward_kernel,
}


@cache
def _configuration(kind: _Kind, name: str, dtype: torch.dtype) -> Configuration:
    row = LOSSES[name]
    checks = row.valid is not None and kind != "backward"
    if kind == "backward":
        functions = {"GRADIENT": row.gradient, "TARGET_GRADIENT": row.target_gradient}
    else:
        functions = {"VALUE": row.value_for(dtype), "VALID": row.valid, "COMPLAINT": row.complaint}
    return configure_flat(
        _KERNELS[kind],
        f"{name} {kind}",
        dtype,
        {**functions, "POSITIVE": row.uses_positive_weight},
        pointers={"partial": torch.float64, "weight_total": torch.float64},
        loads=2,
        stores=0 if kind == "sum" else 1,
        asserts=checks,
    )


@ships("pointwise_loss")
def configurations() -> Iterator[Configuration]:
    for dtype in DTYPES:
        for name in LOSSES:
            for kind in _KERNELS:
                yield _configuration(kind, name, dtype)
        yield combination(dtype)


# --- Operands -------------------------------------------------------------------------------------------------------


def _weights(weight: Tensor | None, x: Tensor) -> Weights:
    """``weight``, which broadcasts to the shape of the dense ``x``, in the memory order of ``x``."""
    if weight is None:
        return Weights(x, 0, 0)
    # Dimensions from the outermost in memory to the innermost, without those of one element.
    expanded = weight.expand(x.shape)
    order = sorted((d for d in range(x.dim()) if x.shape[d] > 1), key=lambda d: x.stride()[d], reverse=True)
    varies = [expanded.stride(d) != 0 for d in order]
    outer = varies.index(True) if any(varies) else len(order)
    last = len(order) - varies[::-1].index(True) if any(varies) else len(order)
    kept, repeated = order[outer:last], order[:outer] + order[last:]
    inner, period = (_product(x.shape[d] for d in dims) for dims in (order[last:], kept))
    if not repeated or not all(varies[outer:last]) or inner * period >= 2**31 - TILE:
        return Weights(dense_like(expanded, x.stride()), 0, 1)
    values = expanded.permute(*kept, *(d for d in range(x.dim()) if d not in kept))
    return Weights(values.flatten(len(kept))[..., 0].contiguous(), inner, period)


def _product(sizes: Iterator[int]) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product


def divisor(reduction: Reduction, x: Tensor) -> float:
    """What the sum is divided by; 0 for the sum of the weights."""
    if reduction == "weighted_mean":
        return 0.0
    if reduction == "batchmean":
        return float(x.shape[0]) if x.dim() else 1.0
    return float(x.numel()) if reduction == "mean" else 1.0


# --- Launchers ------------------------------------------------------------------------------------------------------


def pointwise_loss(
    x: Tensor, target: Tensor, weight: Tensor | None, positive_weight: Tensor | None, name: str, a: float, b: float
) -> Tensor:
    """The loss of each element, in the memory order of ``x``.

    Raises `DeviceAssertionError` in the interpreter where an operand is out of the loss's range.
    """
    x = dense(x)
    target = dense_like(target, x.stride())
    (w, *w_extents), (p, *p_extents) = _weights(weight, x), _weights(positive_weight, x)
    y = torch.empty_like(x)
    configuration = _configuration("forward", name, x.dtype)
    launch(configuration, programs_for(x.numel()), x, target, w, p, y, x.numel(), *w_extents, *p_extents, a, b)
    return y


def pointwise_loss_reduced(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    positive_weight: Tensor | None,
    name: str,
    a: float,
    b: float,
    reduction: Reduction,
) -> tuple[Tensor, Tensor]:
    """The sum or mean of the losses, and the sum of the weights (of no meaning unless "weighted_mean" needs it).

    Raises as `pointwise_loss` does.
    """
    x = dense(x)
    target = dense_like(target, x.stride())
    (w, *w_extents), (p, *p_extents) = _weights(weight, x), _weights(positive_weight, x)
    count = divisor(reduction, x)
    programs = sum_programs(programs_for(x.numel()))
    partial = torch.empty((2, programs), dtype=torch.float64, device=x.device)
    value = torch.empty((), dtype=x.dtype, device=x.device)
    weight_total = torch.empty((), dtype=torch.float64, device=x.device)
    launch(
        _configuration("sum", name, x.dtype),
        programs,
        *(x, target, w, p, partial, value, weight_total),
        *(x.numel(), *w_extents, *p_extents, count, a, b),
    )
    combine(partial, value, weight_total, count)
    return value, weight_total


def pointwise_loss_backward(
    g: Tensor,
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    positive_weight: Tensor | None,
    weight_total: Tensor | None,
    name: str,
    a: float,
    b: float,
    reduction: Reduction,
    wants_dx: bool,
    wants_dt: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of the input and of the target; one that isn't wanted is empty."""
    x = dense(x)
    target = dense_like(target, x.stride())
    (w, *w_extents), (p, *p_extents) = _weights(weight, x), _weights(positive_weight, x)
    if reduction == "none":
        g = dense_like(g, x.stride())
    if weight_total is None:
        weight_total = torch.empty((), dtype=torch.float64, device=x.device)
    dx = torch.empty_like(x) if wants_dx else x.new_empty(0)
    dt = torch.empty_like(x) if wants_dt else x.new_empty(0)
    launch(
        _configuration("backward", name, x.dtype),
        programs_for(x.numel()),
        *(g, x, target, w, p, weight_total, dx, dt),
        *(x.numel(), *w_extents, *p_extents),
        *(int(reduction != "none"), int(wants_dx), int(wants_dt)),
        *(divisor(reduction, x), a, b),
    )
    return dx, dt
