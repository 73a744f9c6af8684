"""Flat tiles: how an elementwise kernel walks over memory, and how it packs booleans into bits.

A program owns ``TILE`` consecutive elements, arranged as (rows, columns) such that a row is one 16-byte access by each
thread: a thread issues all its 128-bit loads, two or four, before it needs the first.  A tile that lies inside the
tensor takes an unmasked branch: a mask is only as aligned as the tensor's length, and would otherwise split every
access into scalars.

Bits: a byte of a mask holds every row of 8 / rows neighbouring columns, which belong to one thread.  Packing and
unpacking are then shifts in registers: no shuffles, no shared memory.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._triton import tl, triton
from .launch import COMPUTE, TRITON_TYPE, Configuration, configure, launch
from .numerics import narrow, widen

__all__ = [
    "MASK_BYTES",
    "TILE",
    "Tile",
    "aligned",
    "cdiv",
    "configure_flat",
    "flat_tile",
    "known",
    "launch_flat",
    "load",
    "load_bits",
    "mask_bytes",
    "matrix_tile",
    "place_tile",
    "programs_for",
    "steps_for",
    "store",
    "store_bits",
    "threads_for",
    "tile_shape",
    "width_for",
]

TILE = 2048
MASK_BYTES = TILE // 8


def threads_for(dtype: torch.dtype) -> int:
    """Threads of a program: a thread of 16 float64 elements would run out of registers."""
    return 256 if dtype.itemsize == 8 else 128


def tile_shape(dtype: torch.dtype) -> tuple[int, int]:
    """(rows, columns) of a tile: 16-byte accesses per thread, and the elements that all threads access at once."""
    columns = threads_for(dtype) * 16 // dtype.itemsize
    return TILE // columns, columns


def configure_flat(
    kernel: Any,
    label: str,
    dtype: torch.dtype,
    constants: Mapping[str, Any],
    *,
    loads: int,
    stores: int,
    pointers: Mapping[str, torch.dtype] | None = None,
    **promises: Any,
) -> Configuration:
    """`configure` for a kernel of a flat tile, of which so many tensors are loaded and stored, in 16-byte accesses."""
    rows, columns = tile_shape(dtype)
    return configure(
        kernel,
        f"{label} {TRITON_TYPE[dtype]}",
        dtype,
        {**constants, "COMPUTE": COMPUTE[dtype], "ROWS": rows, "COLUMNS": columns},
        pointers=pointers,
        threads=threads_for(dtype),
        wide_loads=loads * rows,
        wide_stores=stores * rows,
        **promises,
    )


def launch_flat(configuration: Configuration, tensors: tuple[Tensor, ...], *scalars: float) -> None:
    """Run a kernel of flat ``tensors``, of which the first has the elements that are walked over."""
    numel = tensors[0].numel()
    launch(configuration, programs_for(numel), *tensors, numel, *scalars)


def cdiv(extent: int, step: int) -> int:
    """Steps that cover ``extent``, rounded up.  Both may be symbolic.  (Triton's own is slow outside kernels.)"""
    return (extent + step - 1) // step


def programs_for(numel: int) -> int:
    """Tiles that cover ``numel`` elements.  ``numel`` may be symbolic."""
    return cdiv(numel, TILE)


# Programs that fill a large GPU several times over: beyond, a program takes more steps instead.
_ENOUGH_PROGRAMS = 2048
_MOST_STEPS = 16


def steps_for(tiles: int) -> int:
    """Row blocks that a program works through, when ``tiles`` are to be shared out."""
    return min(max(tiles // _ENOUGH_PROGRAMS, 1), _MOST_STEPS)


def mask_bytes(numel: int) -> int:
    """Bytes of the packed mask of ``numel`` elements, whole tiles.  ``numel`` may be symbolic."""
    return programs_for(numel) * MASK_BYTES


class Tile(NamedTuple):
    """Elements that a program works on together, as device functions see them.

    ``offsets`` are counted from ``start``; ``inside`` tells which elements there are, and ``whole`` whether all are:
    then no mask is needed.
    """

    start: Any
    offsets: Any
    inside: Any
    whole: Any = False


@triton.jit
def aligned(extent, ALIGN: tl.constexpr):
    """The extent itself, which is a multiple of ALIGN: so the compiler knows it, too."""
    return extent // ALIGN * ALIGN


@triton.jit
def flat_tile(numel, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """This program's index, and the tile (ROWS, COLUMNS) that has it."""
    tile_index = tl.program_id(0).to(tl.int64)
    return tile_index, place_tile(tile_index, numel, ROWS, COLUMNS)


@triton.jit
def known(tile, WHOLE: tl.constexpr):
    """The tile, of which it is known whether it is whole.

    A kernel that has its body twice, once for either, decides once: where each access decides by itself, the masks are
    computed for whole tiles, too.
    """
    return Tile(tile.start, tile.offsets, tile.inside, WHOLE)


@triton.jit
def place_tile(tile_index, numel, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Tile ``tile_index``, (ROWS, COLUMNS)."""
    start = tile_index * ROWS * COLUMNS
    offsets = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = tl.minimum(numel - start, ROWS * COLUMNS).to(tl.int32)  # elements; comparisons of 64 bits take registers
    return Tile(start, offsets, offsets < inside, inside == ROWS * COLUMNS)


def width_for(columns: int, widths: Sequence[int]) -> int:
    """Width of a matrix's tiles: the widest of the ascending ``widths`` that wastes at most a quarter of its lanes."""
    full = [width for width in widths if -columns % width * 3 <= columns]
    return max(full, default=widths[0])


@triton.jit
def matrix_tile(block_row, block_column, rows, columns, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """A tile (HEIGHT, WIDTH) of a matrix."""
    row = block_row * HEIGHT
    column = block_column * WIDTH
    start = row * columns + column
    offsets = tl.arange(0, HEIGHT)[:, None] * columns + tl.arange(0, WIDTH)[None, :]
    inside = (tl.arange(0, HEIGHT)[:, None] < rows - row) & (tl.arange(0, WIDTH)[None, :] < columns - column)
    return Tile(start, offsets, inside, (row + HEIGHT <= rows) & (column + WIDTH <= columns))


@triton.jit
def load(pointer, tile, COMPUTE: tl.constexpr, outside=0):
    """The elements of a tile, in the type of the arithmetic; ``outside`` for those that aren't inside."""
    pointer += tile.start
    if tile.whole:
        x = tl.load(pointer + tile.offsets)
    else:
        x = tl.load(pointer + tile.offsets, mask=tile.inside, other=outside)
    return widen(x, COMPUTE)


@triton.jit
def store(pointer, tile, x):
    """Store the elements of a tile, rounded to the type of the memory; none outside."""
    pointer += tile.start
    x = narrow(x, pointer.dtype.element_ty)
    if tile.whole:
        tl.store(pointer + tile.offsets, x)
    else:
        tl.store(pointer + tile.offsets, x, mask=tile.inside)


@triton.jit
def bit_positions(ROWS: tl.constexpr):
    """Position of an element's bit in its byte, (ROWS, 1, 8 / ROWS)."""
    return tl.arange(0, ROWS)[:, None, None] * (8 // ROWS) + tl.arange(0, 8 // ROWS)[None, None, :]


@triton.jit
def store_bits(pointer, keep, tile_index, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Pack the booleans (ROWS, COLUMNS) of tile ``tile_index``, and store them."""
    size: tl.constexpr = ROWS * COLUMNS // 8
    bits = tl.reshape(keep.to(tl.int32), (ROWS, size, 8 // ROWS)) << bit_positions(ROWS)
    packed = tl.sum(tl.sum(bits, axis=2), axis=0).to(tl.uint8)
    tl.store(pointer + tile_index * size + tl.arange(0, size), packed)


@triton.jit
def load_bits(pointer, tile_index, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The booleans (ROWS, COLUMNS) that `store_bits` stored."""
    size: tl.constexpr = ROWS * COLUMNS // 8
    packed = tl.load(pointer + tile_index * size + tl.arange(0, size))
    bits = (packed.to(tl.int32)[None, :, None] >> bit_positions(ROWS)) & 1
    return tl.reshape(bits, (ROWS, COLUMNS)) != 0
