"""Lines so long that several programs share each: those of softmax and cross-entropy from 131,072 elements on.

A program reads no faster than its multiprocessor does, and a batch of such lines may well be smaller than the GPU.  So
a first launch leaves the maximum and the sum of exp(x - maximum) of each part of a line, and the programs of a second
one join them.  Only lines that are contiguous, in the dtypes that networks train in, are shared.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from ._triton import tl, triton
from .launch import DTYPES, TRITON_TYPE, Configuration, configure, kernel, launch
from .lines import (
    ALONG,
    Lines,
    line_block,
    line_tile,
    online_softmax_init,
    online_softmax_reduce,
    online_softmax_update,
    pack,
    reference_point,
)
from .numerics import fast_exp, widen
from .tiles import cdiv, threads_for

__all__ = [
    "LONG_DTYPES",
    "PARTS",
    "PIECE",
    "Parts",
    "are_shared",
    "join_parts",
    "line_parts",
    "part_of_line",
    "parts_configuration",
    "parts_of",
]

#: Dtypes whose lines are shared.
LONG_DTYPES = tuple(dtype for dtype in DTYPES if dtype is not torch.float64)
#: Parts of a line, at most: one program joins them at once.
PARTS = 64
#: Elements of a tile.
PIECE = 4096
_SHARED_FROM = 131_072
_PART = 32_768


class Parts(NamedTuple):
    """How a line is divided: ``number`` parts of ``length`` elements; the last may be shorter."""

    number: int
    length: int


def are_shared(lines: Lines, dtype: torch.dtype) -> bool:
    """Whether several programs share each line.  Sizes alone decide, so that results don't depend on the GPU."""
    return lines.axis == ALONG and lines.length >= _SHARED_FROM and dtype in LONG_DTYPES


@triton.jit
def part_of_line(program, count, length, parts, part_length):
    """The part that a program works on: its line (a block of one), its number, first element, and end."""
    base, line, start, exists = line_block(program // parts, count, length, 1, 1, 1)
    part = (program % parts).to(tl.int32)
    first = part * part_length
    return base, line, start, exists, part, first, tl.minimum(first + part_length, length)


@kernel
def line_parts_kernel(
    x_pointer,
    partial_pointer,  # maxima, then sums of exponentials, (2, parts, count)
    count: tl.int64,
    length,
    parts: tl.int32,
    part_length,
    negated: tl.int32,
    WIDTH: tl.constexpr,
    PACK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    base, line, start, exists, part, begin, end = part_of_line(program, count, length, parts, part_length)
    maximum, total = online_softmax_init(tl.float32, 1, 1, WIDTH, PACK)
    for first in range(begin, end, WIDTH):
        _place, offsets, inside = line_tile(start, exists, first, length, 1, 1, WIDTH)
        outside = tl.where(negated != 0, float("inf"), float("-inf"))
        x = widen(tl.load(x_pointer + base + offsets, mask=inside, other=outside), tl.float32)
        x = tl.where(negated != 0, -x, x)
        maximum, total = online_softmax_update(maximum, total, pack(x, 1, 1, WIDTH, PACK), 1)
    maximum, total = online_softmax_reduce(maximum, total, 1)
    tl.store(partial_pointer + part * count + line, maximum)
    tl.store(partial_pointer + (parts + part) * count + line, total)


@triton.jit
def join_parts(partial_pointer, line, exists, count, parts, PARTS: tl.constexpr):
    """Maximum and sum of exponentials of each line, from those of its parts."""
    part = tl.arange(0, PARTS)[None, :]
    there = exists[:, None] & (part < parts)
    place = partial_pointer + part * count + line[:, None]
    maxima = tl.load(place, mask=there, other=float("-inf"))
    totals = tl.load(place + parts * count, mask=there, other=0)
    maximum = tl.max(maxima, 1)
    total = tl.sum(totals * fast_exp(maxima - reference_point(maximum)[:, None]), 1)
    return maximum, total


@cache
def parts_configuration(dtype: torch.dtype) -> Configuration:
    """The first launch, of lines of ``dtype``."""
    threads = max(PIECE // 16, threads_for(dtype))
    return configure(
        line_parts_kernel,
        f"parts of lines {TRITON_TYPE[dtype]}",
        dtype,
        {"WIDTH": PIECE, "PACK": 16 // dtype.itemsize},
        pointers={"partial": torch.float32},
        threads=threads,
        wide_loads=PIECE * dtype.itemsize // (threads * 16),
        rare=dtype is torch.float16,
    )


def parts_of(lines: Lines) -> Parts:
    """The parts of each of these lines: whole pieces, and as many as there may be at most."""
    pieces = cdiv(max(_PART, cdiv(lines.length, PARTS)), PIECE)
    return Parts(cdiv(lines.length, pieces * PIECE), pieces * PIECE)


def line_parts(x: Tensor, lines: Lines, parts: Parts, *, negated: bool = False) -> Tensor:
    """Maximum and sum of exponentials of each part, (2, parts, lines), float32; of -x where ``negated``."""
    partial = torch.empty((2, parts.number, lines.count), dtype=torch.float32, device=x.device)
    launch(
        parts_configuration(x.dtype),
        lines.count * parts.number,
        *(x, partial, lines.count, lines.length, parts.number, parts.length, int(negated)),
    )
    return partial
