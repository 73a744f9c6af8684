"""Maxout of a linear layer: the matrix product and its maximum over pieces in a single kernel.

A program holds the accumulators of all pieces for the same rows and units, which share each tile of x, and stores their
maximum.  The product itself, ``pieces`` times as large, never reaches memory.  `fused_refusal` tells where that isn't
better than PyTorch's product followed by a pass (`fusednn.kernels.maxout`), whose maxima and winners these are.

With the gradient of the maxima scattered to the winners, what remains is the gradient of an ordinary, ``pieces`` times
wider, linear layer.  Two kernels scatter each tile on the fly, one for the product with the weights and one for that
with x, which sums the bias's gradient on the way; `takes_fused_backward` tells where.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .base._triton import tl, triton
from .base.device import Device, device_of
from .base.figures import most_maxout_features, most_maxout_features_backward
from .base.launch import TRITON_TYPE, Configuration, configure, kernel, launch, ships
from .base.numerics import add_product, narrow, scalar, widen
from .base.tiles import cdiv
from .maxout import beats, drop, dropout_scale, nothing

__all__ = [
    "fused_refusal",
    "linear_maxout_backward",
    "linear_maxout_forward",
    "takes_fused",
    "takes_fused_backward",
]

# --- Device functions -------------------------------------------------------------------------------------------------


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


@triton.jit
def taken_apart(product, PIECES: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """The products of 2 or 4 pieces, from that of their units side by side: two pieces take turns, so that a thread of
    tensor cores has both, and the next two follow behind all units.
    """
    if PIECES == 2:
        return tl.split(tl.reshape(product, (HEIGHT, WIDTH, 2)))
    else:
        even, odd = tl.split(tl.reshape(product, (HEIGHT, 2, WIDTH, 2)))
        first, third = tl.split(tl.trans(even, 0, 2, 1))
        second, fourth = tl.split(tl.trans(odd, 0, 2, 1))
        return first, second, third, fourth


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
def linear_maxout_forward_kernel(
    x_pointer,  # input, (rows, features)
    w_pointer,  # weights, (pieces, units, features)
    b_pointer,  # bias, (pieces, units); not read unless has_bias
    y_pointer,  # output, (rows, units)
    winner_pointer,  # winners, (rows, units); not written unless wants_winner
    seed_pointer,  # one int64; not read unless has_seed
    rows: tl.int64,
    units,
    features,
    has_bias: tl.int32,
    wants_winner: tl.int32,
    has_seed: tl.int32,
    p: tl.float64,
    scale: tl.float64,
    PIECES: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    SIDE_BY_SIDE: tl.constexpr,  # one product for all pieces, which reads x once
):
    row_block, unit_block = grouped_blocks(tl.cdiv(rows, HEIGHT), tl.cdiv(units, WIDTH))
    row = row_block * HEIGHT + tl.arange(0, HEIGHT)
    unit = unit_block * WIDTH + tl.arange(0, WIDTH)
    feature = tl.arange(0, DEPTH)
    x_pointers = x_pointer + row[:, None] * features + feature[None, :]
    piece_stride = tl.cast(units, tl.int64) * features

    if SIDE_BY_SIDE:
        column = tl.arange(0, PIECES * WIDTH)  # see `taken_apart`
        piece_of = column // (2 * WIDTH) * 2 + column % 2
        unit_of = unit_block * WIDTH + column // 2 % WIDTH
        w_pointers = w_pointer + (piece_of * piece_stride + unit_of * features)[:, None] + feature[None, :]
        product = tl.zeros((HEIGHT, PIECES * WIDTH), tl.float32)
        for start in range(0, features, DEPTH):
            within = (feature < features - start)[None, :]
            x = tl.load(x_pointers + start, mask=(row < rows)[:, None] & within, other=0)
            w = tl.load(w_pointers + start, mask=(unit_of < units)[:, None] & within, other=0)
            product = add_product(product, x, tl.trans(w), PRECISION)
        products = taken_apart(product, PIECES, HEIGHT, WIDTH)
    else:
        w_pointers = w_pointer + unit[:, None] * features + feature[None, :]
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
    if has_seed:
        best, winner = drop(best, winner, seed_pointer, p, scale, HEIGHT, WIDTH, tl.float32)

    inside = (row < rows)[:, None] & (unit < units)[None, :]
    offsets = row[:, None] * units + unit[None, :]
    tl.store(y_pointer + offsets, narrow(best, y_pointer.dtype.element_ty), mask=inside)
    if wants_winner:
        tl.store(winner_pointer + offsets, winner.to(tl.uint8), mask=inside)


@kernel
def linear_maxout_data_gradient_kernel(
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
def linear_maxout_weight_gradient_kernel(
    g_pointer,  # gradient of the maxima, (rows, units)
    winner_pointer,  # winners, (rows, units)
    x_pointer,  # input, (rows, features)
    dw_pointer,  # partial sums of the weights' gradient, (splits, pieces, units, features)
    db_pointer,  # partial sums of the bias's gradient, (splits, pieces, units); not written unless wants_sums
    rows: tl.int64,
    rows_per_split: tl.int64,  # rows of one partial sum, a multiple of DEPTH
    units,
    features,
    wants_sums: tl.int32,
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
    this_split = program // feature_blocks // unit_blocks
    first = this_split * rows_per_split
    rows_left = tl.minimum(rows - first, rows_per_split).to(tl.int32)
    row = tl.arange(0, DEPTH)
    maxima = (first + row)[:, None] * units + unit[None, :]
    x_pointers = x_pointer + (first + row)[:, None] * features + feature[None, :]
    step = tl.cast(units, tl.int64) * DEPTH
    sums_bias_here = (wants_sums != 0) & (feature_block == 0)

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
        unit_row = (this_split * PIECES + piece) * units + unit
        dw = products[piece] * scalar(scale, tl.float32)
        tl.store(dw_pointer + unit_row[:, None] * features + feature[None, :], dw, mask=inside)
        if sums_bias_here:
            db = totals[piece] * scalar(scale, tl.float32)
            tl.store(db_pointer + unit_row[None, :], db, mask=(unit < units)[None, :])


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


def _stages(loaded_bytes: int) -> dict[str, Any]:
    """How many steps of a loop over tiles may have their operands in shared memory at once."""
    return {
        name: max(1, min(3, shared_bytes // loaded_bytes))
        for name, shared_bytes in (("num_stages", _SHARED_BYTES), ("amd_stages", _AMD_SHARED_BYTES))
    }


# The accumulators of all pieces take 64 to 128 registers of each thread.  Small tiles are for few rows, which would
# leave most multiprocessors without a program of large ones, and for many pieces.
_LARGE_TILE, _LARGE_PIECES = (128, 64), range(2, 5)
# Where operands take registers, too (not `Device.takes_large_tiles`), fewer pieces have large tiles, and more narrow
# ones: none of these spill for compute capabilities 8.0 to 12.0.
_LARGE_PIECES_BESIDE_OPERANDS = range(2, 3)
_NARROW_TILE, _NARROW_PIECES = (64, 16), range(6, 9)
_SMALL_TILE = (64, 32)
#: Pieces that the fused kernels take.  Without tensor cores the operands' tiles are in registers too.
_FUSED_PIECES = {"fp16": range(2, 9), "bf16": range(2, 9), "tf32": range(2, 9), "fp32": range(2, 5)}
# Pieces whose products are one, in 16 bits.
_SIDE_BY_SIDE_PIECES = (2, 4)
# Programs that are enough for large tiles: about one for each multiprocessor of an A100 or H100.
_ENOUGH_PROGRAMS = 128
# Shared memory that a program may have on any GPU: 99 KB on NVIDIA's consumer GPUs, 64 KB on AMD's.
_SHARED_BYTES, _AMD_SHARED_BYTES = 99 * 2**10, 2**16

# The most features that are multiplied in the fused kernel, by the precision of the product: 512, and 256 without
# tensor cores; and in the fused backward pass: 64.  Predicted, not measured.
_MOST_FEATURES = {precision: most_maxout_features(precision) for precision in ("fp16", "bf16", "tf32", "fp32")}
_MOST_FEATURES_BACKWARD = most_maxout_features_backward()
# In TF32, tensor cores want both operands to lie along the sum; that of the data's gradient, over units, isn't theirs.
_FUSED_BACKWARD_DTYPES = (torch.float16, torch.bfloat16)
_FUSED_BACKWARD_PIECES = range(2, 5)
_FUSED_BACKWARD_PIECES_BESIDE_OPERANDS = range(2, 4)  # as of the forward pass: 4 spill
_DATA_TILE = _Tile(128, 64, 64, 256)
_WEIGHT_TILE = _Tile(64, 64, 32, 256)


def _precision(dtype: torch.dtype, device: Device) -> str:
    """The precision of a product, as PyTorch's own products have it: TF32 only where it is allowed, and can be had."""
    if dtype is torch.float32 and device.has_tf32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return TRITON_TYPE[dtype]


def fused_refusal(features: int, pieces: int, dtype: torch.dtype, device: Device) -> str | None:
    """Why product and maximum aren't made by one kernel, but by PyTorch's product and a pass, or None."""
    precision = _precision(dtype, device)
    if precision not in _FUSED_PIECES or pieces not in _FUSED_PIECES[precision]:
        return f"cuBLAS: no kernel multiplies {pieces} pieces in {precision}"
    # Rows that don't begin at a multiple of 16 bytes can't be copied to shared memory asynchronously.
    if features % 16:
        return "cuBLAS: the features are no multiple of 16"
    return None if features <= (most := _MOST_FEATURES[precision]) else f"cuBLAS: more than {most} features"


def takes_fused(features: int, pieces: int, dtype: torch.dtype, device: Device) -> bool:
    """Whether product and maximum are made by one kernel."""
    return fused_refusal(features, pieces, dtype, device) is None


def takes_fused_backward(rows: int, units: int, features: int, pieces: int, dtype: torch.dtype, device: Device) -> bool:
    """Whether the gradient is scattered on the fly, rather than by a pass, with PyTorch's products."""
    taken = _FUSED_BACKWARD_PIECES if device.takes_large_tiles else _FUSED_BACKWARD_PIECES_BESIDE_OPERANDS
    few = pieces in taken and features <= _MOST_FEATURES_BACKWARD
    aligned = features % 16 == 0 and units % 16 == 0
    enough = _programs(_DATA_TILE, rows, features) >= _ENOUGH_PROGRAMS
    return dtype in _FUSED_BACKWARD_DTYPES and few and aligned and enough


def _tile(precision: str, pieces: int, *, large: bool, narrow: bool = False) -> _Tile:
    depth = 64 if precision in ("fp16", "bf16") else 32  # 128 bytes
    if precision == "fp32":  # no tensor cores: tiles of operands in registers, too
        return _Tile(*_SMALL_TILE, depth, 256)
    if large:
        return _Tile(*_LARGE_TILE, depth, 256)
    return _Tile(*(_NARROW_TILE if narrow else _SMALL_TILE), depth, 128)


def _is_for_large_registers(precision: str, pieces: int, tile: _Tile) -> bool:
    """Whether a tile is only for devices that take large ones."""
    if (tile.height, tile.width) == _LARGE_TILE:
        return pieces not in _LARGE_PIECES_BESIDE_OPERANDS
    return (tile.height, tile.width) == _SMALL_TILE and precision != "fp32" and pieces in _NARROW_PIECES


@cache
def _fused(precision: str, pieces: int, tile: _Tile) -> Configuration:
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision, torch.float32)
    loaded = (tile.height + pieces * tile.width) * tile.depth
    return configure(
        linear_maxout_forward_kernel,
        f"linear maxout of {pieces} {tile.height}x{tile.width} {precision}",
        dtype,
        {
            "PIECES": pieces,
            "HEIGHT": tile.height,
            "WIDTH": tile.width,
            "DEPTH": tile.depth,
            "PRECISION": "tf32" if precision == "tf32" else "ieee",
            "SIDE_BY_SIDE": pieces in _SIDE_BY_SIDE_PIECES and dtype.itemsize == 2,
        },
        pointers={"winner": torch.uint8, "seed": torch.int64},
        threads=tile.threads,
        **_stages(loaded * dtype.itemsize),
        wide_loads=tile.accesses(loaded, dtype.itemsize),
        wide_stores=tile.accesses(tile.height * tile.width, dtype.itemsize),
        tensor_cores=precision != "fp32",
        large=_is_for_large_registers(precision, pieces, tile),
    )


@cache
def _gradient(of: str, dtype: torch.dtype, pieces: int) -> Configuration:
    if of == "data":
        code, tile = linear_maxout_data_gradient_kernel, _DATA_TILE
        loaded, stored = (tile.height + pieces * tile.width) * tile.depth, dtype.itemsize
    else:
        code, tile = linear_maxout_weight_gradient_kernel, _WEIGHT_TILE
        loaded, stored = (tile.height + tile.width) * tile.depth, 4 * pieces
    return configure(
        code,
        f"linear maxout, gradient of {of}, {pieces} pieces {TRITON_TYPE[dtype]}",
        dtype,
        {"PIECES": pieces, "HEIGHT": tile.height, "WIDTH": tile.width, "DEPTH": tile.depth},
        pointers={"winner": torch.uint8, "dw": torch.float32, "db": torch.float32},
        threads=tile.threads,
        **_stages(loaded * dtype.itemsize),
        wide_loads=tile.accesses(loaded, dtype.itemsize),
        wide_stores=tile.accesses(tile.height * tile.width, stored),
        tensor_cores=True,
        large=pieces not in _FUSED_BACKWARD_PIECES_BESIDE_OPERANDS,
    )


@ships("maxout")
def configurations() -> Iterator[Configuration]:
    for precision in _MOST_FEATURES:
        for pieces in _FUSED_PIECES[precision]:
            sizes = (False, True) if pieces in _LARGE_PIECES and precision != "fp32" else (False,)
            for large in sizes:
                yield _fused(precision, pieces, _tile(precision, pieces, large=large))
            if pieces in _NARROW_PIECES:
                yield replace(_fused(precision, pieces, _tile(precision, pieces, large=False, narrow=True)), rare=True)
    for dtype in _FUSED_BACKWARD_DTYPES:
        for pieces in _FUSED_BACKWARD_PIECES:
            for of in ("data", "weight"):
                yield _gradient(of, dtype, pieces)


# --- Launchers --------------------------------------------------------------------------------------------------------


def linear_maxout_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, seed: Tensor | None, p: float, keeps_winner: bool
) -> tuple[Tensor, Tensor]:
    """The maxima over pieces of x weight^T + bias, and their winners (empty unless ``keeps_winner``).

    ``x`` (*, features), ``weight`` (pieces, units, features), ``bias`` (pieces, units); both results (*, units).  With
    a ``seed``, dropout of the maxima with probability ``p``.
    """
    pieces, units, features = weight.shape
    rows = x.numel() // features
    x, weight = x.contiguous(), weight.contiguous()
    y = torch.empty((*x.shape[:-1], units), dtype=x.dtype, device=x.device)
    winner = torch.empty(y.shape if keeps_winner else 0, dtype=torch.uint8, device=x.device)
    configuration, programs = _fused_for(rows, units, pieces, x.dtype, device_of(x))
    flags = (int(bias is not None), int(keeps_winner), int(seed is not None))
    b = x if bias is None else bias.contiguous()
    seed = nothing(x, torch.int64) if seed is None else seed
    launch(configuration, programs, x, weight, b, y, winner, seed, rows, units, features, *flags, p, dropout_scale(p))
    return y, winner


def _fused_for(rows: int, units: int, pieces: int, dtype: torch.dtype, device: Device) -> tuple[Configuration, int]:
    """The configuration for these extents, and how many programs."""
    precision = _precision(dtype, device)
    large_pieces = _LARGE_PIECES if device.takes_large_tiles else _LARGE_PIECES_BESIDE_OPERANDS
    if precision != "fp32" and pieces in large_pieces:
        large = _tile(precision, pieces, large=True)
        if _programs(large, rows, units) >= _ENOUGH_PROGRAMS:
            return _fused(precision, pieces, large), _programs(large, rows, units)
    narrow = not device.takes_large_tiles and precision != "fp32" and pieces in _NARROW_PIECES
    small = _tile(precision, pieces, large=False, narrow=narrow)
    return _fused(precision, pieces, small), _programs(small, rows, units)


def _programs(tile: _Tile, rows: int, columns: int) -> int:
    return cdiv(rows, tile.height) * cdiv(columns, tile.width)


def linear_maxout_backward(
    g: Tensor, winner: Tensor, x: Tensor | None, weight: Tensor | None, pieces: int, p: float, sums_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the input, the weight and the bias, in the shapes of `linear_maxout_forward`'s operands.

    The first is empty without a ``weight``, the second without an ``x``, and the third unless asked for, which needs
    ``x``.  ``p`` is the probability of the dropout that the winners went through.
    """
    *batch, units = g.shape
    rows = g.numel() // units
    g, winner = g.reshape(rows, units).contiguous(), winner.view(rows, units)
    dx = dw = db = nothing(g, g.dtype)
    if weight is not None:
        dx = _data_gradient(g, winner, weight, p)
    if x is not None:
        dw, db = _weight_gradient(g, winner, x.reshape(rows, x.shape[-1]), pieces, p, sums_bias)
    return dx if weight is None else dx.view(*batch, weight.shape[-1]), dw, db


def _data_gradient(g: Tensor, winner: Tensor, weight: Tensor, p: float) -> Tensor:
    pieces, units, features = weight.shape
    rows = g.shape[0]
    dx = g.new_empty(rows, features)
    programs = _programs(_DATA_TILE, rows, features)
    extents = (rows, units, features, dropout_scale(p))
    launch(_gradient("data", g.dtype, pieces), programs, g, winner, weight.contiguous(), dx, *extents)
    return dx


# Rows that a partial sum is worth.
_FEWEST_ROWS = 512


def _weight_gradient(
    g: Tensor, winner: Tensor, x: Tensor, pieces: int, p: float, sums_bias: bool
) -> tuple[Tensor, Tensor]:
    (rows, units), features = g.shape, x.shape[1]
    programs = _programs(_WEIGHT_TILE, units, features)
    # Rows are split where weights alone make too few programs.
    splits = min(cdiv(_ENOUGH_PROGRAMS, programs), cdiv(rows, _FEWEST_ROWS))
    rows_per_split = cdiv(cdiv(rows, splits), _WEIGHT_TILE.depth) * _WEIGHT_TILE.depth
    splits = cdiv(rows, rows_per_split)
    dw = g.new_empty((splits, pieces, units, features), dtype=torch.float32)
    db = g.new_empty((splits, pieces, units) if sums_bias else (0,), dtype=torch.float32)
    extents = (rows, rows_per_split, units, features, int(sums_bias), dropout_scale(p))
    launch(_gradient("weight", g.dtype, pieces), splits * programs, g, winner, x.contiguous(), dw, db, *extents)
    return _total(dw).to(g.dtype), _total(db).to(g.dtype) if sums_bias else nothing(g, g.dtype)


def _total(partial: Tensor) -> Tensor:
    return partial.sum(0) if len(partial) > 1 else partial[0]
