"""Lines so long that several programs share each: those of softmax and cross-entropy from 131,072 elements on.

A program reads no faster than its multiprocessor does, and a batch of such lines may well be smaller than the GPU.  So
a first launch leaves the maximum and the sum of exp(x - maximum) of each split of a line, and the programs of a second
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
    packed_tile,
    reference_point,
)
from .numerics import fast_exp
from .tiles import aligned, cdiv, load, threads_for

__all__ = [
    "CHUNK",
    "LONG_DTYPES",
    "SPLITS",
    "Splits",
    "are_shared",
    "chunk_of_line",
    "join_splits",
    "load_signed",
    "long_line",
    "long_line_tile",
    "split_of_line",
    "split_statistics",
    "splits_configuration",
    "splits_of",
]

#: Dtypes whose lines are shared.
LONG_DTYPES = tuple(dtype for dtype in DTYPES if dtype is not torch.float64)
#: Splits of a line, at most: one program joins them at once.
SPLITS = 64
#: Elements of a tile, a chunk of the line.
CHUNK = 4096
_ALONG = tl.constexpr(ALONG)
_SHARED_FROM = 131_072
_SPLIT = 32_768


class Splits(NamedTuple):
    """How a line is divided: ``number`` splits of ``size`` elements; the last may be shorter."""

    number: int
    size: int


def are_shared(lines: Lines, dtype: torch.dtype) -> bool:
    """Whether several programs share each line.  Sizes alone decide, so that results don't depend on the GPU."""
    return lines.axis == ALONG and lines.dim_size >= _SHARED_FROM and dtype in LONG_DTYPES


@triton.jit
def long_line(line, count, dim_size, ALIGN: tl.constexpr):
    """A block of one line."""
    return line_block(line, count, dim_size, 1, _ALONG, 1, ALIGN)


@triton.jit
def long_line_tile(line, first, WIDTH: tl.constexpr):
    """Elements ``first`` to ``first + WIDTH`` of it."""
    tile, _place = line_tile(line, first, _ALONG, WIDTH)
    return tile


@triton.jit
def chunk_of_line(count, dim_size, chunks, WIDTH: tl.constexpr, ALIGN: tl.constexpr):
    """The chunk that a program works on: its line, and its tile."""
    program = tl.program_id(0).to(tl.int64)
    line = long_line(program // chunks, count, dim_size, ALIGN)
    return line, long_line_tile(line, (program % chunks).to(tl.int32) * WIDTH, WIDTH)


@triton.jit
def split_of_line(program, count, dim_size, splits, split_size, ALIGN: tl.constexpr):
    """The split that a program works on: its line, its number, first element, and end."""
    split = (program % splits).to(tl.int32)
    first = split * aligned(split_size, ALIGN)  # chunks are
    line = long_line(program // splits, count, dim_size, ALIGN)
    return line, split, first, tl.minimum(first + split_size, line.dim_size)


@triton.jit
def load_signed(x_pointer, tile, negated, COMPUTE: tl.constexpr):
    """The elements, or their negatives; -inf outside."""
    x = load(x_pointer, tile, COMPUTE, tl.where(negated != 0, float("inf"), float("-inf")))
    return tl.where(negated != 0, -x, x)


@kernel
def split_statistics_kernel(
    x_pointer,
    partial_pointer,  # maxima, then sums of exponentials, (2, splits, count)
    count: tl.int64,
    dim_size,
    splits: tl.int32,
    split_size: tl.int32,
    negated: tl.int32,
    WIDTH: tl.constexpr,
    VECTOR: tl.constexpr,  # elements of a thread's access
    THREADS: tl.constexpr,
    ALIGN: tl.constexpr,
):
    packed: tl.constexpr = ALIGN if ALIGN < VECTOR else VECTOR
    pairs: tl.constexpr = WIDTH // packed if WIDTH // packed < THREADS else THREADS
    program = tl.program_id(0).to(tl.int64)
    line, split, begin, end = split_of_line(program, count, dim_size, splits, split_size, ALIGN)
    maximum, total = online_softmax_init(tl.float32, _ALONG, 1, pairs)
    for first in range(begin, end, WIDTH):
        tile, _place = packed_tile(line, first, _ALONG, WIDTH, pairs, packed)
        x = load_signed(x_pointer, tile, negated, tl.float32)
        maximum, total = online_softmax_update(maximum, total, x, _ALONG)
    maximum, total = online_softmax_reduce(maximum, total, _ALONG)
    tl.store(partial_pointer + split * count + line.line, maximum)
    tl.store(partial_pointer + (splits + split) * count + line.line, total)


@triton.jit
def join_splits(partial_pointer, line, exists, count, splits, SPLITS: tl.constexpr):
    """Maximum and sum of exponentials of each line, from those of its splits."""
    split = tl.arange(0, SPLITS)[None, :]
    there = exists[:, None] & (split < splits)
    place = partial_pointer + split * count + line[:, None]
    maxima = tl.load(place, mask=there, other=float("-inf"))
    totals = tl.load(place + splits * count, mask=there, other=0)
    maximum = tl.max(maxima, 1)
    total = tl.sum(totals * fast_exp(maxima - reference_point(maximum)[:, None]), 1)
    return maximum, total


@cache
def splits_configuration(dtype: torch.dtype) -> Configuration:
    """The first launch, of lines of ``dtype``."""
    threads = max(CHUNK // 16, threads_for(dtype))
    return configure(
        split_statistics_kernel,
        f"splits of lines {TRITON_TYPE[dtype]}",
        dtype,
        {"WIDTH": CHUNK, "VECTOR": 16 // dtype.itemsize, "THREADS": threads},
        pointers={"partial": torch.float32},
        aligned=("dim_size",),
        threads=threads,
        wide_loads=CHUNK * dtype.itemsize // (threads * 16),
        rare=dtype is torch.float16,
    )


def splits_of(lines: Lines) -> Splits:
    """The splits of each of these lines: whole chunks, and as many as there may be at most."""
    chunks = cdiv(max(_SPLIT, cdiv(lines.dim_size, SPLITS)), CHUNK)
    return Splits(cdiv(lines.dim_size, chunks * CHUNK), chunks * CHUNK)


def split_statistics(x: Tensor, lines: Lines, splits: Splits, *, negated: bool = False) -> Tensor:
    """Maximum and sum of exponentials of each split, (2, splits, lines), float32; of -x where ``negated``."""
    partial = torch.empty((2, splits.number, lines.count), dtype=torch.float32, device=x.device)
    launch(
        splits_configuration(x.dtype),
        lines.count * splits.number,
        *(x, partial, lines.count, lines.dim_size, splits.number, splits.size, int(negated)),
    )
    return partial
