"""Negative log likelihood: the loss of class indices, given log-probabilities.

Whatever its shape, the input is seen as (samples, classes, places).  A position, which is a sample and a place, has one
target, and picks one element of the input.  So a forward pass reads the targets and one element for each, not the whole
input; the backward pass fills the gradient with zeros, and writes one element for each target.
"""

from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .base._triton import tl, triton
from .base.launch import COMPUTE, DTYPES, TRITON_TYPE, Configuration, configure, kernel, launch, ships
from .base.numerics import divide, narrow, negative, require, widen
from .base.partial_sums import combine, divisor_of, finish_sum, sum_programs
from .base.tiles import cdiv

__all__ = ["LARGEST_PLACES", "Reduction", "nll_loss", "nll_loss_backward", "nll_loss_reduced", "zero_gradient"]

#: "mean" divides by the sum of the weights of the targets that count.
Reduction = Literal["none", "mean", "sum"]

_BLOCK = 1024
#: Places of a sample that positions inside a block can be counted with in 32 bits.
LARGEST_PLACES = 2**31 - _BLOCK - 1


@triton.jit
def load_targets(
    t_pointer,
    weight_pointer,
    start,
    offsets,
    positions,
    classes,
    ignore_index,
    has_weight,
    CHECK: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Targets of a block, which of them count, and their weights (0 for those that don't)."""
    inside = offsets < positions - start
    t = tl.load(t_pointer + start + offsets, mask=inside, other=0)
    counts = inside & (t != ignore_index)
    valid = (t >= 0) & (t < classes)
    if CHECK:
        require(valid | (counts == 0), "negative log likelihood: target is out of bounds")
    counts = counts & valid
    if has_weight:
        w = widen(tl.load(weight_pointer + t, mask=counts, other=0), COMPUTE)
    else:
        w = counts.to(COMPUTE)
    return t, counts, w


@triton.jit
def picked(start, offsets, t, places, sample_stride, class_stride, place_stride):
    """Offsets of the elements that the targets pick."""
    # Only the block's start needs 64 bits to be divided.
    place = (start % places).to(tl.int32) + offsets
    sample = start // places + place // places
    return sample * sample_stride + t * class_stride + (place % places).to(tl.int64) * place_stride


@kernel
def nll_loss_kernel(
    x_pointer,  # log-probabilities
    t_pointer,  # targets, flat
    weight_pointer,  # weights of the classes, or anything where not ``has_weight``
    y_pointer,  # loss of each position, flat
    positions: tl.int64,
    places: tl.int32,
    classes: tl.int64,
    sample_stride: tl.int64,
    class_stride: tl.int64,
    place_stride: tl.int64,
    ignore_index: tl.int64,
    has_weight: tl.int32,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = tl.arange(0, BLOCK)
    t, counts, w = load_targets(
        t_pointer, weight_pointer, start, offsets, positions, classes, ignore_index, has_weight, True, COMPUTE
    )
    elements = picked(start, offsets, t, places, sample_stride, class_stride, place_stride)
    x = widen(tl.load(x_pointer + elements, mask=counts, other=0), COMPUTE)
    y = tl.where(counts, negative(w) * x, 0.0)
    tl.store(y_pointer + start + offsets, narrow(y, y_pointer.dtype.element_ty), mask=offsets < positions - start)


@kernel
def nll_loss_sum_kernel(
    x_pointer,  # log-probabilities
    t_pointer,  # targets, flat
    weight_pointer,  # weights of the classes, or anything where not ``has_weight``
    partial_pointer,  # partial sums, see `partial_sums`
    value_pointer,  # the loss, one element
    weight_total_pointer,  # sum of the targets' weights, one element; written where ``divisor`` is 0
    positions: tl.int64,
    places: tl.int32,
    classes: tl.int64,
    sample_stride: tl.int64,
    class_stride: tl.int64,
    place_stride: tl.int64,
    ignore_index: tl.int64,
    has_weight: tl.int32,
    divisor: tl.float64,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    totals = tl.zeros((BLOCK,), COMPUTE)
    weight_totals = tl.zeros((BLOCK,), COMPUTE)
    offsets = tl.arange(0, BLOCK)
    first = tl.program_id(0).to(tl.int64)
    for block in range(first, tl.cdiv(positions, BLOCK), tl.num_programs(0).to(tl.int64)):
        start = block * BLOCK
        t, counts, w = load_targets(
            t_pointer, weight_pointer, start, offsets, positions, classes, ignore_index, has_weight, True, COMPUTE
        )
        elements = picked(start, offsets, t, places, sample_stride, class_stride, place_stride)
        x = widen(tl.load(x_pointer + elements, mask=counts, other=0), COMPUTE)
        totals += tl.where(counts, negative(w) * x, 0.0)
        weight_totals += w
    finish_sum(partial_pointer, value_pointer, weight_total_pointer, totals, weight_totals, divisor, COMPUTE)


@kernel
def nll_loss_backward_kernel(
    g_pointer,  # gradient of the loss: one element where ``g_repeats``, else flat
    t_pointer,  # targets, flat
    weight_pointer,  # weights of the classes, or anything where not ``has_weight``
    weight_total_pointer,  # sum of the targets' weights, one element; read where ``divisor`` is 0
    dx_pointer,  # gradient of the input, zero so far
    positions: tl.int64,
    places: tl.int32,
    classes: tl.int64,
    sample_stride: tl.int64,
    class_stride: tl.int64,
    place_stride: tl.int64,
    ignore_index: tl.int64,
    has_weight: tl.int32,
    g_repeats: tl.int32,
    divisor: tl.float64,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = tl.arange(0, BLOCK)
    divisor = divisor_of(divisor, weight_total_pointer, COMPUTE)
    t, counts, w = load_targets(
        t_pointer, weight_pointer, start, offsets, positions, classes, ignore_index, has_weight, False, COMPUTE
    )
    if g_repeats:
        g = tl.zeros((BLOCK,), COMPUTE) + divide(widen(tl.load(g_pointer), COMPUTE), divisor)
    else:
        g = widen(tl.load(g_pointer + start + offsets, mask=counts, other=0), COMPUTE)
    elements = picked(start, offsets, t, places, sample_stride, class_stride, place_stride)
    tl.store(dx_pointer + elements, narrow(negative(w) * g, dx_pointer.dtype.element_ty), mask=counts)


# --- Configurations -------------------------------------------------------------------------------------------------

_Kind = Literal["forward", "sum", "backward"]
_KERNELS = {"forward": nll_loss_kernel, "sum": nll_loss_sum_kernel, "backward": nll_loss_backward_kernel}


@cache
def _configuration(kind: _Kind, dtype: torch.dtype) -> Configuration:
    return configure(
        _KERNELS[kind],
        f"nll_loss {kind} {TRITON_TYPE[dtype]}",
        dtype,
        {"COMPUTE": COMPUTE[dtype], "BLOCK": _BLOCK},
        pointers={"t": torch.int64, "partial": torch.float64, "weight_total": torch.float64},
        threads=128,
        asserts=kind != "backward",
    )


@ships("nll_loss")
def configurations() -> Iterator[Configuration]:
    # The second stage of the sum is among those of `pointwise_loss`.
    kinds: tuple[_Kind, ...] = ("forward", "sum", "backward")
    for dtype in DTYPES:
        for kind in kinds:
            yield _configuration(kind, dtype)


# --- Launchers ------------------------------------------------------------------------------------------------------


class _Strides(NamedTuple):
    """Of a tensor seen as (samples, classes, places)."""

    sample: int
    category: int
    place: int


def _strides(x: Tensor) -> _Strides | None:
    """The strides of the input, or None where its places don't lie at a constant distance."""
    if x.dim() == 1:
        return _Strides(0, x.stride(0), 0)
    dims = [d for d in range(2, x.dim()) if x.shape[d] > 1]
    for outer, inner in pairwise(dims):
        if x.stride(outer) != x.stride(inner) * x.shape[inner]:
            return None
    return _Strides(x.stride(0), x.stride(1), x.stride(dims[-1]) if dims else 0)


def _extents(x: Tensor, strides: _Strides, target: Tensor, ignore_index: int, has_weight: bool) -> tuple[int, ...]:
    samples, classes = (1, x.shape[0]) if x.dim() == 1 else (x.shape[0], x.shape[1])
    return target.numel(), target.numel() // samples, classes, *strides, ignore_index, int(has_weight)


def _operands(x: Tensor, target: Tensor, weight: Tensor | None) -> tuple[Tensor, _Strides, Tensor, Tensor]:
    """The input as it is where its places lie regularly, else a copy; targets and weights contiguous."""
    strides = _strides(x)
    if strides is None:
        x = x.contiguous()
        strides = _strides(x)
        assert strides is not None
    return x, strides, target.contiguous(), x if weight is None else weight.contiguous()


def _blocks(target: Tensor) -> int:
    return cdiv(target.numel(), _BLOCK)


def nll_loss(x: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    """-weight[target] x[target] of each position, 0 where the target is ``ignore_index``; contiguous.

    Raises `DeviceAssertionError` in the interpreter where a target is out of bounds.
    """
    x, strides, target, weights = _operands(x, target, weight)
    y = torch.empty(target.shape, dtype=x.dtype, device=x.device)
    extents = _extents(x, strides, target, ignore_index, weight is not None)
    launch(_configuration("forward", x.dtype), _blocks(target), x, target, weights, y, *extents)
    return y


def nll_loss_reduced(
    x: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: Reduction
) -> tuple[Tensor, Tensor]:
    """Sum or mean of the losses, and the sum of the weights (of no meaning unless the mean needs it).

    Raises as `nll_loss` does.
    """
    x, strides, target, weights = _operands(x, target, weight)
    divisor = 0.0 if reduction == "mean" else 1.0
    programs = sum_programs(_blocks(target))
    partial = torch.empty((2, programs), dtype=torch.float64, device=x.device)
    value = torch.empty((), dtype=x.dtype, device=x.device)
    weight_total = torch.empty((), dtype=torch.float64, device=x.device)
    launch(
        _configuration("sum", x.dtype),
        programs,
        *(x, target, weights, partial, value, weight_total),
        *(*_extents(x, strides, target, ignore_index, weight is not None), divisor),
    )
    combine(partial, value, weight_total, divisor)
    return value, weight_total


def zero_gradient(x: Tensor) -> Tensor:
    """Zeros in the memory format of ``x`` where its places lie regularly there, else contiguous."""
    dx = torch.zeros_like(x)
    return dx if _strides(dx) is not None else x.new_zeros(x.shape)


def nll_loss_backward(
    g: Tensor,
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    weight_total: Tensor | None,
    ignore_index: int,
    reduction: Reduction,
) -> Tensor:
    """Gradient of the input; of ``x`` only shape, strides and dtype matter."""
    target = target.contiguous()
    dx = zero_gradient(x)
    strides = _strides(dx)
    assert strides is not None
    weights = dx if weight is None else weight.contiguous()
    if weight_total is None:
        weight_total = torch.empty((), dtype=torch.float64, device=x.device)
    launch(
        _configuration("backward", x.dtype),
        _blocks(target),
        *(g.contiguous(), target, weights, weight_total, dx),
        *_extents(dx, strides, target, ignore_index, weight is not None),
        *(int(reduction != "none"), 0.0 if reduction == "mean" else 1.0),
    )
    return dx
