"""PReLU: leaky ReLU with learnt slopes, one for all elements or one per channel.

Whatever the memory order, a dense tensor is a matrix in which a channel is a row in so many or a column (see
`ChannelMatrix` in ``base/matrix.py``); a single slope has one row.

The backward pass reads the input and the gradient once, writes the input's gradient, and one partial sum of the slopes'
gradient for each channel and program; PyTorch's ``sum`` adds the partial sums in a fixed order.
"""

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from .base._triton import tl
from .base.launch import ACCUMULATOR, COMPUTE, DTYPES, TRITON_TYPE, Configuration, configure, kernel, launch, ships
from .base.layout import dense, dense_like
from .base.matrix import ChannelMatrix, channel_matrix, channel_values, place_of, store_sums, tile_of, tiling_of
from .base.tiles import TILE, load, store, threads_for, tile_shape
from .functions.activation import leaky_relu_forward, leaky_relu_gradient, leaky_relu_mask

__all__ = ["prelu_backward", "prelu_forward"]


@kernel
def prelu_kernel(
    g_pointer,  # gradient of the output, (rows, columns); or None in the forward pass
    x_pointer,  # input, (rows, columns)
    w_pointer,  # slopes, (channels,)
    y_pointer,  # output, or gradient of the input, (rows, columns)
    partial_pointer,  # partial sums of the slopes' gradient, see `ChannelMatrix`; or None in the forward pass
    rows: tl.int64,
    columns,
    channels: tl.int32,
    column_blocks: tl.int64,
    TILING: tl.constexpr,
    COMPUTE: tl.constexpr,
    STEPS: tl.constexpr,  # row blocks per program
    ALIGN: tl.constexpr,
):
    place = place_of(rows, columns, column_blocks, ALIGN)
    if g_pointer is not None:
        by_column = tl.full((TILING.width,), 0.0, COMPUTE)
    for step in range(STEPS):
        block_row = place.part * STEPS + step
        tile = tile_of(block_row, place, TILING)
        slope = channel_values(w_pointer, block_row, place, channels, COMPUTE, TILING)
        if g_pointer is None:
            x = load(x_pointer, tile, COMPUTE)
            store(y_pointer, tile, leaky_relu_forward(x, slope, slope))
        else:
            g = load(g_pointer, tile, COMPUTE)
            x = load(x_pointer, tile, COMPUTE)
            kept = leaky_relu_mask(x, slope, slope)
            store(y_pointer, tile, leaky_relu_gradient(g, kept, slope, slope))
            dw = tl.where(kept, 0.0, g * x)
            if TILING.by_row:
                store_sums(partial_pointer, dw, block_row, place, TILING)
            else:
                by_column += tl.sum(dw, axis=0)
    if g_pointer is not None and not TILING.by_row:
        store_sums(partial_pointer, by_column[None, :], place.part, place, TILING)


# --- Configurations and launchers -----------------------------------------------------------------------------------

_ROW_WIDTHS = (16, 64, 256, TILE)
_COLUMN_WIDTHS = (16, 64, 256)
# Row blocks that a program works through where channels are columns: their partial sums share one accumulator.
_STEPS = 4


@cache
def _configuration(direction: str, dtype: torch.dtype, by_row: bool, width: int) -> Configuration:
    forward = direction == "forward"
    # A row of 16 elements is narrower than the accesses of a warp; wide ones are promised from 64 on.
    wide = tile_shape(dtype)[0] if width >= 64 else 0
    # So many columns, with a sum each, take too many registers for 128 threads.
    threads = 256 if not (forward or by_row) and width == 64 else threads_for(dtype)
    return configure(
        prelu_kernel,
        f"prelu {direction} by_{'row' if by_row else 'column'} x{width} {TRITON_TYPE[dtype]}",
        dtype,
        {
            **dict.fromkeys(("g_pointer", "partial_pointer") if forward else ()),
            "TILING": tiling_of(dtype, by_row, width),
            "COMPUTE": COMPUTE[dtype],
            "STEPS": 1 if by_row else _STEPS,
        },
        pointers={"partial": ACCUMULATOR[dtype]},
        aligned=("columns",),
        threads=threads,
        wide_loads=(1 if forward else 2) * wide * threads_for(dtype) // threads,
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
