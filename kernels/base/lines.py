"""Lines: the elements of a dense tensor along one dimension, which softmax and cross-entropy reduce.

Whatever the memory order, the dimension has some stride, ``inner``, and memory is (outer, length, inner).  A program
takes a block of neighbouring lines, and a tile of it a piece of each:

==============  =========================================  ==============  ====================
``inner``       lines                                      tile            axis along the lines
==============  =========================================  ==============  ====================
1               follow one another; each is contiguous     lines x pieces  1
greater than 1  lie side by side; neighbours are adjacent  pieces x lines  0
==============  =========================================  ==============  ====================

So channels-last and channels-first tensors are both walked as they are, in contiguous accesses.
"""

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from ._triton import tl, triton
from .numerics import fast_exp
from .tiles import cdiv

__all__ = [
    "ACROSS",
    "ALONG",
    "Lines",
    "line_block",
    "line_tile",
    "lines_of",
    "online_softmax_init",
    "online_softmax_reduce",
    "online_softmax_update",
]

#: The tile's axis along the lines, where these follow one another in memory, and where they lie side by side.
ALONG, ACROSS = 1, 0


@dataclass(frozen=True)
class Lines:
    """``count`` lines of ``length`` elements, ``inner`` apart."""

    count: int
    length: int
    inner: int

    @property
    def axis(self) -> int:
        return ALONG if self.inner == 1 else ACROSS

    @cached_property
    def extents(self) -> tuple[int, int, int]:
        """What kernels are told: ``count``, ``length``, ``inner``."""
        return self.count, self.length, self.inner

    def blocks(self, size: int) -> int:
        """Blocks of ``size`` neighbouring lines that cover them all; where they lie side by side, none spans a gap."""
        if self.axis == ALONG:
            return cdiv(self.count, size)
        return self.count // self.inner * cdiv(self.inner, size)


def lines_of(tensor: Tensor, dim: int) -> Lines:
    """The lines of a dense tensor along ``dim``."""
    length = tensor.shape[dim] if tensor.dim() else 1
    # The stride of a dimension of one element says nothing.
    inner = tensor.stride(dim) if length > 1 else 1
    return Lines(tensor.numel() // max(length, 1), length, inner)


@triton.jit
def line_block(block, count, length, inner, AXIS: tl.constexpr, LINES: tl.constexpr):
    """A block of lines: where it starts in memory; its lines' numbers in memory order, their starts, which exist."""
    if AXIS == 1:
        within = tl.arange(0, LINES)
        base = block * LINES * length
        line = block * LINES + within
        start = within * length
        exists = line < count
    else:
        blocks = tl.cdiv(inner, LINES)
        first = block % blocks * LINES
        base = block // blocks * inner * length + first
        start = tl.arange(0, LINES)
        line = block // blocks * inner + first + start
        exists = first + start < inner
    return base, line, start, exists


@triton.jit
def line_tile(start, exists, first, length, inner, AXIS: tl.constexpr, WIDTH: tl.constexpr):
    """Elements ``first`` to ``first + WIDTH`` of a block's lines: places in the line, offsets, and which are inside."""
    place = tl.expand_dims(first + tl.arange(0, WIDTH), 1 - AXIS)
    step = place
    if AXIS == 0:
        step = place.to(tl.int64) * inner
    offsets = tl.expand_dims(start, AXIS) + step
    inside = tl.expand_dims(exists, AXIS) & (place < length)
    return place, offsets, inside


# --- Running maximum and sum of exponentials --------------------------------------------------------------------------
#
# Long lines are folded piece by piece into maxima and sums of exp(x - maximum).  Where a line is contiguous, each PACK
# neighbouring elements, which one thread holds, share a pair: no exchange between threads until the line's end, and
# 1 + 1 / PACK exponentials an element.


@triton.jit
def reference_point(maximum):
    """What is subtracted before exp: the maximum; 0 where nothing but -inf was seen, since -inf - -inf is NaN."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def online_softmax_init(
    COMPUTE: tl.constexpr, AXIS: tl.constexpr, LINES: tl.constexpr, WIDTH: tl.constexpr, PACK: tl.constexpr
):
    """Maxima and sums of nothing."""
    if AXIS == 1:
        maximum = tl.full((LINES, WIDTH // PACK), float("-inf"), COMPUTE)
    else:
        maximum = tl.full((LINES,), float("-inf"), COMPUTE)
    return maximum, tl.zeros_like(maximum)


@triton.jit
def pack(tile, AXIS: tl.constexpr, LINES: tl.constexpr, WIDTH: tl.constexpr, PACK: tl.constexpr):
    """The tile with the elements that share a pair along axis 2 (lines x pairs x elements), or 0 (elements x lines)."""
    if AXIS == 1:
        tile = tl.reshape(tile, (LINES, WIDTH // PACK, PACK))
    return tile


@triton.jit
def online_softmax_update(maximum, total, x, AXIS: tl.constexpr):
    """Fold a packed tile into running maxima and sums; elements that don't count are -inf."""
    largest = tl.maximum(maximum, tl.max(x, 2 * AXIS), propagate_nan=tl.PropagateNan.ALL)
    reference = reference_point(largest)
    exponentials = fast_exp(x - tl.expand_dims(reference, 2 * AXIS))
    return largest, total * fast_exp(maximum - reference) + tl.sum(exponentials, 2 * AXIS)


@triton.jit
def online_softmax_reduce(maximum, total, AXIS: tl.constexpr):
    """One maximum and one sum for each line."""
    if AXIS == 1:
        largest = tl.max(maximum, 1)
        total = tl.sum(total * fast_exp(maximum - reference_point(largest)[:, None]), 1)
        maximum = largest
    return maximum, total
