"""Flat tiles: how an elementwise kernel walks over memory, and how it packs booleans into bits.

A program owns ``TILE`` consecutive elements, arranged as (rows, columns) such that a row is one 16-byte access by each
thread: a thread issues all its 128-bit loads, two or four, before it needs the first.  A tile that lies inside the
tensor takes an unmasked branch: a mask is only as aligned as the tensor's length, and would otherwise split every
access into scalars.

Bits: a byte of a mask holds every row of 8 / rows neighbouring columns, which belong to one thread.  Packing and
unpacking are then shifts in registers: no shuffles, no shared memory.
"""

from collections.abc import Sequence

import torch

from ._triton import tl, triton

__all__ = [
    "MASK_BYTES",
    "TILE",
    "cdiv",
    "flat_tile",
    "load_bits",
    "load_tile",
    "mask_bytes",
    "matrix_tile",
    "place_tile",
    "programs_for",
    "store_bits",
    "store_tile",
    "threads_for",
    "tile_shape",
    "width_for",
]

TILE = 2048
MASK_BYTES = TILE // 8
_MASK_BYTES = tl.constexpr(MASK_BYTES)


def threads_for(dtype: torch.dtype) -> int:
    """Threads of a program: a thread of 16 float64 elements would run out of registers."""
    return 256 if dtype.itemsize == 8 else 128


def tile_shape(dtype: torch.dtype) -> tuple[int, int]:
    """(rows, columns) of a tile: 16-byte accesses per thread, and the elements that all threads access at once."""
    columns = threads_for(dtype) * 16 // dtype.itemsize
    return TILE // columns, columns


def cdiv(extent: int, step: int) -> int:
    """Steps that cover ``extent``, rounded up.  Both may be symbolic.  (Triton's own is slow outside kernels.)"""
    return (extent + step - 1) // step


def programs_for(numel: int) -> int:
    """Tiles that cover ``numel`` elements.  ``numel`` may be symbolic."""
    return cdiv(numel, TILE)


def mask_bytes(numel: int) -> int:
    """Bytes of the packed mask of ``numel`` elements, whole tiles.  ``numel`` may be symbolic."""
    return programs_for(numel) * MASK_BYTES


@triton.jit
def flat_tile(numel, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """This program's tile: its index, start, offsets from there (ROWS, COLUMNS), which are inside, and whether all."""
    tile_index = tl.program_id(0).to(tl.int64)
    start, offsets, inside, whole = place_tile(tile_index, numel, ROWS, COLUMNS)
    return tile_index, start, offsets, inside, whole


@triton.jit
def place_tile(tile_index, numel, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Tile ``tile_index``: its start, offsets from there (ROWS, COLUMNS), which are inside, and whether all."""
    start = tile_index * ROWS * COLUMNS
    offsets = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return start, offsets, offsets < numel - start, start + ROWS * COLUMNS <= numel


def width_for(columns: int, widths: Sequence[int]) -> int:
    """Width of a matrix's tiles: the widest of the ascending ``widths`` that wastes at most a quarter of its lanes."""
    full = [width for width in widths if -columns % width * 3 <= columns]
    return max(full, default=widths[0])


@triton.jit
def matrix_tile(block_row, block_column, rows, columns, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """A tile (HEIGHT, WIDTH) of a matrix: its start, offsets from there, which are inside, and whether all are."""
    row = block_row * HEIGHT
    column = block_column * WIDTH
    start = row * columns + column
    offsets = tl.arange(0, HEIGHT)[:, None] * columns + tl.arange(0, WIDTH)[None, :]
    inside = (tl.arange(0, HEIGHT)[:, None] < rows - row) & (tl.arange(0, WIDTH)[None, :] < columns - column)
    return start, offsets, inside, (row + HEIGHT <= rows) & (column + WIDTH <= columns)


@triton.jit
def load_tile(pointer, offsets, inside, whole):
    """Load a tile; where it isn't ``whole``, only the elements that are ``inside``, and 0 for the rest."""
    if whole:
        tile = tl.load(pointer + offsets)
    else:
        tile = tl.load(pointer + offsets, mask=inside, other=0)
    return tile


@triton.jit
def store_tile(pointer, offsets, tile, inside, whole):
    """Store a tile; where it isn't ``whole``, only the elements that are ``inside``."""
    if whole:
        tl.store(pointer + offsets, tile)
    else:
        tl.store(pointer + offsets, tile, mask=inside)


@triton.jit
def bit_positions(ROWS: tl.constexpr):
    """Position of an element's bit in its byte, (ROWS, 1, 8 / ROWS)."""
    return tl.arange(0, ROWS)[:, None, None] * (8 // ROWS) + tl.arange(0, 8 // ROWS)[None, None, :]


@triton.jit
def store_bits(pointer, keep, tile_index, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Pack the booleans (ROWS, COLUMNS) of tile ``tile_index``, and store them."""
    bits = tl.reshape(keep.to(tl.int32), (ROWS, _MASK_BYTES, 8 // ROWS)) << bit_positions(ROWS)
    packed = tl.sum(tl.sum(bits, axis=2), axis=0).to(tl.uint8)
    tl.store(pointer + tile_index * _MASK_BYTES + tl.arange(0, _MASK_BYTES), packed)


@triton.jit
def load_bits(pointer, tile_index, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The booleans (ROWS, COLUMNS) that `store_bits` stored."""
    packed = tl.load(pointer + tile_index * _MASK_BYTES + tl.arange(0, _MASK_BYTES))
    bits = (packed.to(tl.int32)[None, :, None] >> bit_positions(ROWS)) & 1
    return tl.reshape(bits, (ROWS, COLUMNS)) != 0
