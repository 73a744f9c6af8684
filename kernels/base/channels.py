"""Tensors of channels as matrices, and their division into programs.

A dense tensor is (outer, channels, inner), whatever the order of its dimensions, and its memory is a matrix:

=====================  ========================  =============  ======================
layout                 rows x columns            a channel is   reduced axis of a tile
=====================  ========================  =============  ======================
(N, C, spatial)        (outer channels) x inner  a run of rows  1
channels last, (N, C)  outer x channels          a column       0
=====================  ========================  =============  ======================

**One geometry for all passes.**  The tiles that cover a block of channels form parallel tracks, and a program walks a
chunk of one track, a tile a step.  A track is a column of tiles, or runs along ``inner`` where that is longer::

    rows are (outer, channels), columns inner;      ``along_inner``: a block of channels of one outer index,
    a block of channels, with two tiles of inner:   tile after tile of inner

        track 0   track 1
        [tile]    [tile]   outer = 0                track 0  [tile] [tile] [tile] [tile]  outer = 0
        [tile]    [tile]   outer = 1                track 1  [tile] [tile] [tile] [tile]  outer = 1
        [tile]    [tile]   outer = 2

Reductions walk forward and leave a partial result for each program; the pass that follows has the same programs, and
walks backward: what it reads first was read last, and is still in the L2 cache.  Each of its programs first puts
together, in one order, what all programs left of its channels: there are never more of them than the reduced axis of a
tile has lanes, so that this is one more tile to read.

Passes that read once, and need no tracks, are in ``matrix.py``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from ._triton import tl, triton
from .launch import COMPUTE, TRITON_TYPE, Configuration, configure, launch
from .tiles import TILE, Tile, cdiv, threads_for, tile_shape

__all__ = [
    "Plan",
    "Tiling",
    "channel_tile",
    "common_tilings_of",
    "configure_channels",
    "lanes",
    "lanes_inside",
    "launch_over",
    "plan_of",
    "program_place",
    "tile_place",
    "tiling_for",
    "tilings_of",
]

# --- Device functions -------------------------------------------------------------------------------------------------


@triton.jit
def program_place(channel_blocks, tracks, tiles_per_track, tiles_per_program):
    """This program's block of channels and track, its steps (the first, and the one after the last), and its split."""
    program = tl.program_id(0).to(tl.int64)
    track = program % tracks
    channel_block = program // tracks % channel_blocks
    chunk = program // tracks // channel_blocks
    first = chunk * tiles_per_program
    return channel_block, track, first, tl.minimum(first + tiles_per_program, tiles_per_track), chunk * tracks + track


@triton.jit
def tile_place(
    step,
    channel_block,
    track,
    outer,
    channels,
    columns,
    along_inner,
    TILING: tl.constexpr,
):
    """A tile, and which positions of the reduced axis are inside."""
    row = tl.arange(0, TILING.height)[:, None]
    column = tl.arange(0, TILING.width)[None, :]
    if TILING.axis == 1:
        outer_index = tl.where(along_inner != 0, track, step)
        inner_block = tl.where(along_inner != 0, step, track)
        start = (outer_index * channels + channel_block * TILING.height) * columns + inner_block * TILING.width
        row_inside = row < channels - channel_block * TILING.height
        column_inside = column < columns - inner_block * TILING.width
        present = column_inside
    else:
        start = step * TILING.height * columns + channel_block * TILING.width
        row_inside = row < outer - step * TILING.height
        column_inside = column < columns - channel_block * TILING.width
        present = row_inside
    return Tile(start, row * columns + column, row_inside & column_inside), present


@triton.jit
def channel_tile(channel_block, TILING: tl.constexpr):
    """The channels of a tile, broadcastable to it."""
    if TILING.axis == 1:
        return channel_block * TILING.height + tl.arange(0, TILING.height)[:, None]
    else:
        return channel_block * TILING.width + tl.arange(0, TILING.width)[None, :]


@triton.jit
def lanes(TILING: tl.constexpr):
    """The positions along the reduced axis, broadcastable to it."""
    if TILING.axis == 1:
        return tl.arange(0, TILING.width)[None, :]
    else:
        return tl.arange(0, TILING.height)[:, None]


@triton.jit
def lanes_inside(step, track, outer, columns, along_inner, TILING: tl.constexpr):
    """How many positions of a tile's reduced axis are inside."""
    if TILING.axis == 1:
        return tl.minimum(columns - tl.where(along_inner != 0, step, track) * TILING.width, TILING.width)
    else:
        return tl.minimum(outer - step * TILING.height, TILING.height)


# --- Tiles ------------------------------------------------------------------------------------------------------------

# Widths of a tile by its reduced axis.  The widest is taken that needs at most a third more lanes than the best.
_WIDTHS = {0: (16, 64), 1: (16, 64, 256, TILE)}

# Programs that a pass is split into, where it has work for as many.  Constants, so that results don't depend on the
# GPU: one, or four, on each of an H100's multiprocessors, with up to 128 registers a thread.  Channels that are columns
# take programs of four times the threads, so that fewer leave something of each channel to put together again.
_PROGRAMS = {0: 128, 1: 512}


@dataclass(frozen=True)
class TileShape:
    """The shape of a tile, and which of its axes is reduced, as one ``tl.constexpr``."""

    axis: int
    height: int
    width: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.height, self.width


@dataclass(frozen=True)
class Tiling:
    """The shape of a tile, and which of its axes is reduced.

    Odd numbers of columns take tiles of half the height: there each element of a thread has an address of its own.
    Where arithmetic takes more registers, kernels take a tile in two ``halves``, one after the other.
    """

    axis: int
    height: int
    width: int
    odd: bool = False
    halves: int = 1

    @property
    def lanes(self) -> int:
        """Positions along the reduced axis: the most programs that leave something of a channel."""
        return self.width if self.axis == 1 else self.height

    def threads(self, dtype: torch.dtype) -> int:
        return threads_for(dtype) if self.axis == 1 or dtype is torch.float64 else 512

    @property
    def whole(self) -> TileShape:
        """A tile as the plan has it."""
        return TileShape(self.axis, self.height, self.width)

    @property
    def halved(self) -> "Tiling":
        return self if self.axis == 1 or self.odd else replace(self, halves=2)

    def __str__(self) -> str:
        halves = " in halves" if self.halves == 2 else ""
        return f"{'odd ' * self.odd}{'rows' if self.axis == 1 else 'columns'} x{self.width}{halves}"


@cache
def tilings_of(dtype: torch.dtype) -> tuple[Tiling, ...]:
    """Of the widest rows, float64 statistics don't fit into registers; nor does an exponential of large tiles."""
    double = dtype is torch.float64
    columns = TILE * (1 if double else 4)
    return (
        *(Tiling(0, columns // 2 // width, width, odd=True) for width in _WIDTHS[0]),
        *(Tiling(0, columns // width, width) for width in _WIDTHS[0]),
        *(Tiling(1, TILE // width, width) for width in _WIDTHS[1] if not (double and width == TILE)),
    )


def common_tilings_of(dtype: torch.dtype) -> tuple[Tiling, Tiling]:
    """Tiles that most variants are compiled with, one of each axis.

    What varies knows nothing of the tile around it, and the tiles' own code is compiled, for every type, without an
    activation.
    """
    even = [tiling for tiling in tilings_of(dtype) if not tiling.odd]
    return even[1], even[4]


def configure_channels(
    kernel: Any,
    label: str,
    dtype: torch.dtype,
    tiling: Tiling,
    constants: Mapping[str, Any],
    *,
    pointers: Mapping[str, torch.dtype],
    wide_loads: int,
    wide_stores: int,
) -> Configuration:
    """`configure` for a kernel that walks tiles of ``tiling``: with their constants, and accesses by each of rows."""
    # Narrower rows are narrower than a warp's accesses, and odd ones aren't aligned.
    rows = tile_shape(dtype)[0] // tiling.halves if tiling.width >= 64 and not tiling.odd else 0
    return configure(
        kernel,
        f"{label} {tiling} {TRITON_TYPE[dtype]}",
        dtype,
        {
            "TILING": TileShape(tiling.axis, tiling.height // tiling.halves, tiling.width),
            "COMPUTE": COMPUTE[dtype],
            "STAGES": 1 if tiling.odd else 3 if dtype.itemsize == 2 else 2,
            **({"ALIGN": 1} if tiling.odd else {}),
            **constants,
        },
        pointers=pointers,
        aligned=("columns",),
        least_aligned=1 if tiling.axis == 1 else 2,
        threads=tiling.threads(dtype),
        wide_loads=wide_loads * rows,
        wide_stores=wide_stores * rows,
    )


# --- Programs ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """A dense tensor seen as (outer, channels, inner), and its division into programs."""

    tiling: Tiling
    outer: int
    channels: int
    columns: int
    channel_blocks: int
    tracks: int
    tiles_per_track: int
    tiles_per_program: int
    along_inner: bool

    @cached_property
    def splits(self) -> int:
        return self.tracks * cdiv(self.tiles_per_track, self.tiles_per_program)

    @cached_property
    def programs(self) -> int:
        return self.splits * self.channel_blocks

    @cached_property
    def extents(self) -> tuple[int, ...]:
        return (
            self.outer,
            self.channels,
            self.columns,
            self.channel_blocks,
            self.tracks,
            self.tiles_per_track * self.tiling.halves,
            self.tiles_per_program * self.tiling.halves,
            int(self.along_inner),
        )

    @cached_property
    def halved(self) -> "Plan":
        """The same programs, which take their tiles in two halves."""
        return replace(self, tiling=self.tiling.halved)


def tiling_for(dtype: torch.dtype, axis: int, columns: int, rows: int) -> Tiling:
    """Tiles for a matrix of ``columns``, of which ``rows`` rows may share a tile."""
    odd = axis == 0 and columns % 2 == 1
    tilings = [tiling for tiling in tilings_of(dtype) if (tiling.axis, tiling.odd) == (axis, odd)]
    lanes = [
        cdiv(columns, tiling.width) * tiling.width * cdiv(rows, tiling.height) * tiling.height for tiling in tilings
    ]
    fewest = min(lanes)
    return next(
        tiling for tiling, count in zip(reversed(tilings), reversed(lanes), strict=True) if 3 * count <= 4 * fewest
    )


def plan_of(x: Tensor, places: int | None = None) -> Plan:
    """The division of the dense ``x`` into programs: a function of its shape and strides.

    With the number of ``places`` of a sample's channel, samples stay apart where there is but one channel.
    """
    channels = x.shape[1]
    # Dense memory: the dimensions inside a channel span its stride, whatever their order.
    inner = (places or x.numel()) if channels == 1 else x.stride(1)
    outer = x.numel() // (channels * inner)
    # In a traced function sizes may be symbolic, and can't be a key.
    plan = _plan if type(outer) is int else _plan.__wrapped__
    return plan(x.dtype, outer, channels, inner)


@lru_cache(maxsize=4096)
def _plan(dtype: torch.dtype, outer: int, channels: int, inner: int) -> Plan:
    axis, columns = (0, channels) if inner == 1 else (1, inner)
    tiling = tiling_for(dtype, axis, columns, channels if axis == 1 else outer)
    width = tiling.width
    if axis == 0:
        channel_blocks, tracks, tiles_per_track = cdiv(columns, width), 1, cdiv(outer, tiling.height)
    else:
        channel_blocks = cdiv(channels, tiling.height)
        tracks, tiles_per_track = sorted((outer, cdiv(columns, width)))
    chunks = max(1, min(_PROGRAMS[axis] // (channel_blocks * tracks), tiling.lanes // tracks))
    tiles_per_program = cdiv(tiles_per_track, chunks)
    along_inner = axis == 1 and tiles_per_track != outer
    return Plan(
        tiling, outer, channels, columns, channel_blocks, tracks, tiles_per_track, tiles_per_program, along_inner
    )


def launch_over(configuration: Configuration, plan: Plan, pointers: tuple[Tensor | None, ...], *scalars: float) -> None:
    """Run a kernel of ``plan``'s programs, with those of its ``pointers`` that aren't None."""
    given = (pointer for pointer in pointers if pointer is not None)
    launch(configuration, plan.programs, *given, *plan.extents, *scalars)
