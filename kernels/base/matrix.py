"""Tensors of channels as matrices whose tiles are passed over once.

A dense tensor is a matrix as in ``channels.py``, in which a channel is a run of rows, or a column.  It is cut into
tiles, and a program takes one, or ``steps`` below each other.  Of a sum over channels it leaves one for each channel
that it sees; PyTorch's ``sum`` adds them in a fixed order.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._triton import tl, triton
from .numerics import widen
from .tiles import TILE, Tile, aligned, cdiv, matrix_tile, steps_for, store, tile_shape, width_for

__all__ = [
    "ChannelMatrix",
    "MatrixTiling",
    "channel_matrix",
    "channel_values",
    "place_of",
    "store_sums",
    "sums_tile",
    "tile_of",
    "tiling_of",
]

# --- Device functions -------------------------------------------------------------------------------------------------


class MatrixPlace(NamedTuple):
    """Where in a `ChannelMatrix` a program works, as device functions see it.

    It takes the tiles of part number ``part`` of column ``block_column``, of ``column_blocks`` columns of tiles.
    """

    rows: Any
    columns: Any
    column_blocks: Any
    block_column: Any
    part: Any


@triton.jit
def place_of(rows, columns, column_blocks, ALIGN: tl.constexpr):
    """This program's place."""
    program = tl.program_id(0).to(tl.int64)
    columns = aligned(columns, ALIGN)
    return MatrixPlace(rows, columns, column_blocks, program % column_blocks, program // column_blocks)


@triton.jit
def tile_of(block_row, place, TILING: tl.constexpr):
    """The tile in this row of tiles."""
    return matrix_tile(block_row, place.block_column, place.rows, place.columns, TILING.height, TILING.width)


@triton.jit
def channel_values(pointer, block_row, place, channels, COMPUTE: tl.constexpr, TILING: tl.constexpr):
    """What each channel has one of, for a tile of a `ChannelMatrix`: broadcastable to it."""
    if TILING.by_row:
        row = block_row * TILING.height + tl.arange(0, TILING.height)
        values = tl.load(pointer + row % channels)[:, None]
    else:
        column = place.block_column * TILING.width + tl.arange(0, TILING.width)
        values = tl.load(pointer + column, mask=column < place.columns, other=0)[None, :]
    return widen(values, COMPUTE)


@triton.jit
def sums_tile(
    block, block_column, rows, columns, column_blocks, BY_ROW: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr
):
    """Where the sums of a tile's rows (HEIGHT,) or columns (WIDTH,) lie in `ChannelMatrix.partial_shape`.

    ``block`` counts the rows' tiles, or what of the columns a program sums up.
    """
    if BY_ROW:
        row = block * HEIGHT + tl.arange(0, HEIGHT)
        return Tile(0, row * column_blocks + block_column, row < rows)
    else:
        column = block_column * WIDTH + tl.arange(0, WIDTH)
        return Tile(block * columns, column, column < columns)


@triton.jit
def store_sums(pointer, values, block, place, TILING: tl.constexpr):
    """Store the sums of a tile's rows, or of what a program has added up of its columns, where `sums_tile` says.

    A lane has added its rows in the type of the arithmetic; from there on float64 leaves little of the rounding.
    """
    by_row: tl.constexpr = TILING.by_row
    if by_row:
        sums = tl.sum(values, axis=1)
    else:
        sums = tl.sum(values.to(tl.float64), axis=0).to(values.dtype)
    tile = sums_tile(
        *(block, place.block_column, place.rows, place.columns, place.column_blocks),
        *(by_row, TILING.height, TILING.width),
    )
    store(pointer, tile, sums)


# --- Division ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MatrixTiling:
    """The tile of a `ChannelMatrix`, as one ``tl.constexpr``.

    Bits are kept, and random numbers drawn, in the order of a flat tile, (flat_rows, flat_columns).
    """

    by_row: bool
    height: int
    width: int
    flat_rows: int
    flat_columns: int


def tiling_of(dtype: torch.dtype, by_row: bool, width: int) -> MatrixTiling:
    """Tiles of this width."""
    return MatrixTiling(by_row, TILE // width, width, *tile_shape(dtype))


@dataclass(frozen=True)
class ChannelMatrix:
    """A dense tensor as a matrix in which a channel is a column, or (``by_row``) a ``run`` of rows in so many.

    A program takes ``steps`` tiles below each other.
    """

    by_row: bool
    rows: int
    columns: int
    channels: int
    height: int
    width: int
    steps: int = 1
    run: int = 1

    @property
    def row_blocks(self) -> int:
        return cdiv(self.rows, self.height)

    @property
    def column_blocks(self) -> int:
        return cdiv(self.columns, self.width)

    @property
    def programs(self) -> int:
        return cdiv(self.row_blocks, self.steps) * self.column_blocks

    @property
    def extents(self) -> tuple[int, ...]:
        """What kernels are told."""
        return self.rows, self.columns, self.channels, self.row_blocks, self.steps, self.column_blocks

    @property
    def partial_shape(self) -> tuple[int, int]:
        """A partial sum for each channel that a program sees."""
        if self.by_row:
            return self.rows, self.column_blocks
        return cdiv(self.row_blocks, self.steps), self.columns

    @property
    def grouped_shape(self) -> tuple[int, int, int]:
        """The same sums with the channels along dimension 1."""
        if not self.by_row:
            return *self.partial_shape, 1
        return self.rows // (self.channels * self.run), self.channels, self.run * self.column_blocks

    def totals(self, partial: Tensor) -> Tensor:
        """The sum of each channel, (channels,)."""
        return partial.view(self.grouped_shape).sum((0, 2)) if self.by_row else partial.sum(0)


def channel_matrix(
    shape: Sequence[int],
    strides: Sequence[int],
    dim: int,
    channels: int,
    row_widths: Sequence[int],
    column_widths: Sequence[int],
    *,
    steps: int = 0,
) -> ChannelMatrix:
    """Of a dense tensor that isn't empty, whose ``channels`` lie along ``dim``, or are one; tiles of these widths.

    ``steps`` where channels are columns; by default as many as leave enough programs.
    """
    numel = prod(shape)
    # Dense memory: the dimensions inside a channel span its stride, whatever their order.  One channel is one row.
    inner = strides[dim] if channels > 1 else numel
    by_row = inner > 1 or channels == 1
    columns = inner if by_row else channels
    width = width_for(columns, row_widths if by_row else column_widths)
    matrix = ChannelMatrix(by_row, numel // columns, columns, channels, TILE // width, width)
    if by_row:
        return matrix
    return replace(matrix, steps=steps or min(steps_for(matrix.programs), matrix.row_blocks))
