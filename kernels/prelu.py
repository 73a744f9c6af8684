"""PReLU: leaky ReLU with learnt slopes, one for all elements or one per channel.

Whatever the memory order, a dense tensor is a matrix in which a channel is either a run of rows or a column:

====================  ==========================  ===============  ==============
layout                rows x columns              channel          `Slopes`
====================  ==========================  ===============  ==============
one slope             1 x numel (walked flat)     none             ``SINGLE``
(N, C, spatial)       (N C) x spatial             row % C          ``BY_ROW``
channels last, (N, C) (N spatial) x C             column           ``BY_COLUMN``
====================  ==========================  ===============  ==============

The backward pass reads the input and the gradient once, writes the input's gradient, and one partial sum of the slopes'
gradient for each channel and program; PyTorch's ``sum`` adds the partial sums in a fixed order.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from functools import cache

import torch
from torch import Tensor

from .base._triton import tl, triton
from .base.launch import ACCUMULATOR, COMPUTE, DTYPES, TRITON_TYPE, Configuration, configure, kernel, launch, ships
from .base.layout import dense, dense_like
from .base.numerics import widen
from .base.tiles import TILE, Tile, cdiv, load, matrix_tile, store, threads_for, tile_shape, width_for
from .functions.activation import leaky_relu_forward, leaky_relu_gradient, leaky_relu_mask

__all__ = ["prelu_backward", "prelu_forward"]


class Slopes(IntEnum):
    SINGLE = 0
    BY_ROW = 1
    BY_COLUMN = 2


_SINGLE = tl.constexpr(int(Slopes.SINGLE))
_BY_ROW = tl.constexpr(int(Slopes.BY_ROW))

# Row blocks that a program works through where channels are columns: their partial sums share one accumulator.
_STEPS_BY_COLUMN = 4


@triton.jit
def slope_tile(
    w_pointer,
    first_row,
    first_column,
    columns,
    channels,
    SLOPES: tl.constexpr,
    COMPUTE: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The slopes of a tile, broadcastable to (HEIGHT, WIDTH)."""
    if SLOPES == _SINGLE:
        slope = tl.load(w_pointer + tl.zeros((1, 1), tl.int32))
    elif SLOPES == _BY_ROW:
        slope = tl.load(w_pointer + (first_row + tl.arange(0, HEIGHT)) % channels)[:, None]
    else:
        column = first_column + tl.arange(0, WIDTH)
        slope = tl.load(w_pointer + column, mask=column < columns, other=0)[None, :]
    return widen(slope, COMPUTE)


@triton.jit
def tile_place(block_row, block_column, rows, columns, SLOPES: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """A tile of the matrix; of a single slope, which is walked flat, of a row as long as it."""
    if SLOPES == _SINGLE:
        start = block_column * WIDTH
        offsets = tl.arange(0, WIDTH)[None, :]
        return Tile(start, offsets, offsets < rows * columns - start, start + WIDTH <= rows * columns)
    else:
        return matrix_tile(block_row, block_column, rows, columns, HEIGHT, WIDTH)


@kernel
def prelu_forward_kernel(
    x_pointer,  # input, (rows, columns)
    w_pointer,  # slopes, (channels,)
    y_pointer,  # output, (rows, columns)
    rows: tl.int64,
    columns,
    channels: tl.int32,
    column_blocks: tl.int64,
    SLOPES: tl.constexpr,
    COMPUTE: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    STEPS: tl.constexpr,  # row blocks per program
):
    program = tl.program_id(0).to(tl.int64)
    block_column = program % column_blocks
    for step in range(STEPS):
        block_row = program // column_blocks * STEPS + step
        tile = tile_place(block_row, block_column, rows, columns, SLOPES, HEIGHT, WIDTH)
        slope = slope_tile(
            w_pointer, block_row * HEIGHT, block_column * WIDTH, columns, channels, SLOPES, COMPUTE, HEIGHT, WIDTH
        )
        x = load(x_pointer, tile, COMPUTE)
        y = leaky_relu_forward(x, slope, slope)
        store(y_pointer, tile, y)


@kernel
def prelu_backward_kernel(
    g_pointer,  # gradient of the output, (rows, columns)
    x_pointer,  # input, (rows, columns)
    w_pointer,  # slopes, (channels,)
    dx_pointer,  # gradient of the input, (rows, columns)
    partial_pointer,  # partial sums of the slopes' gradient, see `_partial_shape`
    rows: tl.int64,
    columns,
    channels: tl.int32,
    column_blocks: tl.int64,
    SLOPES: tl.constexpr,
    COMPUTE: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    STEPS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    block_column = program % column_blocks
    by_column = tl.zeros((WIDTH,), COMPUTE)
    for step in range(STEPS):
        block_row = program // column_blocks * STEPS + step
        tile = tile_place(block_row, block_column, rows, columns, SLOPES, HEIGHT, WIDTH)
        slope = slope_tile(
            w_pointer, block_row * HEIGHT, block_column * WIDTH, columns, channels, SLOPES, COMPUTE, HEIGHT, WIDTH
        )
        g = load(g_pointer, tile, COMPUTE)
        x = load(x_pointer, tile, COMPUTE)
        kept = leaky_relu_mask(x, slope, slope)
        dx = leaky_relu_gradient(g, kept, slope, slope)
        store(dx_pointer, tile, dx)

        dw = tl.where(kept, 0.0, g * x)
        if SLOPES == _SINGLE:
            tl.store(partial_pointer + program, tl.sum(tl.sum(dw, axis=1), axis=0))
        elif SLOPES == _BY_ROW:
            row = block_row * HEIGHT + tl.arange(0, HEIGHT)
            tl.store(partial_pointer + row * column_blocks + block_column, tl.sum(dw, axis=1), mask=row < rows)
        else:
            by_column += tl.sum(dw, axis=0)
    if SLOPES != _SINGLE and SLOPES != _BY_ROW:
        column = block_column * WIDTH + tl.arange(0, WIDTH)
        tl.store(partial_pointer + program // column_blocks * columns + column, by_column, mask=column < columns)


# --- Configurations and launchers -----------------------------------------------------------------------------------

# Widths of a tile by row or column.
_WIDTHS = (16, 64, 256)


def _widths(slopes: Slopes) -> tuple[int, ...]:
    if slopes is Slopes.SINGLE:
        return (TILE,)
    return (*_WIDTHS, TILE) if slopes is Slopes.BY_ROW else _WIDTHS


@cache
def _configuration(direction: str, dtype: torch.dtype, slopes: Slopes, width: int) -> Configuration:
    code, reads = (prelu_forward_kernel, 1) if direction == "forward" else (prelu_backward_kernel, 2)
    # A row of 16 elements is narrower than the accesses of a warp; wide ones are promised from 64 on.
    wide = tile_shape(dtype)[0] if width >= 64 else 0
    return configure(
        code,
        f"prelu {direction} {slopes.name.lower()} x{width} {TRITON_TYPE[dtype]}",
        dtype,
        {
            "SLOPES": int(slopes),
            "COMPUTE": COMPUTE[dtype],
            "HEIGHT": TILE // width,
            "WIDTH": width,
            "STEPS": _STEPS_BY_COLUMN if slopes is Slopes.BY_COLUMN else 1,
        },
        pointers={"partial": ACCUMULATOR[dtype]},
        threads=threads_for(dtype),
        divisible=() if slopes is Slopes.SINGLE else None,
        wide_loads=reads * wide,
        wide_stores=wide,
    )


@ships("prelu")
def configurations() -> Iterator[Configuration]:
    for direction in ("forward", "backward"):
        for dtype in DTYPES:
            for slopes in Slopes:
                for width in _widths(slopes):
                    yield _configuration(direction, dtype, slopes, width)


@dataclass(frozen=True)
class _Plan:
    """A dense tensor seen as a matrix, and its division into programs."""

    configuration: Configuration
    slopes: Slopes
    rows: int
    columns: int
    channels: int
    row_programs: int
    column_blocks: int

    @property
    def programs(self) -> int:
        return self.row_programs * self.column_blocks

    @property
    def extents(self) -> tuple[int, int, int, int]:
        return self.rows, self.columns, self.channels, self.column_blocks


def _plan(direction: str, x: Tensor, weight: Tensor) -> _Plan:
    numel, channels = x.numel(), weight.numel()
    if channels == 1:
        slopes, rows, columns = Slopes.SINGLE, numel, 1
        width = width_for(numel, _widths(slopes))
        configuration = _configuration(direction, x.dtype, slopes, width)
        return _Plan(configuration, slopes, rows, columns, 1, 1, cdiv(numel, width))
    # Dense memory: the dimensions inside a channel span its stride, whatever their order.
    inner = x.stride(1)
    slopes = Slopes.BY_COLUMN if inner == 1 else Slopes.BY_ROW
    columns = channels if inner == 1 else inner
    rows = numel // columns
    configuration = _configuration(direction, x.dtype, slopes, width_for(columns, _widths(slopes)))
    constants = dict(configuration.constants)
    row_programs = cdiv(rows, constants["HEIGHT"] * constants["STEPS"])
    return _Plan(configuration, slopes, rows, columns, channels, row_programs, cdiv(columns, constants["WIDTH"]))


def prelu_forward(x: Tensor, weight: Tensor) -> Tensor:
    """max(0, x) + weight * min(0, x), with one slope or one per channel (dimension 1)."""
    x, weight = dense(x), weight.contiguous()
    y = torch.empty_like(x)
    if x.numel():
        plan = _plan("forward", x, weight)
        launch(plan.configuration, plan.programs, x, weight, y, *plan.extents)
    return y


def prelu_backward(g: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the input and of the slopes."""
    x, weight = dense(x), weight.contiguous()
    g = dense_like(g, x.stride())
    dx = torch.empty_like(x)
    if not x.numel():
        return dx, torch.zeros_like(weight)
    plan = _plan("backward", x, weight)
    accumulator = ACCUMULATOR[x.dtype]
    partial = torch.empty(_partial_shape(plan), dtype=accumulator, device=x.device)
    launch(plan.configuration, plan.programs, g, x, weight, dx, partial, *plan.extents)
    if plan.slopes is Slopes.BY_ROW:
        dw = partial.view(-1, plan.channels, plan.column_blocks).sum((0, 2))
    else:
        dw = partial.sum(0)
    return dx, dw.to(weight.dtype).view(weight.shape)


def _partial_shape(plan: _Plan) -> tuple[int, int]:
    """One partial sum for each channel that a program sees."""
    if plan.slopes is Slopes.SINGLE:
        return plan.programs, 1
    if plan.slopes is Slopes.BY_ROW:
        return plan.rows, plan.column_blocks
    return plan.row_programs, plan.columns
