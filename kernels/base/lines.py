"""Lines: the elements of a dense tensor along one dimension, which softmax and cross-entropy reduce.

Whatever the memory order, the dimension has some stride, ``inner_size``, and memory is (outer, dim_size, inner_size).
A program takes a block of neighbouring lines, and a tile a chunk of each of them:

==============  =========================================  ==============  ====================
``inner_size``  lines                                      tile            axis along the lines
==============  =========================================  ==============  ====================
1               follow one another; each is contiguous     lines x chunks  1
greater than 1  lie side by side; neighbours are adjacent  chunks x lines  0
==============  =========================================  ==============  ====================

So channels-last and channels-first tensors are both walked as they are, in contiguous accesses.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from ._triton import tl, triton
from .numerics import exp_of_term
from .tiles import TILE, Tile, aligned, cdiv

__all__ = [
    "ACROSS",
    "ALONG",
    "LineTiling",
    "Lines",
    "contiguous_extent",
    "line_block",
    "line_tile",
    "line_tiling",
    "lines_of",
    "online_softmax_init",
    "online_softmax_reduce",
    "online_softmax_update",
    "packed_tile",
    "part_of_lines",
    "reference_point",
    "spread",
    "sum_of_pairs",
]

#: The tile's axis along the lines, where these follow one another in memory, and where they lie side by side.
ALONG, ACROSS = 1, 0
_ALONG = tl.constexpr(ALONG)


@dataclass(frozen=True)
class Lines:
    """``count`` lines of ``dim_size`` elements, ``inner_size`` apart."""

    count: int
    dim_size: int
    inner_size: int

    @property
    def axis(self) -> int:
        return ALONG if self.inner_size == 1 else ACROSS

    @property
    def extents(self) -> tuple[int, int, int]:
        """What kernels are told: ``count``, ``dim_size``, ``inner_size``."""
        return self.count, self.dim_size, self.inner_size

    def blocks(self, size: int) -> int:
        """Blocks of ``size`` neighbouring lines that cover them all; where they lie side by side, none spans a gap."""
        if self.axis == ALONG:
            return cdiv(self.count, size)
        return self.count // self.inner_size * cdiv(self.inner_size, size)


def lines_of(tensor: Tensor, dim: int) -> Lines:
    """The lines of a dense tensor along ``dim``."""
    dim_size = tensor.shape[dim] if tensor.dim() else 1
    # The stride of a dimension of one element says nothing.
    inner_size = tensor.stride(dim) if dim_size > 1 else 1
    return Lines(tensor.numel() // max(dim_size, 1), dim_size, inner_size)


def contiguous_extent(axis: int) -> str:
    """The kernels' argument whose alignment is that of the rows of a tile in memory."""
    return "dim_size" if axis == ALONG else "inner_size"


class LineTiling(NamedTuple):
    """A tile: so many neighbouring lines, and ``width`` elements of each."""

    axis: int
    lines: int
    width: int

    @property
    def constants(self) -> dict[str, int]:
        """What kernels are told."""
        return {"AXIS": self.axis, "LINES": self.lines, "WIDTH": self.width}


def line_tiling(axis: int, width: int, lines_across: int) -> LineTiling:
    """Tiles of this width: as many lines as make a tile, and at least ``lines_across`` where they lie side by side."""
    return LineTiling(axis, max(TILE // width, 1 if axis == ALONG else lines_across), width)


class LineBlock(NamedTuple):
    """Neighbouring lines, as device functions see them.

    ``start`` is where the block starts in memory, ``offsets`` where each line does from there, ``line`` its number in
    memory order, and ``exists`` whether there is one.  The extents are those of `Lines`.
    """

    start: Any
    offsets: Any
    line: Any
    exists: Any
    dim_size: Any
    inner_size: Any


@triton.jit
def line_block(block, count, dim_size, inner_size, AXIS: tl.constexpr, LINES: tl.constexpr, ALIGN: tl.constexpr):
    """Block number ``block`` of the lines."""
    within = tl.arange(0, LINES)
    if AXIS == _ALONG:
        dim_size = aligned(dim_size, ALIGN)
        line = block * LINES + within
        return LineBlock(block * LINES * dim_size, within * dim_size, line, line < count, dim_size, inner_size)
    else:
        inner_size = aligned(inner_size, ALIGN)
        blocks = tl.cdiv(inner_size, LINES)
        first = block % blocks * LINES
        outer = block // blocks * inner_size
        line = outer + first + within
        return LineBlock(outer * dim_size + first, within, line, first + within < inner_size, dim_size, inner_size)


@triton.jit
def part_of_lines(count, dim_size, inner_size, parts, AXIS: tl.constexpr, LINES: tl.constexpr, ALIGN: tl.constexpr):
    """This program's block of the lines, which so many programs share, and its number among these."""
    program = tl.program_id(0).to(tl.int64)
    return line_block(program // parts, count, dim_size, inner_size, AXIS, LINES, ALIGN), program % parts


@triton.jit
def line_tile(lines, first, AXIS: tl.constexpr, WIDTH: tl.constexpr):
    """Elements ``first`` to ``first + WIDTH`` of a block's lines: their tile, and their places in the line."""
    place = tl.expand_dims(first + tl.arange(0, WIDTH), 1 - AXIS)
    step = place
    if AXIS != _ALONG:
        step = place.to(tl.int64) * lines.inner_size
    offsets = tl.expand_dims(lines.offsets, AXIS) + step
    return Tile(lines.start, offsets, tl.expand_dims(lines.exists, AXIS) & (place < lines.dim_size)), place


# --- Running maximum and sum of exponentials --------------------------------------------------------------------------
#
# Long lines are folded chunk by chunk into maxima and sums of exp(x - maximum).  Where a line is contiguous, all that a
# thread holds of a chunk shares a pair: no exchange between threads until the line's end, and hardly more than one
# exponential an element.  It holds ``PACKED`` neighbours, an access, and as many in each further row of ``PAIRS``: the
# tile is (rows, lines, pairs, neighbours), so that the fewer pairs a line has, the more lines a warp takes at once.


@triton.jit
def reference_point(maximum):
    """What is subtracted before exp: the maximum; 0 where nothing but -inf was seen, since -inf - -inf is NaN."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def online_softmax_init(COMPUTE: tl.constexpr, AXIS: tl.constexpr, LINES: tl.constexpr, PAIRS: tl.constexpr):
    """Maxima and sums of nothing."""
    if AXIS == _ALONG:
        maximum = tl.full((LINES, PAIRS), float("-inf"), COMPUTE)
    else:
        maximum = tl.full((LINES,), float("-inf"), COMPUTE)
    return maximum, tl.zeros_like(maximum)


@triton.jit
def packed_tile(lines, first, AXIS: tl.constexpr, WIDTH: tl.constexpr, PAIRS: tl.constexpr, PACKED: tl.constexpr):
    """`line_tile`, but of contiguous lines as (rows, lines, pairs, neighbours): a pair is of axes 0 and 3."""
    if AXIS == _ALONG:
        row = tl.arange(0, WIDTH // (PAIRS * PACKED))[:, None, None, None]
        pair = tl.arange(0, PAIRS)[None, None, :, None]
        place = first + (row * PAIRS + pair) * PACKED + tl.arange(0, PACKED)[None, None, None, :]
        offsets = lines.offsets[None, :, None, None] + place
        inside = lines.exists[None, :, None, None] & (place < lines.dim_size)
        return Tile(lines.start, offsets, inside), place
    else:
        return line_tile(lines, first, AXIS, WIDTH)


@triton.jit
def spread(values, AXIS: tl.constexpr):
    """A pair's values, broadcastable to its elements."""
    if AXIS == _ALONG:
        values = values[None, :, :, None]
    else:
        values = values[None, :]
    return values


@triton.jit
def sum_of_pairs(tile, AXIS: tl.constexpr):
    """The sums of what shares a pair."""
    if AXIS == _ALONG:
        tile = tl.sum(tile, 3)
    return tl.sum(tile, 0)


@triton.jit
def online_softmax_update(maximum, total, x, AXIS: tl.constexpr):
    """Fold a packed tile into running maxima and sums; elements that don't count are -inf."""
    largest = x
    if AXIS == _ALONG:
        largest = tl.max(largest, 3)
    largest = tl.maximum(maximum, tl.max(largest, 0), propagate_nan=tl.PropagateNan.ALL)
    reference = reference_point(largest)
    exponentials = exp_of_term(x - spread(reference, AXIS))
    return largest, total * exp_of_term(maximum - reference) + sum_of_pairs(exponentials, AXIS)


@triton.jit
def online_softmax_reduce(maximum, total, AXIS: tl.constexpr):
    """One maximum and one sum for each line."""
    if AXIS == _ALONG:
        largest = tl.max(maximum, 1)
        total = tl.sum(total * exp_of_term(maximum - reference_point(largest)[:, None]), 1)
        maximum = largest
    return maximum, total
