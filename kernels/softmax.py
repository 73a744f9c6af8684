"""Softmax, log-softmax and softmin along any dimension of a dense tensor.

softmax(x) = exp(x - max) / sum(exp(x - max)), log_softmax(x) = x - max - log(sum(exp(x - max))), softmin(x) =
softmax(-x).  A line that fits into the registers of a program is read once; a longer one twice, piece by piece, the
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
    line_block,
    line_tile,
    lines_of,
    online_softmax_init,
    online_softmax_reduce,
    online_softmax_update,
    pack,
)
from .base.long_lines import (
    LONG_DTYPES,
    PARTS,
    PIECE,
    are_shared,
    join_parts,
    line_parts,
    part_of_line,
    parts_configuration,
    parts_of,
)
from .base.numerics import fast_exp, log, narrow, widen
from .base.tiles import cdiv, threads_for

__all__ = ["KINDS", "softmax_backward", "softmax_forward"]

#: (takes the logarithm, negates its input)
KINDS = {"softmax": (False, False), "log_softmax": (True, False), "softmin": (False, True)}


@kernel
def softmax_forward_kernel(
    x_pointer,  # input
    y_pointer,  # output, in the memory order of the input
    count: tl.int64,
    length,
    inner,
    negated: tl.int32,
    LOGARITHM: tl.constexpr,
    AXIS: tl.constexpr,
    COMPUTE: tl.constexpr,
    LINES: tl.constexpr,
    WIDTH: tl.constexpr,
    PACK: tl.constexpr,
    WHOLE: tl.constexpr,  # WIDTH holds a line
):
    block = tl.program_id(0).to(tl.int64)
    base, _line, start, exists = line_block(block, count, length, inner, AXIS, LINES)
    x_pointer += base
    y_pointer += base
    if WHOLE:
        _place, offsets, inside = line_tile(start, exists, 0, length, inner, AXIS, WIDTH)
        x = load_signed(x_pointer, offsets, inside, negated, COMPUTE)
        shifted = x - tl.expand_dims(tl.max(x, AXIS), AXIS)
        total = tl.expand_dims(tl.sum(fast_exp(shifted), AXIS), AXIS)
        y = normalised(shifted, total, LOGARITHM)
        tl.store(y_pointer + offsets, narrow(y, y_pointer.dtype.element_ty), mask=inside)
    else:
        maximum, total = online_softmax_init(COMPUTE, AXIS, LINES, WIDTH, PACK)
        for first in range(0, length, WIDTH):
            _place, offsets, inside = line_tile(start, exists, first, length, inner, AXIS, WIDTH)
            x = load_signed(x_pointer, offsets, inside, negated, COMPUTE)
            maximum, total = online_softmax_update(maximum, total, pack(x, AXIS, LINES, WIDTH, PACK), AXIS)
        maximum, total = online_softmax_reduce(maximum, total, AXIS)
        maximum = tl.expand_dims(maximum, AXIS)
        total = tl.expand_dims(total, AXIS)
        for first in range(0, length, WIDTH):
            _place, offsets, inside = line_tile(start, exists, first, length, inner, AXIS, WIDTH)
            shifted = load_signed(x_pointer, offsets, inside, negated, COMPUTE) - maximum
            y = normalised(shifted, total, LOGARITHM)
            tl.store(y_pointer + offsets, narrow(y, y_pointer.dtype.element_ty), mask=inside)


@triton.jit
def normalised(shifted, total, LOGARITHM: tl.constexpr):
    """The output, from x - maximum and the line's sum of exponentials."""
    if LOGARITHM:
        return shifted - log(total)
    return fast_exp(shifted) * (1 / total)


@triton.jit
def load_signed(x_pointer, offsets, inside, negated, COMPUTE: tl.constexpr):
    """The input, or its negative; -inf outside."""
    outside = tl.where(negated != 0, float("inf"), float("-inf"))
    x = widen(tl.load(x_pointer + offsets, mask=inside, other=outside), COMPUTE)
    return tl.where(negated != 0, -x, x)


@kernel
def softmax_backward_kernel(
    g_pointer,  # gradient of the output
    y_pointer,  # output
    dx_pointer,  # gradient of the input
    count: tl.int64,
    length,
    inner,
    logarithm: tl.int32,
    negated: tl.int32,
    AXIS: tl.constexpr,
    COMPUTE: tl.constexpr,
    LINES: tl.constexpr,
    WIDTH: tl.constexpr,
    WHOLE: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    base, _line, start, exists = line_block(block, count, length, inner, AXIS, LINES)
    g_pointer += base
    y_pointer += base
    dx_pointer += base
    if WHOLE:
        _place, offsets, inside = line_tile(start, exists, 0, length, inner, AXIS, WIDTH)
        g = widen(tl.load(g_pointer + offsets, mask=inside, other=0), COMPUTE)
        y = widen(tl.load(y_pointer + offsets, mask=inside, other=0), COMPUTE)
        total = tl.expand_dims(tl.sum(summand(g, y, logarithm), AXIS), AXIS)
        dx = input_gradient(g, y, total, logarithm, negated)
        tl.store(dx_pointer + offsets, narrow(dx, dx_pointer.dtype.element_ty), mask=inside)
    else:
        if AXIS == 1:
            shares = tl.zeros((LINES, WIDTH), COMPUTE)
        else:
            shares = tl.zeros((WIDTH, LINES), COMPUTE)
        for first in range(0, length, WIDTH):
            _place, offsets, inside = line_tile(start, exists, first, length, inner, AXIS, WIDTH)
            g = widen(tl.load(g_pointer + offsets, mask=inside, other=0), COMPUTE)
            # The logarithm's share is the gradient alone.
            y = widen(tl.load(y_pointer + offsets, mask=inside & (logarithm == 0), other=0), COMPUTE)
            shares += summand(g, y, logarithm)
        total = tl.expand_dims(tl.sum(shares, AXIS), AXIS)
        for first in range(0, length, WIDTH):
            _place, offsets, inside = line_tile(start, exists, first, length, inner, AXIS, WIDTH)
            g = widen(tl.load(g_pointer + offsets, mask=inside, other=0), COMPUTE)
            y = widen(tl.load(y_pointer + offsets, mask=inside, other=0), COMPUTE)
            dx = input_gradient(g, y, total, logarithm, negated)
            tl.store(dx_pointer + offsets, narrow(dx, dx_pointer.dtype.element_ty), mask=inside)


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
    return tl.where(negated != 0, -dx, dx)


# --- Lines that several programs share ----------------------------------------------------------------------------


@kernel
def long_softmax_forward_kernel(
    x_pointer,
    partial_pointer,  # see `long_lines`
    y_pointer,
    count: tl.int64,
    length,
    parts: tl.int32,
    pieces: tl.int32,  # of a line
    logarithm: tl.int32,
    negated: tl.int32,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    base, line, start, exists = line_block(program // pieces, count, length, 1, 1, 1)
    maxima, totals = join_parts(partial_pointer, line, exists, count, parts, PARTS)
    maximum, total = tl.max(maxima, 0), tl.sum(totals, 0)  # of the one line
    first = (program % pieces).to(tl.int32) * WIDTH
    _place, offsets, inside = line_tile(start, exists, first, length, 1, 1, WIDTH)
    shifted = load_signed(x_pointer + base, offsets, inside, negated, tl.float32) - maximum
    if logarithm:
        y = normalised(shifted, total, True)
    else:
        y = normalised(shifted, total, False)
    tl.store(y_pointer + base + offsets, narrow(y, y_pointer.dtype.element_ty), mask=inside)


@kernel
def long_softmax_shares_kernel(
    g_pointer,
    y_pointer,
    partial_pointer,  # sums of the parts' shares, (parts, count)
    count: tl.int64,
    length,
    parts: tl.int32,
    part_length,
    logarithm: tl.int32,
    WIDTH: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    base, line, start, exists, part, begin, end = part_of_line(program, count, length, parts, part_length)
    shares = tl.zeros((1, WIDTH), tl.float32)
    for first in range(begin, end, WIDTH):
        _place, offsets, inside = line_tile(start, exists, first, length, 1, 1, WIDTH)
        g = widen(tl.load(g_pointer + base + offsets, mask=inside, other=0), tl.float32)
        y = widen(tl.load(y_pointer + base + offsets, mask=inside & (logarithm == 0), other=0), tl.float32)
        shares += summand(g, y, logarithm)
    tl.store(partial_pointer + part * count + line, tl.sum(shares, 1))


@kernel
def long_softmax_backward_kernel(
    g_pointer,
    y_pointer,
    partial_pointer,
    dx_pointer,
    count: tl.int64,
    length,
    parts: tl.int32,
    pieces: tl.int32,
    logarithm: tl.int32,
    negated: tl.int32,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    base, _line, start, exists = line_block(program // pieces, count, length, 1, 1, 1)
    part = tl.arange(0, PARTS)
    total = tl.sum(tl.load(partial_pointer + part * count + program // pieces, mask=part < parts, other=0), 0)
    first = (program % pieces).to(tl.int32) * WIDTH
    _place, offsets, inside = line_tile(start, exists, first, length, 1, 1, WIDTH)
    g = widen(tl.load(g_pointer + base + offsets, mask=inside, other=0), tl.float32)
    y = widen(tl.load(y_pointer + base + offsets, mask=inside, other=0), tl.float32)
    dx = input_gradient(g, y, total, logarithm, negated)
    tl.store(dx_pointer + base + offsets, narrow(dx, dx_pointer.dtype.element_ty), mask=inside)


# --- Configurations and launchers -----------------------------------------------------------------------------------

# Elements of a line that a program holds: the narrowest that holds them all is taken, or else `_PIECE` of it at a time.
_WIDTHS = {
    "forward": {ALONG: (16, 128, 1024, 4096, 16384, 32768), ACROSS: (32, 256)},
    "backward": {ALONG: (16, 128, 1024, 4096, 16384), ACROSS: (32, 256)},
}
_PIECE = {ALONG: 4096, ACROSS: 64}
# float64 takes twice the registers, and isn't what networks train in: it gets fewer kernels.
_WIDTHS_FLOAT64 = {ALONG: (64, 1024), ACROSS: (32,)}
_TILE = 2048  # elements of a program, at least
_LINES_ACROSS = 32  # neighbouring lines of a program, at least: 64 bytes or more of each piece


def _widths(direction: str, dtype: torch.dtype, axis: int) -> tuple[int, ...]:
    return _WIDTHS_FLOAT64[axis] if dtype is torch.float64 else _WIDTHS[direction][axis]


@cache
def _forward(dtype: torch.dtype, axis: int, width: int | None, logarithm: bool) -> Configuration:
    """For lines of up to ``width`` elements; without, for longer ones, in pieces."""
    # One kernel for both would hold what either needs: too much for the registers, in the widest tile.
    constants = {"LOGARITHM": logarithm, "PACK": 16 // dtype.itemsize}
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
    piece = width or _PIECE[axis]
    lines = max(_TILE // piece, 1 if axis == ALONG else _LINES_ACROSS)
    threads = min(max(lines * piece // 16, threads_for(dtype)), 1024)
    wide = lines * piece * dtype.itemsize // (threads * 16)
    return configure(
        kernel,
        f"{label} {'along' if axis == ALONG else 'across'} x{width or '-pieces'} {TRITON_TYPE[dtype]}",
        dtype,
        {
            **constants,
            "AXIS": axis,
            "COMPUTE": COMPUTE[dtype],
            "LINES": lines,
            "WIDTH": piece,
            "WHOLE": width is not None,
        },
        threads=threads,
        wide_loads=reads * wide,
        wide_stores=wide,
        rare=dtype not in (torch.bfloat16, torch.float32),
    )


@cache
def _long(kind: str, dtype: torch.dtype) -> Configuration:
    code = {
        "forward": long_softmax_forward_kernel,
        "shares": long_softmax_shares_kernel,
        "backward": long_softmax_backward_kernel,
    }[kind]
    joins = kind != "shares"
    threads = max(PIECE // 16, threads_for(dtype))
    wide = PIECE * dtype.itemsize // (threads * 16)
    return configure(
        code,
        f"long softmax {kind} {TRITON_TYPE[dtype]}",
        dtype,
        {"WIDTH": PIECE, **({"PARTS": PARTS} if joins else {})},
        pointers={"partial": torch.float32},
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
        yield parts_configuration(dtype)
        for kind in ("forward", "shares", "backward"):
            yield _long(kind, dtype)


def _width_for(direction: str, dtype: torch.dtype, lines: Lines) -> int | None:
    """The narrowest tile that holds a line, or None."""
    return next((width for width in _widths(direction, dtype, lines.axis) if lines.length <= width), None)


def softmax_forward(x: Tensor, dim: int, kind: str) -> Tensor:
    """A row of `KINDS`, along ``dim``, in the memory order of ``x``."""
    x = dense(x)
    y = torch.empty_like(x)
    lines = lines_of(x, dim)
    logarithm, negated = KINDS[kind]
    if are_shared(lines, x.dtype):
        parts, pieces = parts_of(lines), cdiv(lines.length, PIECE)
        partial = line_parts(x, lines, parts, negated=negated)
        extents = (lines.count, lines.length, parts.number, pieces)
        launch(_long("forward", x.dtype), lines.count * pieces, x, partial, y, *extents, int(logarithm), int(negated))
        return y
    configuration = _forward(x.dtype, lines.axis, _width_for("forward", x.dtype, lines), logarithm)
    programs = lines.blocks(dict(configuration.constants)["LINES"])
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
        parts, pieces = parts_of(lines), cdiv(lines.length, PIECE)
        partial = torch.empty((parts.number, lines.count), dtype=torch.float32, device=y.device)
        extents = (lines.count, lines.length, parts.number)
        shares = (*extents, parts.length, int(logarithm))
        launch(_long("shares", y.dtype), lines.count * parts.number, g, y, partial, *shares)
        options = (*extents, pieces, int(logarithm), int(negated))
        launch(_long("backward", y.dtype), lines.count * pieces, g, y, partial, dx, *options)
        return dx
    configuration = _backward(y.dtype, lines.axis, _width_for("backward", y.dtype, lines))
    programs = lines.blocks(dict(configuration.constants)["LINES"])
    launch(configuration, programs, g, y, dx, *lines.extents, int(logarithm), int(negated))
    return dx
