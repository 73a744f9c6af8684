"""PReLU: leaky ReLU with learnt slopes, one for all elements or one per channel.

Whatever the memory order, a dense tensor is a matrix in which a channel is a row in so many or a column (see
`ChannelMatrix` in ``base/channels.py``); a single slope has one row.

The backward pass reads the input and the gradient once, writes the input's gradient, and one partial sum of the slopes'
gradient for each channel and program; PyTorch's ``sum`` adds the partial sums in a fixed order.
"""

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from .base._triton import tl
from .base.channels import ChannelMatrix, channel_matrix, channel_values, sums_tile
from .base.launch import ACCUMULATOR, COMPUTE, DTYPES, TRITON_TYPE, Configuration, configure, kernel, launch, ships
from .base.layout import dense, dense_like
from .base.tiles import TILE, aligned, load, matrix_tile, store, threads_for, tile_shape
from .functions.activation import leaky_relu_forward, leaky_relu_gradient, leaky_relu_mask

__all__ = ["prelu_backward", "prelu_forward"]


@kernel
def prelu_forward_kernel(
    x_pointer,  # input, (rows, columns)
    w_pointer,  # slopes, (channels,)
    y_pointer,  # output, (rows, columns)
    rows: tl.int64,
    columns,
    channels: tl.int32,
    column_blocks: tl.int64,
    BY_ROW: tl.constexpr,
    COMPUTE: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    STEPS: tl.constexpr,  # row blocks per program
    ALIGN: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    columns = aligned(columns, ALIGN)
    block_column = program % column_blocks
    for step in range(STEPS):
        block_row = program // column_blocks * STEPS + step
        tile = matrix_tile(block_row, block_column, rows, columns, HEIGHT, WIDTH)
        slope = channel_values(w_pointer, block_row, block_column, columns, channels, BY_ROW, COMPUTE, HEIGHT, WIDTH)
        x = load(x_pointer, tile, COMPUTE)
        y = leaky_relu_forward(x, slope, slope)
        store(y_pointer, tile, y)


@kernel
def prelu_backward_kernel(
    g_pointer,  # gradient of the output, (rows, columns)
    x_pointer,  # input, (rows, columns)
    w_pointer,  # slopes, (channels,)
    dx_pointer,  # gradient of the input, (rows, columns)
    partial_pointer,  # partial sums of the slopes' gradient, see `ChannelMatrix`
    rows: tl.int64,
    columns,
    channels: tl.int32,
    column_blocks: tl.int64,
    BY_ROW: tl.constexpr,
    COMPUTE: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    STEPS: tl.constexpr,  # row blocks per program
    ALIGN: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    columns = aligned(columns, ALIGN)
    block_column = program % column_blocks
    by_column = tl.zeros((WIDTH,), COMPUTE)
    for step in range(STEPS):
        block_row = program // column_blocks * STEPS + step
        tile = matrix_tile(block_row, block_column, rows, columns, HEIGHT, WIDTH)
        slope = channel_values(w_pointer, block_row, block_column, columns, channels, BY_ROW, COMPUTE, HEIGHT, WIDTH)
        g = load(g_pointer, tile, COMPUTE)
        x = load(x_pointer, tile, COMPUTE)
        kept = leaky_relu_mask(x, slope, slope)
        dx = leaky_relu_gradient(g, kept, slope, slope)
        store(dx_pointer, tile, dx)

        dw = tl.where(kept, 0.0, g * x)
        if BY_ROW:
            sums = sums_tile(block_row, block_column, rows, columns, column_blocks, True, HEIGHT, WIDTH)
            store(partial_pointer, sums, tl.sum(dw, axis=1))
        else:
            by_column += tl.sum(dw, axis=0)
    if not BY_ROW:
        part = program // column_blocks
        sums = sums_tile(part, block_column, rows, columns, column_blocks, False, HEIGHT, WIDTH)
        store(partial_pointer, sums, by_column)


# --- Configurations and launchers -----------------------------------------------------------------------------------

_ROW_WIDTHS = (16, 64, 256, TILE)
_COLUMN_WIDTHS = (16, 64, 256)
# Row blocks that a program works through where channels are columns: their partial sums share one accumulator.
_STEPS = 4


@cache
def _configuration(direction: str, dtype: torch.dtype, by_row: bool, width: int) -> Configuration:
    code, reads = (prelu_forward_kernel, 1) if direction == "forward" else (prelu_backward_kernel, 2)
    # A row of 16 elements is narrower than the accesses of a warp; wide ones are promised from 64 on.
    wide = tile_shape(dtype)[0] if width >= 64 else 0
    # So many columns, with a sum each, take too many registers for 128 threads.
    threads = 256 if direction == "backward" and not by_row and width == 64 else threads_for(dtype)
    return configure(
        code,
        f"prelu {direction} by_{'row' if by_row else 'column'} x{width} {TRITON_TYPE[dtype]}",
        dtype,
        {
            "BY_ROW": by_row,
            "COMPUTE": COMPUTE[dtype],
            "HEIGHT": TILE // width,
            "WIDTH": width,
            "STEPS": 1 if by_row else _STEPS,
        },
        pointers={"partial": ACCUMULATOR[dtype]},
        aligned=("columns",),
        threads=threads,
        wide_loads=reads * wide * threads_for(dtype) // threads,
        wide_stores=wide * threads_for(dtype) // threads,
    )


@ships("prelu")
def configurations() -> Iterator[Configuration]:
    for direction in ("forward", "backward"):
        for dtype in DTYPES:
            for by_row, widths in ((True, _ROW_WIDTHS), (False, _COLUMN_WIDTHS)):
                for width in widths:
                    yield _configuration(direction, dtype, by_row, width)


def _matrix(x: Tensor, weight: Tensor) -> ChannelMatrix:
    return channel_matrix(x.shape, x.stride(), 1, weight.numel(), _ROW_WIDTHS, _COLUMN_WIDTHS, steps=_STEPS)


def _extents(matrix: ChannelMatrix) -> tuple[int, ...]:
    return matrix.rows, matrix.columns, matrix.channels, matrix.column_blocks


def prelu_forward(x: Tensor, weight: Tensor) -> Tensor:
    """max(0, x) + weight * min(0, x), with one slope or one per channel (dimension 1)."""
    x, weight = dense(x), weight.contiguous()
    y = torch.empty_like(x)
    if x.numel():
        matrix = _matrix(x, weight)
        configuration = _configuration("forward", x.dtype, matrix.by_row, matrix.width)
        launch(configuration, matrix.programs, x, weight, y, *_extents(matrix))
    return y


def prelu_backward(g: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the input and of the slopes."""
    x, weight = dense(x), weight.contiguous()
    g = dense_like(g, x.stride())
    dx = torch.empty_like(x)
    if not x.numel():
        return dx, torch.zeros_like(weight)
    matrix = _matrix(x, weight)
    partial = torch.empty(matrix.partial_shape, dtype=ACCUMULATOR[x.dtype], device=x.device)
    configuration = _configuration("backward", x.dtype, matrix.by_row, matrix.width)
    launch(configuration, matrix.programs, g, x, weight, dx, partial, *_extents(matrix))
    return dx, matrix.totals(partial).to(weight.dtype).view(weight.shape)
