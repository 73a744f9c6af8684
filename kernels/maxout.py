"""Maxout: the maximum over pieces, of features that are there already or of a matrix product that is yet to be made.

Two paths lead from x and the weights (pieces, units, features) to the maxima:

- *fused*: a program holds the accumulators of all pieces for the same rows and units, which share each tile of x, and
  stores their maximum.  The product itself, ``pieces`` times as large, never reaches memory.
- *apart*: PyTorch's matrix product, then one pass over it for the maximum.

`takes_fused` chooses.  Both store, for the backward pass, the winner of each maximum in one byte.  The maximum is
``torch.amax``'s (a NaN wins), and the lowest of equal pieces wins.

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
column in the first of them (and in channels-last memory), and to a row in the second.

The backward pass expands the gradient of the maxima: each goes to its winner, and zeros to the others.  What remains is
the gradient of an ordinary, ``pieces`` times wider, linear layer or convolution.  *Fused*, two kernels expand each tile
on the fly, one for the products with the weights and one for those with x; *apart*, one pass writes the expansion, and
the products are PyTorch's.  `takes_fused_backward` chooses.  The bias's gradient is summed on the way: each program
writes the sums over its tile, and PyTorch's ``sum`` adds them in a fixed order.

Source: Goodfellow, Warde-Farley, Mirza, Courville, Bengio, "Maxout Networks" (ICML 2013).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod

import torch
from torch import Tensor
from torch.nn.functional import linear

from ._triton import tl, triton
from .launch import ACCUMULATOR, COMPUTE, DTYPES, TRITON_TYPE, Configuration, configure, kernel, launch, ships
from .layout import dense, dense_like
from .numerics import add_product, narrow, scalar, widen
from .random import uniform_tile
from .tiles import TILE, cdiv, flat_tile, load_tile, programs_for, store_tile, threads_for, tile_shape, width_for

__all__ = [
    "MOST_PIECES",
    "linear_maxout_backward",
    "linear_maxout_forward",
    "maxima_layout",
    "maxout_backward",
    "maxout_forward",
    "takes_fused",
    "takes_fused_backward",
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


@triton.jit
def append(values, value):
    values += (value,)
    return values


@triton.jit
def zeros_each(PIECES: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """A tile of zeros for each piece."""
    tiles = ()
    for _ in tl.static_range(PIECES):
        tiles = append(tiles, tl.zeros((HEIGHT, WIDTH), tl.float32))
    return tiles


# --- Fused: the product and its maximum -------------------------------------------------------------------------------

# Row blocks that are worked through for one block of columns before the next: their programs run at the same time, and
# find each other's tiles in L2.
_GROUP = tl.constexpr(8)


@triton.jit
def grouped_blocks(row_blocks, column_blocks):
    """This program's block of rows and block of columns."""
    program = tl.program_id(0).to(tl.int64)
    first = program // (_GROUP * column_blocks) * _GROUP
    group = tl.minimum(row_blocks - first, _GROUP)
    within = program % (_GROUP * column_blocks)
    return first + within % group, within // group


@kernel
def linear_maxout_kernel(
    x_pointer,  # input, (rows, features)
    w_pointer,  # weights, (pieces, units, features)
    b_pointer,  # bias, (pieces, units); not read unless has_bias
    y_pointer,  # output, (rows, units)
    winner_pointer,  # winners, (rows, units); not written unless keeps_winner
    seed_pointer,  # one int64; not read unless drops
    rows: tl.int64,
    units,
    features,
    has_bias: tl.int32,
    keeps_winner: tl.int32,
    drops: tl.int32,
    p: tl.float64,
    scale: tl.float64,
    PIECES: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row_block, unit_block = grouped_blocks(tl.cdiv(rows, HEIGHT), tl.cdiv(units, WIDTH))
    row = row_block * HEIGHT + tl.arange(0, HEIGHT)
    unit = unit_block * WIDTH + tl.arange(0, WIDTH)
    feature = tl.arange(0, DEPTH)
    x_pointers = x_pointer + row[:, None] * features + feature[None, :]
    w_pointers = w_pointer + unit[:, None] * features + feature[None, :]
    piece_stride = tl.cast(units, tl.int64) * features

    products = zeros_each(PIECES, HEIGHT, WIDTH)
    for start in range(0, features, DEPTH):
        within = (feature < features - start)[None, :]
        x = tl.load(x_pointers + start, mask=(row < rows)[:, None] & within, other=0)
        sums = ()
        for piece in tl.static_range(PIECES):
            w = tl.load(w_pointers + piece * piece_stride + start, mask=(unit < units)[:, None] & within, other=0)
            sums = append(sums, add_product(products[piece], x, tl.trans(w), PRECISION))
        products = sums

    best = products[0]
    if has_bias:
        best += widen(tl.load(b_pointer + unit, mask=unit < units, other=0), tl.float32)[None, :]
    winner = tl.zeros((HEIGHT, WIDTH), tl.int32)
    for piece in tl.static_range(1, PIECES):
        value = products[piece]
        if has_bias:
            value += widen(tl.load(b_pointer + piece * units + unit, mask=unit < units, other=0), tl.float32)[None, :]
        wins = beats(value, best)
        best = tl.where(wins, value, best)
        winner = tl.where(wins, piece, winner)
    if drops:
        best, winner = drop(best, winner, seed_pointer, p, scale, HEIGHT, WIDTH, tl.float32)

    inside = (row < rows)[:, None] & (unit < units)[None, :]
    offsets = row[:, None] * units + unit[None, :]
    tl.store(y_pointer + offsets, narrow(best, y_pointer.dtype.element_ty), mask=inside)
    if keeps_winner:
        tl.store(winner_pointer + offsets, winner.to(tl.uint8), mask=inside)


@kernel
def data_gradient_kernel(
    g_pointer,  # gradient of the maxima, (rows, units)
    winner_pointer,  # winners, (rows, units)
    w_pointer,  # weights, (pieces, units, features)
    dx_pointer,  # gradient of the input, (rows, features)
    rows: tl.int64,
    units,
    features,
    scale: tl.float64,
    PIECES: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
):
    row_block, feature_block = grouped_blocks(tl.cdiv(rows, HEIGHT), tl.cdiv(features, WIDTH))
    row = row_block * HEIGHT + tl.arange(0, HEIGHT)
    feature = feature_block * WIDTH + tl.arange(0, WIDTH)
    unit = tl.arange(0, DEPTH)
    maxima = row[:, None] * units + unit[None, :]
    w_pointers = w_pointer + unit[:, None] * features + feature[None, :]
    piece_stride = tl.cast(units, tl.int64) * features

    sums = tl.zeros((HEIGHT, WIDTH), tl.float32)
    for start in range(0, units, DEPTH):
        within = unit < units - start
        inside = (row < rows)[:, None] & within[None, :]
        g = tl.load(g_pointer + maxima + start, mask=inside, other=0)
        winner = tl.load(winner_pointer + maxima + start, mask=inside, other=0)
        for piece in tl.static_range(PIECES):
            w_inside = within[:, None] & (feature < features)[None, :]
            w = tl.load(w_pointers + piece * piece_stride, mask=w_inside, other=0)
            sums = add_product(sums, tl.where(winner == piece, g, tl.zeros_like(g)), w, "ieee")
        w_pointers += DEPTH * features

    dx = narrow(sums * scalar(scale, tl.float32), dx_pointer.dtype.element_ty)
    inside = (row < rows)[:, None] & (feature < features)[None, :]
    tl.store(dx_pointer + row[:, None] * features + feature[None, :], dx, mask=inside)


@kernel
def weight_gradient_kernel(
    g_pointer,  # gradient of the maxima, (rows, units)
    winner_pointer,  # winners, (rows, units)
    x_pointer,  # input, (rows, features)
    dw_pointer,  # partial sums of the weights' gradient, (shares, pieces, units, features)
    db_pointer,  # partial sums of the bias's gradient, (shares, pieces, units); not written unless sums_bias
    rows: tl.int64,
    share: tl.int64,  # rows of one partial sum, a multiple of DEPTH
    units,
    features,
    sums_bias: tl.int32,
    scale: tl.float64,
    PIECES: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    feature_blocks = tl.cdiv(features, WIDTH)
    feature_block = program % feature_blocks
    unit_blocks = tl.cdiv(units, HEIGHT)
    unit = program // feature_blocks % unit_blocks * HEIGHT + tl.arange(0, HEIGHT)
    feature = feature_block * WIDTH + tl.arange(0, WIDTH)
    this_share = program // feature_blocks // unit_blocks
    first = this_share * share
    rows_left = tl.minimum(rows - first, share).to(tl.int32)
    row = tl.arange(0, DEPTH)
    maxima = (first + row)[:, None] * units + unit[None, :]
    x_pointers = x_pointer + (first + row)[:, None] * features + feature[None, :]
    step = tl.cast(units, tl.int64) * DEPTH
    sums_bias_here = (sums_bias != 0) & (feature_block == 0)

    products = zeros_each(PIECES, HEIGHT, WIDTH)
    totals = zeros_each(PIECES, 1, HEIGHT)
    for start in range(0, rows_left, DEPTH):
        within = (row < rows_left - start)[:, None]
        x = tl.load(x_pointers, mask=within & (feature < features)[None, :], other=0)
        g = tl.load(g_pointer + maxima, mask=within & (unit < units)[None, :], other=0)
        winner = tl.load(winner_pointer + maxima, mask=within & (unit < units)[None, :], other=0)
        new_products = ()
        new_totals = ()
        for piece in tl.static_range(PIECES):
            won = tl.where(winner == piece, g, tl.zeros_like(g))
            new_products = append(new_products, add_product(products[piece], tl.trans(won), x, "ieee"))
            total = totals[piece]
            if sums_bias_here:
                total += tl.sum(widen(won, tl.float32), axis=0)[None, :]
            new_totals = append(new_totals, total)
        products = new_products
        totals = new_totals
        x_pointers += DEPTH * features
        maxima += step

    inside = (unit < units)[:, None] & (feature < features)[None, :]
    for piece in tl.static_range(PIECES):
        unit_row = (this_share * PIECES + piece) * units + unit
        dw = products[piece] * scalar(scale, tl.float32)
        tl.store(dw_pointer + unit_row[:, None] * features + feature[None, :], dw, mask=inside)
        if sums_bias_here:
            db = totals[piece] * scalar(scale, tl.float32)
            tl.store(db_pointer + unit_row[None, :], db, mask=(unit < units)[None, :])


# --- Apart: the maximum of features that are in memory, and the expansion of its gradient -----------------------------


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
def maximum_kernel(
    x_pointer,  # features, (pieces rows, columns)
    b_pointer,  # bias, (pieces, columns) or (pieces, units); not read unless has_bias
    y_pointer,  # maxima, (rows, columns)
    winner_pointer,  # winners, (rows, columns); not written unless keeps_winner
    seed_pointer,  # one int64; not read unless drops
    rows: tl.int64,
    columns,
    units: tl.int64,
    pieces: tl.int32,
    column_blocks: tl.int64,
    has_bias: tl.int32,
    keeps_winner: tl.int32,
    drops: tl.int32,
    p: tl.float64,
    scale: tl.float64,
    BY_COLUMN: tl.constexpr,
    COMPUTE: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    _, _, row, column, inside, whole = tile_place(rows, columns, column_blocks, HEIGHT, WIDTH)
    source = first_piece(row, units, pieces)[:, None] * columns + column[None, :]

    best = widen(load_tile(x_pointer, source, inside, whole), COMPUTE)
    if has_bias:
        best += bias_tile(b_pointer, 0, row, column, columns, units, BY_COLUMN, COMPUTE)
    winner = tl.zeros((HEIGHT, WIDTH), tl.int32)
    for piece in range(1, pieces):
        value = widen(load_tile(x_pointer + piece * units * columns, source, inside, whole), COMPUTE)
        if has_bias:
            value += bias_tile(b_pointer, piece, row, column, columns, units, BY_COLUMN, COMPUTE)
        wins = beats(value, best)
        best = tl.where(wins, value, best)
        winner = tl.where(wins, piece, winner)
    if drops:
        best, winner = drop(best, winner, seed_pointer, p, scale, HEIGHT, WIDTH, COMPUTE)

    target = row[:, None] * columns + column[None, :]
    store_tile(y_pointer, target, narrow(best, y_pointer.dtype.element_ty), inside, whole)
    if keeps_winner:
        store_tile(winner_pointer, target, winner.to(tl.uint8), inside, whole)


@kernel
def expansion_kernel(
    g_pointer,  # gradient of the maxima, (rows, columns)
    winner_pointer,  # winners, (rows, columns)
    dx_pointer,  # gradient of the features, (pieces rows, columns)
    partial_pointer,  # partial sums of the bias's gradient, see `_partial_shape`; not written unless sums_bias
    rows: tl.int64,
    columns,
    units: tl.int64,
    pieces: tl.int32,
    column_blocks: tl.int64,
    sums_bias: tl.int32,
    scale: tl.float64,
    BY_COLUMN: tl.constexpr,
    COMPUTE: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    block_row, block_column, row, column, inside, whole = tile_place(rows, columns, column_blocks, HEIGHT, WIDTH)
    first = first_piece(row, units, pieces)
    source = row[:, None] * columns + column[None, :]
    target = first[:, None] * columns + column[None, :]

    g = widen(load_tile(g_pointer, source, inside, whole), COMPUTE) * scalar(scale, COMPUTE)
    winner = load_tile(winner_pointer, source, inside, whole)
    for piece in range(pieces):
        dx = tl.where(winner == piece, g, 0.0)
        dx_piece = dx_pointer + piece * units * columns
        store_tile(dx_piece, target, narrow(dx, dx_pointer.dtype.element_ty), inside, whole)
        if sums_bias:
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
def features_tile(inside, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PIECES: tl.constexpr):
    """Offsets (ROWS, COLUMNS PIECES) of the pieces of a flat tile of maxima, and which are inside."""
    offsets = tl.arange(0, ROWS)[:, None] * COLUMNS * PIECES + tl.arange(0, COLUMNS * PIECES)[None, :]
    each = tl.broadcast_to(inside[:, :, None], (ROWS, COLUMNS, PIECES))
    return offsets, tl.reshape(each, (ROWS, COLUMNS * PIECES))


@kernel
def adjacent_maximum_kernel(
    x_pointer,  # features, (numel, pieces)
    y_pointer,  # maxima, (numel,)
    winner_pointer,  # winners, (numel,); not written unless keeps_winner
    numel: tl.int64,
    pieces: tl.int32,
    keeps_winner: tl.int32,
    PIECES: tl.constexpr,  # pieces that are loaded together, or 0
    COMPUTE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    _, start, offsets, inside, whole = flat_tile(numel, ROWS, COLUMNS)

    winner = tl.zeros((ROWS, COLUMNS), tl.int32)
    if PIECES:
        source, within = features_tile(inside, ROWS, COLUMNS, PIECES)
        x = widen(load_tile(x_pointer + start * PIECES, source, within, whole), COMPUTE)
        values = split_pieces(x, ROWS, COLUMNS, PIECES)
        best = values[0]
        for piece in tl.static_range(1, PIECES):
            wins = beats(values[piece], best)
            best = tl.where(wins, values[piece], best)
            winner = tl.where(wins, piece, winner)
    else:
        source = offsets * pieces
        best = widen(load_tile(x_pointer + start * pieces, source, inside, whole), COMPUTE)
        for piece in range(1, pieces):
            value = widen(load_tile(x_pointer + start * pieces + piece, source, inside, whole), COMPUTE)
            wins = beats(value, best)
            best = tl.where(wins, value, best)
            winner = tl.where(wins, piece, winner)

    store_tile(y_pointer + start, offsets, narrow(best, y_pointer.dtype.element_ty), inside, whole)
    if keeps_winner:
        store_tile(winner_pointer + start, offsets, winner.to(tl.uint8), inside, whole)


@kernel
def adjacent_expansion_kernel(
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
    _, start, offsets, inside, whole = flat_tile(numel, ROWS, COLUMNS)

    g = widen(load_tile(g_pointer + start, offsets, inside, whole), COMPUTE)
    winner = load_tile(winner_pointer + start, offsets, inside, whole)
    if PIECES:
        dx = tl.where(winner[:, :, None] == tl.arange(0, PIECES)[None, None, :], g[:, :, None], 0.0)
        dx = narrow(tl.reshape(dx, (ROWS, COLUMNS * PIECES)), dx_pointer.dtype.element_ty)
        target, within = features_tile(inside, ROWS, COLUMNS, PIECES)
        store_tile(dx_pointer + start * PIECES, target, dx, within, whole)
    else:
        for piece in range(pieces):
            dx = narrow(tl.where(winner == piece, g, 0.0), dx_pointer.dtype.element_ty)
            store_tile(dx_pointer + start * pieces + piece, offsets * pieces, dx, inside, whole)


# --- Configurations ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tile:
    """What a program of a fused kernel computes: so many rows and columns, in sums of so many terms at a time."""

    height: int
    width: int
    depth: int
    threads: int

    def accesses(self, elements: int, itemsize: int) -> int:
        """128-bit accesses by each thread, to so many elements of the tile."""
        return elements * itemsize // 16 // self.threads


def _stages(loaded_bytes: int) -> int:
    """How many steps of a loop over tiles may have their operands in shared memory at once."""
    return max(1, min(3, _SHARED_BYTES // loaded_bytes))


# The accumulators of all pieces take 64 to 128 registers of each thread.  Small tiles are for few rows, which would
# leave most multiprocessors without a program of large ones, and for many pieces.
_LARGE_TILE, _LARGE_PIECES = (128, 64), range(2, 5)
_SMALL_TILE = (64, 32)
#: Pieces that the fused kernels take.  Without tensor cores the operands' tiles are in registers too.
_FUSED_PIECES = {"fp16": range(2, 9), "bf16": range(2, 9), "tf32": range(2, 9), "fp32": range(2, 5)}
# Programs that are enough for large tiles: about one for each multiprocessor of an A100 or H100.
_ENOUGH_PROGRAMS = 128
# Shared memory that a program may have on any GPU: 99 KB on NVIDIA's consumer GPUs, 64 KB on AMD's.
_SHARED_BYTES = 2**16 if torch.version.hip else 99 * 2**10

# The most features that are multiplied in the fused kernel, by the precision of the product.  Fused, each sum isn't
# written and read again, 2e bytes; but PyTorch's products are made at a higher rate.  Where it is an eighth higher, the
# two are equal at rate * e / bandwidth / 0.14 features.  With the figures of an H200 (790 TFLOP/s in 16 bits, half of
# that in TF32, 50 in float32 without tensor cores; 4.3 TB/s) these are 2600, 2600 and 330.  Not measured.
_MOST_FEATURES = {"fp16": 2048, "bf16": 2048, "tf32": 2048, "fp32": 256}

# The same for the backward pass.  Fused, the expansion isn't written and read twice, 3 pieces e bytes for each maximum,
# but the gradient and the winner are read once more: e + 1.  Both kernels make operands in registers, so let PyTorch's
# products be made at a rate that is a third higher: the two are equal at 620 (2 pieces) to 720 features (4).  Not
# measured.
_MOST_FEATURES_BACKWARD = 512
# In TF32, tensor cores want both operands to lie along the sum; that of the data's gradient, over units, isn't theirs.
_FUSED_BACKWARD_DTYPES = (torch.float16, torch.bfloat16)
_FUSED_BACKWARD_PIECES = range(2, 5)
_DATA_TILE = _Tile(128, 64, 64, 256)
_WEIGHT_TILE = _Tile(64, 64, 32, 256)


def _precision(dtype: torch.dtype) -> str:
    """The precision of a product, as PyTorch's own products have it: TF32 only where it is allowed."""
    if dtype is torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return TRITON_TYPE[dtype]


def takes_fused(features: int, pieces: int, dtype: torch.dtype) -> bool:
    """Whether product and maximum are made by one kernel, rather than by PyTorch's product and a pass."""
    precision = _precision(dtype)
    # Rows that don't begin at a multiple of 16 bytes can't be copied to shared memory asynchronously.
    aligned = features % 16 == 0
    return aligned and pieces in _FUSED_PIECES.get(precision, ()) and features <= _MOST_FEATURES[precision]


def takes_fused_backward(rows: int, units: int, features: int, pieces: int, dtype: torch.dtype) -> bool:
    """Whether the gradient is expanded on the fly, rather than by a pass, with PyTorch's products."""
    few = pieces in _FUSED_BACKWARD_PIECES and features <= _MOST_FEATURES_BACKWARD
    aligned = features % 16 == 0 and units % 16 == 0
    enough = _programs(_DATA_TILE, rows, features) >= _ENOUGH_PROGRAMS
    return dtype in _FUSED_BACKWARD_DTYPES and few and aligned and enough


def _tile(precision: str, pieces: int, *, large: bool) -> _Tile:
    depth = 64 if precision in ("fp16", "bf16") else 32  # 128 bytes
    if precision == "fp32":  # no tensor cores: tiles of operands in registers, too
        return _Tile(*_SMALL_TILE, depth, 256)
    if large:
        return _Tile(*_LARGE_TILE, depth, 256)
    return _Tile(*_SMALL_TILE, depth, 128)


@cache
def _fused(precision: str, pieces: int, tile: _Tile) -> Configuration:
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision, torch.float32)
    loaded = (tile.height + pieces * tile.width) * tile.depth
    return configure(
        linear_maxout_kernel,
        f"linear maxout of {pieces} {tile.height}x{tile.width} {precision}",
        dtype,
        {
            "PIECES": pieces,
            "HEIGHT": tile.height,
            "WIDTH": tile.width,
            "DEPTH": tile.depth,
            "PRECISION": "tf32" if precision == "tf32" else "ieee",
        },
        pointers={"winner": torch.uint8, "seed": torch.int64},
        threads=tile.threads,
        num_stages=_stages(loaded * dtype.itemsize),
        wide_loads=tile.accesses(loaded, dtype.itemsize),
        wide_stores=tile.accesses(tile.height * tile.width, dtype.itemsize),
        tensor_cores=precision != "fp32",
    )


@cache
def _gradient(of: str, dtype: torch.dtype, pieces: int) -> Configuration:
    if of == "data":
        code, tile = data_gradient_kernel, _DATA_TILE
        loaded, stored = (tile.height + pieces * tile.width) * tile.depth, dtype.itemsize
    else:
        code, tile = weight_gradient_kernel, _WEIGHT_TILE
        loaded, stored = (tile.height + tile.width) * tile.depth, 4 * pieces
    return configure(
        code,
        f"linear maxout, gradient of {of}, {pieces} pieces {TRITON_TYPE[dtype]}",
        dtype,
        {"PIECES": pieces, "HEIGHT": tile.height, "WIDTH": tile.width, "DEPTH": tile.depth},
        pointers={"winner": torch.uint8, "dw": torch.float32, "db": torch.float32},
        threads=tile.threads,
        num_stages=_stages(loaded * dtype.itemsize),
        wide_loads=tile.accesses(loaded, dtype.itemsize),
        wide_stores=tile.accesses(tile.height * tile.width, stored),
        tensor_cores=True,
    )


# Widths of a tile of the pass.
_WIDTHS = (64, TILE)
# Elements of a tile whose columns have a bias: tall, for fewer partial sums.
_SUMMED_TILE = 4 * TILE


@cache
def _pass(direction: str, dtype: torch.dtype, width: int, by_column: bool) -> Configuration:
    threads, height = threads_for(dtype), TILE // width
    if direction == "backward" and by_column:
        threads, height = 256, _SUMMED_TILE // width // (2 if dtype is torch.float64 else 1)
    wide = height * width * dtype.itemsize // 16 // threads
    return configure(
        maximum_kernel if direction == "forward" else expansion_kernel,
        f"maxout {direction} {'by column' if by_column else 'by row'} x{width} {TRITON_TYPE[dtype]}",
        dtype,
        {"BY_COLUMN": by_column, "COMPUTE": COMPUTE[dtype], "HEIGHT": height, "WIDTH": width},
        pointers={"winner": torch.uint8, "seed": torch.int64, "partial": ACCUMULATOR[dtype]},
        threads=threads,
        wide_loads=wide * (2 if direction == "forward" else 1),
        wide_stores=wide,
    )


@cache
def _adjacent(direction: str, dtype: torch.dtype, together: int) -> Configuration:
    rows, columns = tile_shape(dtype)
    threads = 256 if together == 4 else threads_for(dtype)
    accesses = rows * threads_for(dtype) // threads  # to the maxima; as many for each piece
    if direction == "forward":
        code, wide = adjacent_maximum_kernel, (together * accesses, accesses)
    else:
        code, wide = adjacent_expansion_kernel, (accesses, together * accesses)
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
    for precision in _MOST_FEATURES:
        for pieces in _FUSED_PIECES[precision]:
            sizes = (False, True) if pieces in _LARGE_PIECES and precision != "fp32" else (False,)
            for large in sizes:
                yield _fused(precision, pieces, _tile(precision, pieces, large=large))
    for dtype in _FUSED_BACKWARD_DTYPES:
        for pieces in _FUSED_BACKWARD_PIECES:
            for of in ("data", "weight"):
                yield _gradient(of, dtype, pieces)
    for direction in ("forward", "backward"):
        for dtype in DTYPES:
            yield _pass(direction, dtype, _WIDTHS[0], True)
            for width in _WIDTHS:
                yield _pass(direction, dtype, width, False)
            for together in (0, *_TOGETHER):
                yield _adjacent(direction, dtype, together)


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


def _dropout_scale(p: float) -> float:
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
    winner = x.new_empty_strided(shape, strides, dtype=torch.uint8) if keeps_winner else _nothing(x, torch.uint8)
    memory = _memory(x.shape, x.stride(), pieces, dim, adjacent)
    if memory.flat:
        together = pieces if pieces in _TOGETHER else 0
        configuration = _adjacent("forward", x.dtype, together)
        launch(configuration, programs_for(y.numel()), x, y, winner, y.numel(), pieces, int(keeps_winner))
    else:
        configuration = _pass("forward", x.dtype, _width(memory), memory.by_column)
        programs, extents = _division(memory, pieces, configuration)
        flags = (int(bias is not None), int(keeps_winner), int(seed is not None))
        b = x if bias is None else bias.contiguous()
        seed = _nothing(x, torch.int64) if seed is None else seed
        launch(configuration, programs, x, b, y, winner, seed, *extents, *flags, p, _dropout_scale(p))
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
        configuration = _adjacent("backward", g.dtype, pieces if pieces in _TOGETHER else 0)
        launch(configuration, programs_for(g.numel()), g, winner, dx, g.numel(), pieces)
        return dx, _nothing(g, g.dtype)
    configuration = _pass("backward", g.dtype, _width(memory), memory.by_column)
    programs, extents = _division(memory, pieces, configuration)
    partial = torch.empty(
        _partial_shape(memory, extents, programs, pieces) if sums_bias else 0,
        dtype=ACCUMULATOR[g.dtype],
        device=g.device,
    )
    launch(configuration, programs, g, winner, dx, partial, *extents, int(sums_bias), _dropout_scale(p))
    if not sums_bias:
        return dx, _nothing(g, g.dtype)
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


def _nothing(x: Tensor, dtype: torch.dtype) -> Tensor:
    """In place of an operand that isn't there, and whose memory the kernel doesn't touch."""
    return x.new_empty(0, dtype=dtype)


def linear_maxout_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, seed: Tensor | None, p: float, keeps_winner: bool
) -> tuple[Tensor, Tensor]:
    """The maxima over pieces of x weight^T + bias, and their winners (empty unless ``keeps_winner``).

    ``x`` (*, features), ``weight`` (pieces, units, features), ``bias`` (pieces, units); both results (*, units).  With
    a ``seed``, dropout of the maxima with probability ``p``.
    """
    pieces, units, features = weight.shape
    rows = x.numel() // features
    if not takes_fused(features, pieces, x.dtype):
        products = linear(x.reshape(rows, features), weight.flatten(0, 1), None if bias is None else bias.flatten())
        y, winner = maxout_forward(products, None, seed, pieces, 1, False, p, keeps_winner)
        return y.view(*x.shape[:-1], units), winner.view(*x.shape[:-1], units) if keeps_winner else winner
    x, weight = x.contiguous(), weight.contiguous()
    y = torch.empty((*x.shape[:-1], units), dtype=x.dtype, device=x.device)
    winner = torch.empty(y.shape if keeps_winner else 0, dtype=torch.uint8, device=x.device)
    configuration, programs = _fused_for(rows, units, pieces, x.dtype)
    flags = (int(bias is not None), int(keeps_winner), int(seed is not None))
    b = x if bias is None else bias.contiguous()
    seed = _nothing(x, torch.int64) if seed is None else seed
    launch(configuration, programs, x, weight, b, y, winner, seed, rows, units, features, *flags, p, _dropout_scale(p))
    return y, winner


def _fused_for(rows: int, units: int, pieces: int, dtype: torch.dtype) -> tuple[Configuration, int]:
    """The configuration for these extents, and how many programs."""
    precision = _precision(dtype)
    if precision != "fp32" and pieces in _LARGE_PIECES:
        large = _tile(precision, pieces, large=True)
        if _programs(large, rows, units) >= _ENOUGH_PROGRAMS:
            return _fused(precision, pieces, large), _programs(large, rows, units)
    small = _tile(precision, pieces, large=False)
    return _fused(precision, pieces, small), _programs(small, rows, units)


def _programs(tile: _Tile, rows: int, columns: int) -> int:
    return cdiv(rows, tile.height) * cdiv(columns, tile.width)


def linear_maxout_backward(
    g: Tensor, winner: Tensor, x: Tensor | None, weight: Tensor | None, pieces: int, p: float, sums_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the input, the weight and the bias, in the shapes of `linear_maxout_forward`'s operands.

    The first is empty without a ``weight``, the second without an ``x``, and the third unless asked for.  ``p`` is the
    probability of the dropout that the winners went through.
    """
    *batch, units = g.shape
    rows = g.numel() // units
    features = max(0 if operand is None else operand.shape[-1] for operand in (x, weight))
    g, winner = g.reshape(rows, units), winner.view(rows, units)
    x = None if x is None else x.reshape(rows, features)
    dx = dw = _nothing(g, g.dtype)
    # The kernel of the weight's gradient sums the bias's.
    fused = (x is not None or not sums_bias) and takes_fused_backward(rows, units, features, pieces, g.dtype)
    if fused:
        g, db = g.contiguous(), dw
        if weight is not None:
            dx = _data_gradient(g, winner, weight, p)
        if x is not None:
            dw, db = _weight_gradient(g, winner, x, pieces, p, sums_bias)
    else:
        dz, db = maxout_backward(g, winner, (pieces * units, 1), pieces, 1, False, p, sums_bias)
        if weight is not None:
            dx = dz @ weight.flatten(0, 1)
        if x is not None:
            dw = (dz.t() @ x).view(pieces, units, features)
    return dx if weight is None else dx.view(*batch, features), dw, db


def _data_gradient(g: Tensor, winner: Tensor, weight: Tensor, p: float) -> Tensor:
    pieces, units, features = weight.shape
    rows = g.shape[0]
    dx = g.new_empty(rows, features)
    programs = _programs(_DATA_TILE, rows, features)
    extents = (rows, units, features, _dropout_scale(p))
    launch(_gradient("data", g.dtype, pieces), programs, g, winner, weight.contiguous(), dx, *extents)
    return dx


# Rows that a partial sum is worth.
_FEWEST_ROWS = 512


def _weight_gradient(
    g: Tensor, winner: Tensor, x: Tensor, pieces: int, p: float, sums_bias: bool
) -> tuple[Tensor, Tensor]:
    (rows, units), features = g.shape, x.shape[1]
    programs = _programs(_WEIGHT_TILE, units, features)
    # Rows are shared out where weights alone make too few programs.
    shares = min(cdiv(_ENOUGH_PROGRAMS, programs), cdiv(rows, _FEWEST_ROWS))
    share = cdiv(cdiv(rows, shares), _WEIGHT_TILE.depth) * _WEIGHT_TILE.depth
    shares = cdiv(rows, share)
    dw = g.new_empty((shares, pieces, units, features), dtype=torch.float32)
    db = g.new_empty((shares, pieces, units) if sums_bias else (0,), dtype=torch.float32)
    extents = (rows, share, units, features, int(sums_bias), _dropout_scale(p))
    launch(_gradient("weight", g.dtype, pieces), shares * programs, g, winner, x.contiguous(), dw, db, *extents)
    return _total(dw).to(g.dtype), _total(db).to(g.dtype) if sums_bias else _nothing(g, g.dtype)


def _total(partial: Tensor) -> Tensor:
    return partial.sum(0) if len(partial) > 1 else partial[0]
