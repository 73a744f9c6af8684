"""Dropout, plain, of whole channels, and alpha: masks that are regenerated and never stored.

All are one affine map, of which a random number chooses the branch: y = x scale - kept_offset where an element is kept,
y = x 0 - dropped_offset where it is dropped.  The gradient is the same map without offsets, so one kernel serves both
directions.  Subtracting an offset of 0 changes no number, not even a zero's sign.

=================  =================================  ==============================  ==================
kernel             memory order                       random number                   drawn for
=================  =================================  ==============================  ==================
`dropout`          any                                one an element                  a tile
`row_dropout`      (N, C, spatial): a channel a row   one a row                       a tile
`column_dropout`   (N, spatial, C), channels last     one a column of each sample     many rows at once
=================  =================================  ==============================  ==================

A channel's number depends on its index n C + c alone, so its fate is the same in both memory formats.
"""

from collections.abc import Iterator, Sequence
from functools import cache

import torch
from torch import Tensor

from .base._triton import tl, triton
from .base.launch import COMPUTE, DTYPES, TRITON_TYPE, Configuration, configure, kernel, launch, ships
from .base.layout import dense, dense_like
from .base.numerics import scalar
from .base.random import channel_bits, keep_threshold, keep_tile, serves_eight
from .base.tiles import (
    TILE,
    aligned,
    cdiv,
    configure_flat,
    flat_tile,
    known,
    launch_flat,
    load,
    matrix_tile,
    steps_for,
    store,
    threads_for,
    tile_shape,
    width_for,
)

__all__ = ["dropout_backward", "dropout_forward"]


@triton.jit
def dropped(x, keep, scale, kept_offset, dropped_offset):
    """The affine map.  A dropped NaN or infinity gives NaN, as in PyTorch, which multiplies by 0 too."""
    return x * tl.where(keep, scale, 0.0) - tl.where(keep, kept_offset, dropped_offset)


@kernel
def dropout_kernel(
    x_pointer,  # input, flat
    y_pointer,  # output, flat; may be the input
    seed_pointer,  # one int64
    numel: tl.int64,
    last: tl.int64,  # the last random number that is kept
    scale: tl.float64,
    kept_offset: tl.float64,
    dropped_offset: tl.float64,
    COMPUTE: tl.constexpr,
    SERVES_EIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    tile_index, tile = flat_tile(numel, ROWS, COLUMNS)

    keep = keep_tile(tl.load(seed_pointer), tile_index, scalar(last, tl.uint32), ROWS, COLUMNS, SERVES_EIGHT)
    for whole in tl.static_range(2):
        if tile.whole == whole:
            part = known(tile, whole)
            x = load(x_pointer, part, COMPUTE)
            y = dropped(x, keep, scalar(scale, COMPUTE), scalar(kept_offset, COMPUTE), scalar(dropped_offset, COMPUTE))
            store(y_pointer, part, y)


@kernel
def row_dropout_kernel(
    x_pointer,  # input, (rows, columns): a row is a channel
    y_pointer,  # output, (rows, columns); may be the input
    seed_pointer,  # one int64
    rows: tl.int64,
    columns,
    column_blocks: tl.int64,
    last: tl.int64,
    scale: tl.float64,
    kept_offset: tl.float64,
    dropped_offset: tl.float64,
    COMPUTE: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    ALIGN: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    columns = aligned(columns, ALIGN)
    block_row = program // column_blocks
    tile = matrix_tile(block_row, program % column_blocks, rows, columns, HEIGHT, WIDTH)

    x = load(x_pointer, tile, COMPUTE)
    bits = channel_bits(tl.load(seed_pointer), block_row * HEIGHT + tl.arange(0, HEIGHT))
    keep = (bits <= scalar(last, tl.uint32))[:, None]
    y = dropped(x, keep, scalar(scale, COMPUTE), scalar(kept_offset, COMPUTE), scalar(dropped_offset, COMPUTE))
    store(y_pointer, tile, y)


@kernel
def column_dropout_kernel(
    x_pointer,  # input, (samples, rows, columns): a column of a sample is a channel
    y_pointer,  # output, (samples, rows, columns); may be the input
    seed_pointer,  # one int64
    rows: tl.int64,
    columns,
    row_blocks: tl.int64,  # of a sample
    steps: tl.int64,  # row blocks per program
    column_blocks: tl.int64,
    last: tl.int64,
    scale: tl.float64,
    kept_offset: tl.float64,
    dropped_offset: tl.float64,
    COMPUTE: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    ALIGN: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    columns = aligned(columns, ALIGN)
    block_column = program % column_blocks
    row_programs = tl.cdiv(row_blocks, steps)
    sample = program // column_blocks // row_programs
    first = program // column_blocks % row_programs * steps

    channel = sample * columns + block_column * WIDTH + tl.arange(0, WIDTH)
    keep = (channel_bits(tl.load(seed_pointer), channel) <= scalar(last, tl.uint32))[None, :]
    x_pointer += sample * rows * columns
    y_pointer += sample * rows * columns
    for block_row in range(first, tl.minimum(first + steps, row_blocks)):
        tile = matrix_tile(block_row, block_column, rows, columns, HEIGHT, WIDTH)
        x = load(x_pointer, tile, COMPUTE)
        y = dropped(x, keep, scalar(scale, COMPUTE), scalar(kept_offset, COMPUTE), scalar(dropped_offset, COMPUTE))
        store(y_pointer, tile, y)


# --- Configurations and launchers -----------------------------------------------------------------------------------

_ROW_WIDTHS = (16, 256, TILE)
_COLUMN_WIDTHS = (16, 64, 256)


@cache
def _elements(dtype: torch.dtype) -> Configuration:
    constants = {"SERVES_EIGHT": serves_eight(dtype)}
    return configure_flat(
        dropout_kernel, "dropout", dtype, constants, pointers={"seed": torch.int64}, loads=1, stores=1
    )


@cache
def _channels(dtype: torch.dtype, by_row: bool, width: int) -> Configuration:
    # A row of 16 elements is narrower than the accesses of a warp.
    wide = tile_shape(dtype)[0] if width > 16 else 0
    return configure(
        row_dropout_kernel if by_row else column_dropout_kernel,
        f"dropout of {'rows' if by_row else 'columns'} x{width} {TRITON_TYPE[dtype]}",
        dtype,
        {"COMPUTE": COMPUTE[dtype], "HEIGHT": TILE // width, "WIDTH": width},
        pointers={"seed": torch.int64},
        aligned=("columns",),
        threads=threads_for(dtype),
        wide_loads=wide,
        wide_stores=wide,
    )


@ships("dropout")
def configurations() -> Iterator[Configuration]:
    for dtype in DTYPES:
        yield _elements(dtype)
        for width in _ROW_WIDTHS:
            yield _channels(dtype, True, width)
        for width in _COLUMN_WIDTHS:
            yield _channels(dtype, False, width)


# The value that SELU saturates at, far below 0: -scale alpha, with the sign turned.
_SELU_SATURATION = 1.7580993408473766


def _noise(p: float, alpha: bool, offset: bool) -> tuple[int, float, float, float]:
    """The kernels' ``last``, ``scale``, ``kept_offset`` and ``dropped_offset``."""
    if p == 1:
        return keep_threshold(p), 0.0, 0.0, 0.0
    if not alpha:
        return keep_threshold(p), 1 / (1 - p), 0.0, 0.0
    scale = ((1 + _SELU_SATURATION**2 * p) * (1 - p)) ** -0.5
    if not offset:
        return keep_threshold(p), scale, 0.0, 0.0
    saturated = _SELU_SATURATION * scale
    return keep_threshold(p), scale, -saturated * p, saturated * (1 - p)


def _apply(x: Tensor, y: Tensor, seed: Tensor, p: float, alpha: bool, shared_dims: int, offset: bool) -> None:
    """Write the dropout of the dense ``x`` to ``y``, which lies in memory like it, and may be it."""
    noise = _noise(p, alpha, offset)
    numel = x.numel()
    channels = x.shape[shared_dims - 1] if shared_dims else 1
    samples = x.shape[0] if shared_dims == 2 else 1
    spatial = numel // (samples * channels) if shared_dims and numel else 1
    if spatial == 1 or not shared_dims:
        launch_flat(_elements(x.dtype), (x, y, seed), *noise)
    elif _strides_are(x, shared_dims, (channels * spatial, spatial)):
        width = width_for(spatial, _ROW_WIDTHS)
        rows, blocks = samples * channels, cdiv(spatial, width)
        programs = cdiv(rows, TILE // width) * blocks
        launch(_channels(x.dtype, True, width), programs, x, y, seed, rows, spatial, blocks, *noise)
    elif _strides_are(x, shared_dims, (channels * spatial, 1)):
        width = width_for(channels, _COLUMN_WIDTHS)
        row_blocks, blocks = cdiv(spatial, TILE // width), cdiv(channels, width)
        steps = min(steps_for(samples * row_blocks * blocks), row_blocks)
        programs = samples * cdiv(row_blocks, steps) * blocks
        configuration = _channels(x.dtype, False, width)
        launch(configuration, programs, x, y, seed, spatial, channels, row_blocks, steps, blocks, *noise)
    else:  # the samples lie inside the channels, or both inside the rest: too rare for a kernel
        ordered = x.contiguous()
        _apply(ordered, ordered, seed, p, alpha, shared_dims, offset)
        y.copy_(ordered)


def _strides_are(x: Tensor, shared_dims: int, expected: tuple[int, int]) -> bool:
    """Whether the first ``shared_dims`` dimensions have the last of the ``expected`` strides, wherever these matter."""
    return all(
        size == 1 or stride == wanted
        for size, stride, wanted in zip(
            x.shape[:shared_dims], x.stride()[:shared_dims], expected[2 - shared_dims :], strict=True
        )
    )


def dropout_forward(
    x: Tensor, seed: Tensor, p: float, alpha: bool = False, shared_dims: int = 0, *, inplace: bool = False
) -> Tensor:
    """Dropout with probability ``p``, in the memory order of ``x``; with ``inplace`` written over the dense ``x``.

    ``alpha`` keeps mean and variance of SELU's outputs.  ``shared_dims`` is the number of leading dimensions whose
    indices draw one number together: 2 for the channels of a batch, 1 for those of a single sample, 0 where every
    element draws its own.  Applied to ones, it shows the mask of a seed.
    """
    x = dense(x)
    y = x if inplace else torch.empty_like(x)
    _apply(x, y, seed, p, alpha, shared_dims, offset=True)
    return y


def dropout_backward(
    g: Tensor, seed: Tensor, strides: Sequence[int], p: float, alpha: bool = False, shared_dims: int = 0
) -> Tensor:
    """Gradient of the input from that of the output, whose strides were ``strides``."""
    g = dense_like(g, strides)
    dx = g.new_empty_strided(g.shape, strides)
    _apply(g, dx, seed, p, alpha, shared_dims, offset=False)
    return dx
