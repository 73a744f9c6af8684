"""Maxout: the maximum over pieces, of features that are in memory.

The maximum is ``torch.amax``'s (a NaN wins), and the lowest of equal pieces wins.  The winner of each maximum is stored
for the backward pass, in one byte.

The pass sees memory as rows of columns.  Those of one piece lie together, ``units`` rows at a time, and are followed by
those of the next piece:

=================================  ====================  ========  ==================
memory                             rows                  columns   units
=================================  ====================  ========  ==================
pieces adjacent                    all maxima            1         1
channels of (N, C, spatial)        N C / pieces          spatial   1
(rows, pieces units)               rows                  units     1
(N, pieces units, spatial)         N units               spatial   units
=================================  ====================  ========  ==================

The last two are products with a linear layer's or a convolution's weights; there a bias is added, which belongs to a
column in the first of them (and in channels-last memory), and to a row in the second.  A linear layer's product needn't
be in memory at all, see `linear_maxout`.

The backward pass scatters the gradient of the maxima: each goes to its winner, and zeros to the others.  The bias's
gradient is summed on the way: each program writes the sums over its tile, and PyTorch's ``sum`` adds them in a fixed
order.

Source: Goodfellow, Warde-Farley, Mirza, Courville, Bengio, "Maxout Networks" (ICML 2013).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod

import torch
from torch import Tensor

from .base._triton import tl, triton
from .base.launch import ACCUMULATOR, COMPUTE, DTYPES, TRITON_TYPE, Configuration, configure, kernel, launch, ships
from .base.layout import dense, dense_like
from .base.numerics import scalar, widen
from .base.random import uniform_tile
from .base.tiles import (
    TILE,
    Tile,
    aligned,
    cdiv,
    flat_tile,
    launch_flat,
    load,
    store,
    threads_for,
    tile_shape,
    width_for,
)

__all__ = [
    "MOST_PIECES",
    "beats",
    "drop",
    "dropout_scale",
    "maxima_layout",
    "maxout_backward",
    "maxout_forward",
    "nothing",
]

#: A winner is a byte, and its last value marks a maximum that dropout dropped: no piece gets its gradient.
MOST_PIECES = 255
_DROPPED = tl.constexpr(255)


# --- Device functions -------------------------------------------------------------------------------------------------


@triton.jit
def beats(value, best):
    """Whether ``value`` is the new maximum: a NaN wins, the first of several, and of equal values the first."""
    return (value > best) | ((value != value) & (best == best))


@triton.jit
def drop(best, winner, seed_pointer, p, scale, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, COMPUTE: tl.constexpr):
    """Dropout of this program's maxima (HEIGHT, WIDTH), and of their winners."""
    number = uniform_tile(tl.load(seed_pointer), tl.program_id(0).to(tl.int64), 1, HEIGHT * WIDTH)
    dropped = tl.reshape(number, (HEIGHT, WIDTH)) < scalar(p, tl.float32)
    # A product with 0, as PyTorch's: a NaN or infinity that is dropped gives NaN.
    return best * tl.where(dropped, 0.0, scalar(scale, COMPUTE)), tl.where(dropped, _DROPPED, winner)


# --- The maximum, and its gradient ------------------------------------------------------------------------------------


@triton.jit
def tile_place(rows, columns, column_blocks, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """This program's blocks of rows and columns, its rows and columns, which maxima are inside, and whether all are."""
    program = tl.program_id(0).to(tl.int64)
    block_row = program // column_blocks
    block_column = program % column_blocks
    row = block_row * HEIGHT + tl.arange(0, HEIGHT)
    column = block_column * WIDTH + tl.arange(0, WIDTH)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    whole = (block_row * HEIGHT + HEIGHT <= rows) & (block_column * WIDTH + WIDTH <= columns)
    return block_row, block_column, row, column, inside, whole


@triton.jit
def first_piece(row, units, pieces):
    """The row of the features in which a row of maxima has its first piece; the next is ``units`` rows further on."""
    return row // units * units * pieces + row % units


@triton.jit
def bias_tile(b_pointer, piece, row, column, columns, units, BY_COLUMN: tl.constexpr, COMPUTE: tl.constexpr):
    """The bias of a tile's piece, broadcastable to the tile."""
    if BY_COLUMN:
        bias = tl.load(b_pointer + piece * columns + column, mask=column < columns, other=0)[None, :]
    else:
        bias = tl.load(b_pointer + piece * units + row % units)[:, None]
    return widen(bias, COMPUTE)


@kernel
def maxout_forward_kernel(
    x_pointer,  # features, (pieces rows, columns)
    b_pointer,  # bias, (pieces, columns) or (pieces, units); not read unless has_bias
    y_pointer,  # maxima, (rows, columns)
    winner_pointer,  # winners, (rows, columns); not written unless wants_winner
    seed_pointer,  # one int64; not read unless has_seed
    rows: tl.int64,
    columns,
    units: tl.int64,
    pieces: tl.int32,
    column_blocks: tl.int64,
    has_bias: tl.int32,
    wants_winner: tl.int32,
    has_seed: tl.int32,
    p: tl.float64,
    scale: tl.float64,
    BY_COLUMN: tl.constexpr,
    COMPUTE: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    ALIGN: tl.constexpr,
):
    columns = aligned(columns, ALIGN)
    _, _, row, column, inside, whole = tile_place(rows, columns, column_blocks, HEIGHT, WIDTH)
    source = first_piece(row, units, pieces)[:, None] * columns + column[None, :]

    best = load(x_pointer, Tile(0, source, inside, whole), COMPUTE)
    if has_bias:
        best += bias_tile(b_pointer, 0, row, column, columns, units, BY_COLUMN, COMPUTE)
    winner = tl.zeros((HEIGHT, WIDTH), tl.int32)
    for piece in range(1, pieces):
        value = load(x_pointer, Tile(piece * units * columns, source, inside, whole), COMPUTE)
        if has_bias:
            value += bias_tile(b_pointer, piece, row, column, columns, units, BY_COLUMN, COMPUTE)
        wins = beats(value, best)
        best = tl.where(wins, value, best)
        winner = tl.where(wins, piece, winner)
    if has_seed:
        best, winner = drop(best, winner, seed_pointer, p, scale, HEIGHT, WIDTH, COMPUTE)

    maxima = Tile(0, row[:, None] * columns + column[None, :], inside, whole)
    store(y_pointer, maxima, best)
    if wants_winner:
        store(winner_pointer, maxima, winner)


@kernel
def maxout_backward_kernel(
    g_pointer,  # gradient of the maxima, (rows, columns)
    winner_pointer,  # winners, (rows, columns)
    dx_pointer,  # gradient of the features, (pieces rows, columns)
    partial_pointer,  # partial sums of the bias's gradient, see `_partial_shape`; not written unless wants_sums
    rows: tl.int64,
    columns,
    units: tl.int64,
    pieces: tl.int32,
    column_blocks: tl.int64,
    wants_sums: tl.int32,
    scale: tl.float64,
    BY_COLUMN: tl.constexpr,
    COMPUTE: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    ALIGN: tl.constexpr,
):
    columns = aligned(columns, ALIGN)
    block_row, block_column, row, column, inside, whole = tile_place(rows, columns, column_blocks, HEIGHT, WIDTH)
    first = first_piece(row, units, pieces)
    maxima = Tile(0, row[:, None] * columns + column[None, :], inside, whole)
    target = first[:, None] * columns + column[None, :]

    g = load(g_pointer, maxima, COMPUTE) * scalar(scale, COMPUTE)
    winner = load(winner_pointer, maxima, tl.uint8)
    for piece in range(pieces):
        dx = tl.where(winner == piece, g, 0.0)
        store(dx_pointer, Tile(piece * units * columns, target, inside, whole), dx)
        if wants_sums:
            if BY_COLUMN:
                # By eights first: short sums round less.
                eights = tl.sum(tl.reshape(dx, (HEIGHT // 8, 8, WIDTH)), axis=1)
                sums = partial_pointer + (block_row * pieces + piece) * columns + column
                tl.store(sums, tl.sum(eights, axis=0), mask=column < columns)
            else:
                sums = partial_pointer + (first + piece * units) * column_blocks + block_column
                tl.store(sums, tl.sum(dx, axis=1), mask=row < rows)


# Adjacent pieces are loaded and stored together where a few of them fill one wide access.
_TOGETHER = (2, 4)


@triton.jit
def split_pieces(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PIECES: tl.constexpr):
    """The 2 or 4 pieces of each of (ROWS, COLUMNS) maxima in a tile (ROWS, COLUMNS PIECES)."""
    if PIECES == 2:
        values = tl.split(tl.reshape(x, (ROWS, COLUMNS, 2)))
    else:
        even, odd = tl.split(tl.reshape(x, (ROWS, COLUMNS, 2, 2)))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        values = (first, second, third, fourth)
    return values


@triton.jit
def features_tile(maxima, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PIECES: tl.constexpr):
    """All pieces of a flat tile of maxima, (ROWS, COLUMNS PIECES)."""
    offsets = tl.arange(0, ROWS)[:, None] * COLUMNS * PIECES + tl.arange(0, COLUMNS * PIECES)[None, :]
    inside = tl.broadcast_to(maxima.inside[:, :, None], (ROWS, COLUMNS, PIECES))
    return Tile(maxima.start * PIECES, offsets, tl.reshape(inside, (ROWS, COLUMNS * PIECES)), maxima.whole)


@triton.jit
def piece_tile(maxima, piece, pieces):
    """One piece of each of a flat tile's maxima."""
    return Tile(maxima.start * pieces + piece, maxima.offsets * pieces, maxima.inside, maxima.whole)


@kernel
def maxout_adjacent_forward_kernel(
    y_pointer,  # maxima, (numel,)
    x_pointer,  # features, (numel, pieces)
    winner_pointer,  # winners, (numel,); not written unless wants_winner
    numel: tl.int64,
    pieces: tl.int32,
    wants_winner: tl.int32,
    PIECES: tl.constexpr,  # pieces that are loaded together, or 0
    COMPUTE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    _, tile = flat_tile(numel, ROWS, COLUMNS)

    winner = tl.zeros((ROWS, COLUMNS), tl.int32)
    if PIECES:
        x = load(x_pointer, features_tile(tile, ROWS, COLUMNS, PIECES), COMPUTE)
        values = split_pieces(x, ROWS, COLUMNS, PIECES)
        best = values[0]
        for piece in tl.static_range(1, PIECES):
            wins = beats(values[piece], best)
            best = tl.where(wins, values[piece], best)
            winner = tl.where(wins, piece, winner)
    else:
        best = load(x_pointer, piece_tile(tile, 0, pieces), COMPUTE)
        for piece in range(1, pieces):
            value = load(x_pointer, piece_tile(tile, piece, pieces), COMPUTE)
            wins = beats(value, best)
            best = tl.where(wins, value, best)
            winner = tl.where(wins, piece, winner)

    store(y_pointer, tile, best)
    if wants_winner:
        store(winner_pointer, tile, winner)


@kernel
def maxout_adjacent_backward_kernel(
    g_pointer,  # gradient of the maxima, (numel,)
    winner_pointer,  # winners, (numel,)
    dx_pointer,  # gradient of the features, (numel, pieces)
    numel: tl.int64,
    pieces: tl.int32,
    PIECES: tl.constexpr,  # pieces that are stored together, or 0
    COMPUTE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    _, tile = flat_tile(numel, ROWS, COLUMNS)

    g = load(g_pointer, tile, COMPUTE)
    winner = load(winner_pointer, tile, tl.uint8)
    if PIECES:
        dx = tl.where(winner[:, :, None] == tl.arange(0, PIECES)[None, None, :], g[:, :, None], 0.0)
        dx = tl.reshape(dx, (ROWS, COLUMNS * PIECES))
        store(dx_pointer, features_tile(tile, ROWS, COLUMNS, PIECES), dx)
    else:
        for piece in range(pieces):
            store(dx_pointer, piece_tile(tile, piece, pieces), tl.where(winner == piece, g, 0.0))


# --- Configurations ---------------------------------------------------------------------------------------------------


# Widths of a tile.
_WIDTHS = (64, TILE)
# Elements of a tile whose columns have a bias: tall, for fewer partial sums.
_SUMMED_TILE = 4 * TILE


@cache
def _separate_configuration(direction: str, dtype: torch.dtype, width: int, by_column: bool) -> Configuration:
    threads, height = threads_for(dtype), TILE // width
    if direction == "backward" and by_column:
        threads, height = 256, _SUMMED_TILE // width // (2 if dtype is torch.float64 else 1)
    wide = height * width * dtype.itemsize // 16 // threads
    return configure(
        maxout_forward_kernel if direction == "forward" else maxout_backward_kernel,
        f"maxout {direction} {'by column' if by_column else 'by row'} x{width} {TRITON_TYPE[dtype]}",
        dtype,
        {"BY_COLUMN": by_column, "COMPUTE": COMPUTE[dtype], "HEIGHT": height, "WIDTH": width},
        pointers={"winner": torch.uint8, "seed": torch.int64, "partial": ACCUMULATOR[dtype]},
        aligned=("columns",),
        threads=threads,
        wide_loads=wide * (2 if direction == "forward" else 1),
        wide_stores=wide,
    )


@cache
def _adjacent_configuration(direction: str, dtype: torch.dtype, together: int) -> Configuration:
    rows, columns = tile_shape(dtype)
    threads = 256 if together == 4 else threads_for(dtype)
    accesses = rows * threads_for(dtype) // threads  # to the maxima; as many for each piece
    if direction == "forward":
        code, wide = maxout_adjacent_forward_kernel, (together * accesses, accesses)
    else:
        code, wide = maxout_adjacent_backward_kernel, (accesses, together * accesses)
    return configure(
        code,
        f"maxout {direction} of {together or 'any'} adjacent {TRITON_TYPE[dtype]}",
        dtype,
        {"PIECES": together, "COMPUTE": COMPUTE[dtype], "ROWS": rows, "COLUMNS": columns},
        pointers={"winner": torch.uint8},
        threads=threads,
        wide_loads=wide[0],
        wide_stores=wide[1],
    )


@ships("maxout")
def configurations() -> Iterator[Configuration]:
    for direction in ("forward", "backward"):
        for dtype in DTYPES:
            yield _separate_configuration(direction, dtype, _WIDTHS[0], True)
            for width in _WIDTHS:
                yield _separate_configuration(direction, dtype, width, False)
            for together in (0, *_TOGETHER):
                yield _adjacent_configuration(direction, dtype, together)


# --- Launchers --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Memory:
    """Dense features as rows of columns, see the table above."""

    rows: int
    columns: int
    units: int
    by_column: bool
    flat: bool  # pieces adjacent


def _memory(shape: Sequence[int], strides: Sequence[int], pieces: int, dim: int, adjacent: bool) -> _Memory:
    # Dense memory: the dimensions inside ``dim`` span its stride, whatever their order.
    maxima, inner, units = prod(shape) // pieces, strides[dim], shape[dim] // pieces
    if adjacent:
        return _Memory(maxima // inner, inner, 1, False, inner == 1)
    if inner == 1:
        return _Memory(maxima // units, units, 1, True, False)
    return _Memory(maxima // inner, inner, units, False, False)


def maxima_layout(
    shape: Sequence[int], strides: Sequence[int], pieces: int, dim: int
) -> tuple[Sequence[int], Sequence[int]]:
    """Shape and strides of the maxima over ``dim`` of dense features, in the same memory order.  May be symbolic."""
    inner = strides[dim]
    smaller = [size // pieces if d == dim else size for d, size in enumerate(shape)]
    return smaller, [stride // pieces if stride > inner else stride for stride in strides]


def _width(memory: _Memory) -> int:
    return _WIDTHS[0] if memory.by_column else width_for(memory.columns, _WIDTHS)


def dropout_scale(p: float) -> float:
    """What kept maxima are multiplied by; 0 where none is."""
    return 1 / (1 - p) if p < 1 else 0.0


def maxout_forward(
    x: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    pieces: int,
    dim: int,
    adjacent: bool,
    p: float,
    keeps_winner: bool,
) -> tuple[Tensor, Tensor]:
    """The maxima over ``dim`` of ``x``, and their winners (empty unless ``keeps_winner``).

    The pieces of a maximum are adjacent, or ``units`` apart: (units, pieces) or (pieces, units).  ``bias`` (pieces,
    units) is only taken where they are apart.  With a ``seed``, dropout of the maxima with probability ``p``.
    """
    x = dense(x)
    shape, strides = maxima_layout(x.shape, x.stride(), pieces, dim)
    y = x.new_empty_strided(shape, strides)
    winner = x.new_empty_strided(shape, strides, dtype=torch.uint8) if keeps_winner else nothing(x, torch.uint8)
    memory = _memory(x.shape, x.stride(), pieces, dim, adjacent)
    if memory.flat:
        together = pieces if pieces in _TOGETHER else 0
        configuration = _adjacent_configuration("forward", x.dtype, together)
        launch_flat(configuration, (y, x, winner), pieces, int(keeps_winner))
    else:
        configuration = _separate_configuration("forward", x.dtype, _width(memory), memory.by_column)
        programs, extents = _division(memory, pieces, configuration)
        flags = (int(bias is not None), int(keeps_winner), int(seed is not None))
        b = x if bias is None else bias.contiguous()
        seed = nothing(x, torch.int64) if seed is None else seed
        launch(configuration, programs, x, b, y, winner, seed, *extents, *flags, p, dropout_scale(p))
    return y, winner


def maxout_backward(
    g: Tensor, winner: Tensor, strides: Sequence[int], pieces: int, dim: int, adjacent: bool, p: float, sums_bias: bool
) -> tuple[Tensor, Tensor]:
    """Gradient of the features, whose strides were these, and of the bias, (pieces, units): empty unless asked for.

    ``p`` is the probability of the dropout that the winners went through.
    """
    g = dense_like(g, winner.stride())
    shape = [size * pieces if d == dim else size for d, size in enumerate(g.shape)]
    dx = g.new_empty_strided(shape, strides)
    memory = _memory(shape, strides, pieces, dim, adjacent)
    if memory.flat:
        configuration = _adjacent_configuration("backward", g.dtype, pieces if pieces in _TOGETHER else 0)
        launch_flat(configuration, (g, winner, dx), pieces)
        return dx, nothing(g, g.dtype)
    configuration = _separate_configuration("backward", g.dtype, _width(memory), memory.by_column)
    programs, extents = _division(memory, pieces, configuration)
    partial = torch.empty(
        _partial_shape(memory, extents, programs, pieces) if sums_bias else 0,
        dtype=ACCUMULATOR[g.dtype],
        device=g.device,
    )
    launch(configuration, programs, g, winner, dx, partial, *extents, int(sums_bias), dropout_scale(p))
    if not sums_bias:
        return dx, nothing(g, g.dtype)
    units = memory.columns if memory.by_column else memory.units
    return dx, partial.sum((0, 2)).to(g.dtype).view(pieces, units)


def _division(memory: _Memory, pieces: int, configuration: Configuration) -> tuple[int, tuple[int, ...]]:
    """How many programs, and the kernel's arguments ``rows`` to ``column_blocks``."""
    constants = dict(configuration.constants)
    column_blocks = cdiv(memory.columns, constants["WIDTH"])
    programs = cdiv(memory.rows, constants["HEIGHT"]) * column_blocks
    return programs, (memory.rows, memory.columns, memory.units, pieces, column_blocks)


def _partial_shape(memory: _Memory, extents: tuple[int, ...], programs: int, pieces: int) -> tuple[int, int, int]:
    """A partial sum for each piece's column and block of rows, or for each piece's row and block of columns."""
    column_blocks = extents[-1]
    if memory.by_column:
        return programs // column_blocks, pieces * memory.columns, 1
    return memory.rows // memory.units, pieces * memory.units, column_blocks


def nothing(x: Tensor, dtype: torch.dtype) -> Tensor:
    """In place of an operand that isn't there, and whose memory the kernel doesn't touch."""
    return x.new_empty(0, dtype=dtype)
