"""Sums over a whole tensor, in two stages and a fixed order.

At most `SUM_PROGRAMS` programs walk over the tensor in strides, and leave a partial sum each (and one of the weights
beside); a second launch of a single program adds those.  A small tensor needs one program only, which then writes the
result itself.  How many programs there are follows from the size alone, not from the GPU: so do the bits of the result.

A lane adds its elements in the type of the arithmetic; from there on sums are float64, which is free where there are so
few of them, and leaves little of the rounding where large terms cancel.
"""

from functools import cache

import torch
from torch import Tensor

from ._triton import tl, triton
from .launch import COMPUTE, TRITON_TYPE, Configuration, configure, kernel, launch
from .numerics import narrow, scalar

__all__ = ["SUM_PROGRAMS", "combination", "combine", "divisor_of", "finish_sum", "sum_programs"]

#: Enough programs to fill any GPU, few enough for one program to add their sums at once.
SUM_PROGRAMS = 1024
# Up to here the sum is latency, and a second launch costs more than it saves.
_TILES_OF_ONE_PROGRAM = 4


def sum_programs(tiles: int) -> int:
    """Programs for the first stage of a sum over so many tiles."""
    return 1 if tiles <= _TILES_OF_ONE_PROGRAM else min(tiles, SUM_PROGRAMS)


@triton.jit
def store_quotient(value_pointer, weight_total_pointer, total, weight_total, divisor, COMPUTE: tl.constexpr):
    """Store total / divisor.  A divisor of 0 stands for the sum of the weights, which is stored too."""
    if divisor == 0:
        tl.store(weight_total_pointer, weight_total)
        divisor = weight_total
    tl.store(value_pointer, narrow((total / divisor).to(COMPUTE), value_pointer.dtype.element_ty))


@triton.jit
def finish_sum(
    partial_pointer, value_pointer, weight_total_pointer, totals, weight_totals, divisor, COMPUTE: tl.constexpr
):
    """End of the first stage: add the lanes, and store their sums, or the result where this is the only program."""
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    total = tl.sum(totals.to(tl.float64), axis=0)
    weight_total = tl.sum(weight_totals.to(tl.float64), axis=0)
    if programs == 1:
        store_quotient(value_pointer, weight_total_pointer, total, weight_total, divisor, COMPUTE)
    else:
        tl.store(partial_pointer + program, total)
        tl.store(partial_pointer + programs + program, weight_total)


@triton.jit
def divisor_of(divisor, weight_total_pointer, COMPUTE: tl.constexpr):
    """What a sum was divided by: ``divisor``, or where that is 0, the sum of the weights."""
    divisor = scalar(divisor, COMPUTE)
    if divisor == 0:
        divisor = tl.load(weight_total_pointer).to(COMPUTE)
    return divisor


@kernel
def combine_kernel(
    partial_pointer,  # partial sums, then partial sums of the weights, (2, programs)
    value_pointer,  # the result, one element
    weight_total_pointer,  # sum of the weights, one element; written where ``divisor`` is 0
    programs: tl.int32,
    divisor: tl.float64,
    COMPUTE: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    program = tl.arange(0, PROGRAMS)
    partial = tl.load(partial_pointer + program, mask=program < programs, other=0)
    partial_weights = tl.load(partial_pointer + programs + program, mask=program < programs, other=0)
    total = tl.sum(partial, axis=0)
    weight_total = tl.sum(partial_weights, axis=0)
    store_quotient(value_pointer, weight_total_pointer, total, weight_total, divisor, COMPUTE)


@cache
def combination(dtype: torch.dtype) -> Configuration:
    """The second stage, for a result of ``dtype``."""
    return configure(
        combine_kernel,
        f"combine partial sums {TRITON_TYPE[dtype]}",
        dtype,
        {"COMPUTE": COMPUTE[dtype], "PROGRAMS": SUM_PROGRAMS},
        pointers={"partial": torch.float64, "weight_total": torch.float64},
        threads=128,
    )


def combine(partial: Tensor, value: Tensor, weight_total: Tensor, divisor: float) -> None:
    """Add what the programs of the first stage left in ``partial`` (2, programs), and divide it by ``divisor``.

    Nothing is left to do after a single program.
    """
    programs = partial.shape[1]
    if programs > 1:
        launch(combination(value.dtype), 1, partial, value, weight_total, programs, divisor)
