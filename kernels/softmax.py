"""Softmax, log-softmax and softmin along any dimension of a dense tensor.

softmax(x) = exp(x - max) / sum(exp(x - max)), log_softmax(x) = x - max - log(sum(exp(x - max))), softmin(x) =
softmax(-x).  A line that fits into the registers of a program is read once; a longer one twice, chunk by chunk, the
second time from the L2 cache; the longest are shared by several programs (`long_lines`).  The backward passes need the
output and its gradient: y (g - sum(g y)) and g - exp(y) sum(g).
"""

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .base._triton import tl, triton
from .base.launch import COMPUTE, DTYPES, TRITON_TYPE, Configuration, configure, kernel, launch, ships
from .base.layout import dense, dense_like
from .base.lines import (
    ACROSS,
    ALONG,
    Lines,
    LineTiling,
    contiguous_extent,
    line_block,
    line_tile,
    line_tiling,
    lines_of,
    online_softmax_init,
    online_softmax_reduce,
    online_softmax_update,
    packed_tile,
)
from .base.long_lines import (
    CHUNK,
    LONG_DTYPES,
    SPLITS,
    are_shared,
    chunk_of_line,
    join_splits,
    load_signed,
    long_line_tile,
    split_of_line,
    split_statistics,
    splits_configuration,
    splits_of,
)
from .base.numerics import fast_exp, log, negative
from .base.tiles import Tile, cdiv, load, store, threads_for

__all__ = ["KINDS", "softmax_backward", "softmax_forward"]

#: (takes the logarithm, negates its input)
KINDS = {"softmax": (False, False), "log_softmax": (True, False), "softmin": (False, True)}


_ALONG = tl.constexpr(ALONG)


@kernel
def softmax_forward_kernel(
    x_pointer,  # input
    y_pointer,  # output, in the memory order of the input
    count: tl.int64,
    dim_size,
    inner_size,
    negated: tl.int32,
    LOGARITHM: tl.constexpr,
    AXIS: tl.constexpr,
    COMPUTE: tl.constexpr,
    LINES: tl.constexpr,
    WIDTH: tl.constexpr,
    VECTOR: tl.constexpr,  # elements of a thread's access
    THREADS: tl.constexpr,
    WHOLE: tl.constexpr,  # WIDTH holds a line
    ALIGN: tl.constexpr,
):
    packed: tl.constexpr = ALIGN if ALIGN < VECTOR else VECTOR
    pairs: tl.constexpr = WIDTH // packed if WIDTH // packed < THREADS else THREADS
    block = tl.program_id(0).to(tl.int64)
    lines = line_block(block, count, dim_size, inner_size, AXIS, LINES, ALIGN)
    if WHOLE:
        tile, _place = line_tile(lines, 0, AXIS, WIDTH)
        x = load_signed(x_pointer, tile, negated, COMPUTE)
        shifted = x - tl.expand_dims(tl.max(x, AXIS), AXIS)
        total = tl.expand_dims(tl.sum(fast_exp(shifted), AXIS), AXIS)
        y = normalised(shifted, total, LOGARITHM)
        store(y_pointer, tile, y)
    else:
        maximum, total = online_softmax_init(COMPUTE, AXIS, LINES, pairs)
        for first in range(0, dim_size, WIDTH):
            tile, _place = packed_tile(lines, first, AXIS, WIDTH, pairs, packed)
            x = load_signed(x_pointer, tile, negated, COMPUTE)
            maximum, total = online_softmax_update(maximum, total, x, AXIS)
        maximum, total = online_softmax_reduce(maximum, total, AXIS)
        maximum = tl.expand_dims(maximum, AXIS)
        total = tl.expand_dims(total, AXIS)
        for first in range(0, dim_size, WIDTH):
            tile, _place = line_tile(lines, first, AXIS, WIDTH)
            shifted = load_signed(x_pointer, tile, negated, COMPUTE) - maximum
            y = normalised(shifted, total, LOGARITHM)
            store(y_pointer, tile, y)


@triton.jit
def normalised(shifted, total, LOGARITHM: tl.constexpr):
    """The output, from x - maximum and the line's sum of exponentials."""
    if LOGARITHM:
        return shifted - log(total)
    return fast_exp(shifted) * (1 / total)


@kernel
def softmax_backward_kernel(
    g_pointer,  # gradient of the output
    y_pointer,  # output
    dx_pointer,  # gradient of the input
    count: tl.int64,
    dim_size,
    inner_size,
    logarithm: tl.int32,
    negated: tl.int32,
    AXIS: tl.constexpr,
    COMPUTE: tl.constexpr,
    LINES: tl.constexpr,
    WIDTH: tl.constexpr,
    WHOLE: tl.constexpr,
    ALIGN: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    lines = line_block(block, count, dim_size, inner_size, AXIS, LINES, ALIGN)
    if WHOLE:
        tile, _place = line_tile(lines, 0, AXIS, WIDTH)
        g = load(g_pointer, tile, COMPUTE)
        y = load(y_pointer, tile, COMPUTE)
        total = tl.expand_dims(tl.sum(summand(g, y, logarithm), AXIS), AXIS)
        dx = input_gradient(g, y, total, logarithm, negated)
        store(dx_pointer, tile, dx)
    else:
        if AXIS == _ALONG:
            summands = tl.zeros((LINES, WIDTH), COMPUTE)
        else:
            summands = tl.zeros((WIDTH, LINES), COMPUTE)
        for first in range(0, dim_size, WIDTH):
            tile, _place = line_tile(lines, first, AXIS, WIDTH)
            g = load(g_pointer, tile, COMPUTE)
            # A logarithm's summand is the gradient alone.
            needed = Tile(tile.start, tile.offsets, tile.inside & (logarithm == 0))
            y = load(y_pointer, needed, COMPUTE)
            summands += summand(g, y, logarithm)
        total = tl.expand_dims(tl.sum(summands, AXIS), AXIS)
        for first in range(0, dim_size, WIDTH):
            tile, _place = line_tile(lines, first, AXIS, WIDTH)
            g = load(g_pointer, tile, COMPUTE)
            y = load(y_pointer, tile, COMPUTE)
            dx = input_gradient(g, y, total, logarithm, negated)
            store(dx_pointer, tile, dx)


@triton.jit
def summand(g, y, logarithm):
    """What an element adds to its line's sum."""
    return tl.where(logarithm != 0, g, g * y)


@triton.jit
def input_gradient(g, y, total, logarithm, negated):
    if logarithm:
        dx = g - fast_exp(y) * total
    else:
        dx = y * (g - total)
    return tl.where(negated != 0, negative(dx), dx)


# --- Lines that several programs share ----------------------------------------------------------------------------


@kernel
def long_softmax_forward_kernel(
    x_pointer,
    partial_pointer,  # see `long_lines`
    y_pointer,
    count: tl.int64,
    dim_size,
    splits: tl.int32,
    chunks: tl.int32,  # of a line
    logarithm: tl.int32,
    negated: tl.int32,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
    ALIGN: tl.constexpr,
):
    line, tile = chunk_of_line(count, dim_size, chunks, WIDTH, ALIGN)
    maxima, totals = join_splits(partial_pointer, line.line, line.exists, count, splits, SPLITS)
    maximum, total = tl.max(maxima, 0), tl.sum(totals, 0)  # of the one line
    shifted = load_signed(x_pointer, tile, negated, tl.float32) - maximum
    if logarithm:
        y = normalised(shifted, total, True)
    else:
        y = normalised(shifted, total, False)
    store(y_pointer, tile, y)


@kernel
def long_softmax_sums_kernel(
    g_pointer,
    y_pointer,
    partial_pointer,  # sums of the splits' summands, (splits, count)
    count: tl.int64,
    dim_size,
    splits: tl.int32,
    split_size: tl.int32,
    logarithm: tl.int32,
    WIDTH: tl.constexpr,
    ALIGN: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    line, split, begin, end = split_of_line(program, count, dim_size, splits, split_size, ALIGN)
    summands = tl.zeros((1, WIDTH), tl.float32)
    for first in range(begin, end, WIDTH):
        tile = long_line_tile(line, first, WIDTH)
        needed = Tile(tile.start, tile.offsets, tile.inside & (logarithm == 0))
        g = load(g_pointer, tile, tl.float32)
        y = load(y_pointer, needed, tl.float32)
        summands += summand(g, y, logarithm)
    tl.store(partial_pointer + split * count + line.line, tl.sum(summands, 1))


@kernel
def long_softmax_backward_kernel(
    g_pointer,
    y_pointer,
    partial_pointer,
    dx_pointer,
    count: tl.int64,
    dim_size,
    splits: tl.int32,
    chunks: tl.int32,
    logarithm: tl.int32,
    negated: tl.int32,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
    ALIGN: tl.constexpr,
):
    line = tl.program_id(0).to(tl.int64) // chunks
    split = tl.arange(0, SPLITS)
    total = tl.sum(tl.load(partial_pointer + split * count + line, mask=split < splits, other=0), 0)
    _line, tile = chunk_of_line(count, dim_size, chunks, WIDTH, ALIGN)
    g = load(g_pointer, tile, tl.float32)
    y = load(y_pointer, tile, tl.float32)
    dx = input_gradient(g, y, total, logarithm, negated)
    store(dx_pointer, tile, dx)


# --- Configurations and launchers -----------------------------------------------------------------------------------

# Elements of a line that a program holds: the narrowest that holds them all is taken, or else `_CHUNK` of it at a time.
_WIDTHS = {
    "forward": {ALONG: (16, 128, 1024, 4096, 16384, 32768), ACROSS: (32, 256)},
    "backward": {ALONG: (16, 128, 1024, 4096, 16384), ACROSS: (32, 256)},
}
_CHUNK = {ALONG: 4096, ACROSS: 64}
# float64 takes twice the registers, and isn't what networks train in: it gets fewer kernels.
_WIDTHS_FLOAT64 = {ALONG: (64, 1024), ACROSS: (32,)}
_LINES_ACROSS = 32  # neighbouring lines of a program, at least: 64 bytes or more of each chunk


def _widths(direction: str, dtype: torch.dtype, axis: int) -> tuple[int, ...]:
    return _WIDTHS_FLOAT64[axis] if dtype is torch.float64 else _WIDTHS[direction][axis]


def _tiling(axis: int, width: int | None) -> LineTiling:
    return line_tiling(axis, width or _CHUNK[axis], _LINES_ACROSS)


def _threads(dtype: torch.dtype, tiling: LineTiling) -> int:
    # 1024 threads have 64 registers each: the widest tile's 32 elements and what finds odd lines' don't fit into them.
    return min(max(tiling.lines * tiling.width // 16, threads_for(dtype)), 1024 if tiling.width < 32768 else 512)


@cache
def _forward(dtype: torch.dtype, axis: int, width: int | None, logarithm: bool) -> Configuration:
    """For lines of up to ``width`` elements; without, for longer ones, in chunks."""
    # One kernel for both would hold what either needs: too much for the registers, in the widest tile.
    threads = _threads(dtype, _tiling(axis, width))
    constants = {"LOGARITHM": logarithm, "VECTOR": 16 // dtype.itemsize, "THREADS": threads}
    name = "log_softmax" if logarithm else "softmax"
    return _configuration(softmax_forward_kernel, f"{name} forward", 1, constants, dtype, axis, width)


@cache
def _backward(dtype: torch.dtype, axis: int, width: int | None) -> Configuration:
    return _configuration(softmax_backward_kernel, "softmax backward", 2, {}, dtype, axis, width)


def _configuration(
    kernel: Any,
    label: str,
    reads: int,
    constants: dict[str, Any],
    dtype: torch.dtype,
    axis: int,
    width: int | None,
) -> Configuration:
    tiling = _tiling(axis, width)
    threads = _threads(dtype, tiling)
    wide = tiling.lines * tiling.width * dtype.itemsize // (threads * 16)
    return configure(
        kernel,
        f"{label} {'along' if axis == ALONG else 'across'} x{width or '-chunks'} {TRITON_TYPE[dtype]}",
        dtype,
        {
            **constants,
            **tiling.constants,
            "COMPUTE": COMPUTE[dtype],
            "WHOLE": width is not None,
        },
        aligned=(contiguous_extent(axis),),
        threads=threads,
        wide_loads=reads * wide,
        wide_stores=wide,
        rare=dtype not in (torch.bfloat16, torch.float32),
    )


@cache
def _long(kind: str, dtype: torch.dtype) -> Configuration:
    code = {
        "forward": long_softmax_forward_kernel,
        "sums": long_softmax_sums_kernel,
        "backward": long_softmax_backward_kernel,
    }[kind]
    joins = kind != "sums"
    threads = max(CHUNK // 16, threads_for(dtype))
    wide = CHUNK * dtype.itemsize // (threads * 16)
    return configure(
        code,
        f"long softmax {kind} {TRITON_TYPE[dtype]}",
        dtype,
        {"WIDTH": CHUNK, **({"SPLITS": SPLITS} if joins else {})},
        pointers={"partial": torch.float32},
        aligned=("dim_size",),
        threads=threads,
        wide_loads=wide * (1 if kind == "forward" else 2),
        wide_stores=wide if joins else 0,
        rare=dtype not in (torch.bfloat16, torch.float32),
    )


@ships("softmax")
def configurations() -> Iterator[Configuration]:
    for dtype in DTYPES:
        for axis in (ALONG, ACROSS):
            for width in (*_widths("forward", dtype, axis), None):
                yield _forward(dtype, axis, width, False)
                yield _forward(dtype, axis, width, True)
            for width in (*_widths("backward", dtype, axis), None):
                yield _backward(dtype, axis, width)
    for dtype in LONG_DTYPES:
        yield splits_configuration(dtype)
        for kind in ("forward", "sums", "backward"):
            yield _long(kind, dtype)


def _width_for(direction: str, dtype: torch.dtype, lines: Lines) -> int | None:
    """The narrowest tile that holds a line, or None."""
    return next((width for width in _widths(direction, dtype, lines.axis) if lines.dim_size <= width), None)


def softmax_forward(x: Tensor, dim: int, kind: str) -> Tensor:
    """A row of `KINDS`, along ``dim``, in the memory order of ``x``."""
    x = dense(x)
    y = torch.empty_like(x)
    lines = lines_of(x, dim)
    logarithm, negated = KINDS[kind]
    if are_shared(lines, x.dtype):
        splits, chunks = splits_of(lines), cdiv(lines.dim_size, CHUNK)
        partial = split_statistics(x, lines, splits, negated=negated)
        extents = (lines.count, lines.dim_size, splits.number, chunks)
        launch(_long("forward", x.dtype), lines.count * chunks, x, partial, y, *extents, int(logarithm), int(negated))
        return y
    width = _width_for("forward", x.dtype, lines)
    configuration = _forward(x.dtype, lines.axis, width, logarithm)
    programs = lines.blocks(_tiling(lines.axis, width).lines)
    launch(configuration, programs, x, y, *lines.extents, int(negated))
    return y


def softmax_backward(g: Tensor, y: Tensor, dim: int, kind: str) -> Tensor:
    """Gradient of the input from that of the output, and the output."""
    y = dense(y)
    g = dense_like(g, y.stride())
    dx = torch.empty_like(y)
    lines = lines_of(y, dim)
    logarithm, negated = KINDS[kind]
    if are_shared(lines, y.dtype):
        splits, chunks = splits_of(lines), cdiv(lines.dim_size, CHUNK)
        partial = torch.empty((splits.number, lines.count), dtype=torch.float32, device=y.device)
        extents = (lines.count, lines.dim_size, splits.number)
        summands = (*extents, splits.size, int(logarithm))
        launch(_long("sums", y.dtype), lines.count * splits.number, g, y, partial, *summands)
        options = (*extents, chunks, int(logarithm), int(negated))
        launch(_long("backward", y.dtype), lines.count * chunks, g, y, partial, dx, *options)
        return dx
    width = _width_for("backward", y.dtype, lines)
    configuration = _backward(y.dtype, lines.axis, width)
    programs = lines.blocks(_tiling(lines.axis, width).lines)
    launch(configuration, programs, g, y, dx, *lines.extents, int(logarithm), int(negated))
    return dx
