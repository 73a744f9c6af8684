"""Windows of images, and what is kept of them: shared by pooling and by the convolution that pools.

Images (N, C, H, W) are read in either memory format, and a tile of the result is (rows, columns) of memory:

=============  ===============================  ===============
format         row                              column
=============  ===============================  ===============
channels last  (sample, [level,] line, place)   channel
contiguous     (sample, channel, [level,] line) place
=============  ===============================  ===============

Volumes (N, C, D, H, W) have levels besides; of what has one dimension, the caller makes images of one line.

**The code** of a window is all that the backward pass needs besides the gradient: the position of the maximum in the
window, counted along its lines, and above it a bit that is set where the activation passes the gradient on.  It takes
1, 2, 4 or 8 bits, so a window has at most 256 positions, or 128 with an activation of one bit.  Codes are packed along
the columns; each row of them begins with a byte of its own.  Of an activation whose gradient needs more, the maxima
before the activation are kept (see `kept_beside_code`).

**Cells.** Windows of 2 and of 4 positions that lie side by side, and those of 3 that overlap by one, begin every 2 or 4
places.  They *cover* contiguous images whose sides are multiples of that, where the windows of 3 have a padding of one:
then lines of cells follow one another whatever the image, and are as aligned as those of pooled images, and more.

As in PyTorch the first of equal maxima wins, the last NaN, and in a window of negative infinities the first position
that lies inside the image.
"""

from collections.abc import Iterator
from math import prod
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .base._triton import tl, triton
from .base.layout import dense
from .base.numerics import widen
from .functions.activation import Activated, Activation, gradient_from_input

__all__ = [
    "ANY",
    "FIXED_WINDOWS",
    "LARGEST_EXTENT",
    "POINT",
    "Fixed",
    "Kept",
    "Pooled",
    "Window",
    "code_bits",
    "covered_offset",
    "divided",
    "image_matrix",
    "images",
    "kept_beside_code",
    "load_gradient",
    "maximum_of",
    "memory_format",
    "most_positions",
    "place_images",
    "plane_offset",
    "point",
    "point_codes",
    "pooled_like",
    "rank_of",
    "store_codes",
    "surpasses",
    "tile_place",
    "update_maximum",
    "window_place",
    "winner_indices",
    "within",
]

#: Elements along a line or a column of an image that 32 bits can count in, inside a tile and its windows.
LARGEST_EXTENT = 2**30

# --- Device functions -------------------------------------------------------------------------------------------------


@triton.jit
def divided(number, divisor):
    """Quotient and remainder of what isn't negative, which takes fewer instructions.  Both fit into 31 bits."""
    number = number.to(tl.uint32)
    divisor = divisor.to(tl.uint32)
    return (number // divisor).to(tl.int32), (number % divisor).to(tl.int32)


@triton.jit
def tile_place(
    rows, columns, depth, height, width, CHANNELS_LAST: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr
):
    """This program's first row and column, and of its elements, broadcastable: row, column, plane, level, line and
    place, and which are inside.

    A plane is a sample where channels are last, else a sample's channel; of several levels, where ``depth`` isn't None.
    """
    program = tl.program_id(0).to(tl.int64)
    column_blocks = tl.cdiv(columns, WIDTH)
    first_row = program // column_blocks * HEIGHT
    first_column = (program % column_blocks).to(tl.int32) * WIDTH
    row = first_row + tl.arange(0, HEIGHT)[:, None]
    column = first_column + tl.arange(0, WIDTH)[None, :]
    inside = (row < rows) & (column < columns)
    # Only the first row needs 64 bits to be divided.
    first = first_row
    offset = tl.arange(0, HEIGHT)[:, None]
    if CHANNELS_LAST:
        offset, place = divided(offset + (first % width).to(tl.int32), width)
        first = first // width
    else:
        place = column
    offset, line = divided(offset + (first % height).to(tl.int32), height)
    first = first // height
    level = 0
    if depth is not None:
        offset, level = divided(offset + (first % depth).to(tl.int32), depth)
        first = first // depth
    return first_row, first_column, row, column, first + offset, level, line, place, inside


@triton.jit
def place_images(plane, column, columns, depth, height, width, CHANNELS_LAST: tl.constexpr):
    """Where a plane of images of this size begins, and the distance of neighbouring places."""
    start = plane * height * width
    if depth is not None:
        start *= depth
    distance = 1
    if CHANNELS_LAST:
        start = start * columns + column
        distance = columns
    return start, distance


@triton.jit
def plane_offset(level, line, place, depth, height, width, distance):
    """Where an element lies in its plane, and whether level and line are inside."""
    inside = within(line, height)
    offset = line.to(tl.int64)
    if depth is not None:
        inside = inside & within(level, depth)
        offset += level.to(tl.int64) * height
    return (offset * width + place) * distance, inside


@triton.jit
def within(place, extent):
    """Whether 0 <= place < extent, in one comparison.  The extent fits into 31 bits; what is negative becomes large."""
    return place.to(tl.uint32) < extent.to(tl.uint32)


@triton.jit
def covered_offset(line, width, LINES: tl.constexpr, HEIGHT: tl.constexpr):
    """Where the images' lines number ``line`` of the cells in a tile's rows begin, counted from the first cell, where
    cells cover the images, see above.
    """
    return (tl.arange(0, HEIGHT)[:, None] * LINES + line).to(tl.int64) * width


@triton.jit
def rank_of(x, a, b, ACTIVATION: tl.constexpr):
    """What a window's elements are compared by: the activation's values, or what it is applied to if that will do."""
    if ACTIVATION.keeps_order:
        return x
    else:
        return ACTIVATION.forward(x, a, b)


@triton.jit
def surpasses(rank, best):
    """Whether an element beats the maximum of those before it: as in PyTorch, the first of equal ones stays, and the
    last NaN wins.
    """
    return (rank > best) | (rank != rank)


@triton.jit
def update_maximum(wins, rank, x, window_position, best, pre_activation, position):
    """The maximum's rank, the activation's input there and its position, with the element at ``window_position``."""
    return tl.where(wins, rank, best), tl.where(wins, x, pre_activation), tl.where(wins, window_position, position)


@triton.jit
def maximum_of(best, pre_activation, position, first, a, b, ACTIVATION: tl.constexpr):
    """The maximum and its position.  ``first`` is the window's first position that lies inside: it is the first of
    equal values where the activation makes all of them equal.
    """
    if ACTIVATION.keeps_order:
        best = ACTIVATION.forward(best, a, b)
        if ACTIVATION.saves == "mask":
            position = tl.where(ACTIVATION.mask(pre_activation, a, b), position, first)
    return best, position


@triton.jit
def store_codes(
    pointer,
    code,
    row,
    first_column,
    rows,
    columns,
    BITS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Pack the codes (HEIGHT, WIDTH), 0 outside, and store them."""
    per_byte: tl.constexpr = 8 // BITS
    pitch = (columns + per_byte - 1) // per_byte
    shifts = tl.arange(0, per_byte)[None, None, :] * BITS
    packed = tl.sum(tl.reshape(code, (HEIGHT, WIDTH // per_byte, per_byte)) << shifts, axis=2)
    byte = first_column // per_byte + tl.arange(0, WIDTH // per_byte)[None, :]
    tl.store(pointer + row * pitch + byte, packed.to(tl.uint8), mask=(row < rows) & (byte < pitch))


@triton.jit
def window_place(plane, level, line, place, column, columns, depth, height, width, inside, CHANNELS_LAST: tl.constexpr):
    """Where the windows at these places of pooled images lie in memory: row, column, columns, and which are inside."""
    inside = inside & within(line, height) & within(place, width)
    if depth is not None:
        inside = inside & within(level, depth)
        plane = plane * depth + level
    row = plane * height + line
    if CHANNELS_LAST:
        row = row * width + place
    else:
        column = place
        columns = width
    return row, column, columns, inside


@triton.jit
def load_gradient(
    g_pointer,
    code_pointer,
    saved_pointer,
    row,
    column,
    columns,
    inside,
    a,
    b,
    ACTIVATION: tl.constexpr,
    KEPT: tl.constexpr,
    BITS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Of the windows there: the position of the maximum, and its gradient."""
    offset = row * columns + column
    g = widen(tl.load(g_pointer + offset, mask=inside, other=0), COMPUTE)
    position = 0
    if BITS:
        per_byte: tl.constexpr = 8 // BITS
        byte = row * ((columns + per_byte - 1) // per_byte) + column // per_byte
        code = tl.load(code_pointer + byte, mask=inside, other=0).to(tl.int32)
        position = (code >> (column % per_byte * BITS)) & (2**BITS - 1)
    if ACTIVATION.saves != "nothing":
        if KEPT == "mask":
            dx = ACTIVATION.gradient(g, (position >> (BITS - 1)) != 0, a, b)
            position = position & (2 ** (BITS - 1) - 1)
        else:
            saved = widen(tl.load(saved_pointer + offset, mask=inside, other=0), COMPUTE)
            if KEPT == "output":
                dx = ACTIVATION.gradient(g, saved, a, b)
            else:
                dx = gradient_from_input(g, saved, a, b, ACTIVATION)
        g = tl.where(inside, dx, 0.0)
    return position, g


# --- Windows ----------------------------------------------------------------------------------------------------------


class Fixed(NamedTuple):
    """Windows that kernels are compiled for: of ``kernel`` positions in each of the last ``directions`` directions, and
    of one in the others.  All are 0 for the kernels of any windows.
    """

    kernel: int
    stride: int
    directions: int = 2

    @property
    def positions(self) -> int:
        positions: int = self.kernel**self.directions
        return positions

    def __str__(self) -> str:
        if self == ANY:
            return "any"
        return "x".join((*["1"] * (2 - self.directions), *[str(self.kernel)] * self.directions))


class Window(NamedTuple):
    """The windows of a pooling layer; each tuple is (along the height, along the width), the depth first if any."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] = (0, 0)
    dilation: tuple[int, ...] = (1, 1)
    ceil_mode: bool = False

    @property
    def positions(self) -> int:
        return prod(self.kernel)

    def pooled(self, *size: int) -> tuple[int, ...]:
        """The size of pooled images of this one.  May be symbolic."""
        return tuple(map(self._pooled, range(len(size)), size))

    def _pooled(self, axis: int, size: int) -> int:
        stride, padding = self.stride[axis], self.padding[axis]
        covered = size + 2 * padding - self.dilation[axis] * (self.kernel[axis] - 1) - 1
        windows = (covered + (stride - 1 if self.ceil_mode else 0)) // stride + 1
        # The last window must begin inside the image, or in the padding before it.
        return windows - 1 if self.ceil_mode and (windows - 1) * stride >= size + padding else windows

    @property
    def is_point(self) -> bool:
        """Whether there is no pooling."""
        return self.fixed == POINT.fixed

    @property
    def fixed(self) -> Fixed:
        """What kernels are compiled for, where that is these windows."""
        if not any(self.padding) and (known := _UNPADDED.get((self.kernel, self.stride, self.dilation))) is not None:
            return known
        by_direction = list(zip(self.kernel, self.stride, self.padding, self.dilation, strict=True))
        first = next((axis for axis, one in enumerate(by_direction) if one != (1, 1, 0, 1)), len(by_direction))
        kernel, stride, *_ = by_direction[-1]
        fixed = Fixed(kernel, stride, len(by_direction) - first)
        square = all(one[:2] == (kernel, stride) and one[3] == 1 for one in by_direction[first:])
        # Pairs are loaded side by side, which padding would push out of line.
        fits = square and fixed in FIXED_WINDOWS and (kernel == 3 or not any(self.padding))
        return fixed if fits else ANY

    @property
    def arguments(self) -> tuple[int, ...]:
        return (*self.kernel, *self.stride, *self.padding, *self.dilation)


#: The windows that kernels are compiled for, and any.
FIXED_WINDOWS = (
    *(Fixed(1, 1, 0), Fixed(2, 2), Fixed(3, 2)),
    *(Fixed(2, 2, 1), Fixed(3, 2, 1), Fixed(4, 4, 1)),
    Fixed(2, 2, 3),
)
ANY = Fixed(0, 0, 0)


def _unpadded() -> Iterator[tuple[tuple[tuple[int, ...], ...], Fixed]]:
    for axes in (2, 3):
        for one in FIXED_WINDOWS:
            if (before := axes - one.directions) >= 0:
                kernel, stride = ((1,) * before + (size,) * one.directions for size in one[:2])
                yield (kernel, stride, (1,) * axes), one


#: Those without padding, by kernel, stride and dilation: each call asks.
_UNPADDED = dict(_unpadded())


#: Windows of one position, by the number of directions.
_POINTS = {n: Window((1,) * n, (1,) * n, (0,) * n, (1,) * n) for n in (1, 2, 3)}


def point(directions: int) -> Window:
    """Windows of one position: no pooling."""
    return _POINTS[directions]


#: Those of images.
POINT = point(2)

#: What is kept for the gradient of an activation.
Kept = Literal["nothing", "mask", "output", "input"]


def most_positions(masked: bool) -> int:
    """The largest window whose code fits into a byte; ``masked`` where a bit of it is the activation's."""
    return 128 if masked else 256


def code_bits(fixed: Fixed, masked: bool) -> int:
    """Bits of a window's code."""
    if fixed == ANY:
        return 8
    needed = (fixed.positions - 1).bit_length() + masked
    return next(bits for bits in (0, 1, 2, 4, 8) if bits >= needed)


class Pooled(NamedTuple):
    """What a forward pass leaves; what it wasn't asked for is empty."""

    y: Tensor
    code: Tensor
    pre_activation: Tensor
    indices: Tensor


def images(x: Tensor) -> tuple[Tensor, bool]:
    """``x`` (N, C, H, W) or (N, C, D, H, W) in one of the memory formats, itself or a copy, and whether that is
    channels-last.
    """
    x = dense(x)
    channels_last = x.is_contiguous(memory_format=memory_format(x.dim() - 2, True)) and not x.is_contiguous()
    # No copy is asked for where none is made: torch 2.11's compiler takes what comes back for another tensor.
    return (x if channels_last or x.is_contiguous() else x.contiguous()), channels_last


def memory_format(directions: int, channels_last: bool) -> torch.memory_format:
    """Of images, or volumes."""
    if not channels_last:
        return torch.contiguous_format
    return torch.channels_last if directions == 2 else torch.channels_last_3d


def kept_beside_code(row: Activation, fixed: Fixed) -> Kept:
    """What the activation's gradient is read off: a ``"mask"``, which is part of the code, the ``"output"``, or the
    ``"input"``: the maxima before the activation.

    Of windows of several positions never the output: users may change pooled images in place, as they may stock's.
    """
    return "input" if row.saves == "output" and fixed != POINT.fixed else row.saves


def pooled_like(
    like: Tensor,
    shape: tuple[int, ...],
    channels_last: bool,
    window: Window,
    activation: Activated,
    *,
    keeps: bool,
    emits_indices: bool = False,
    y: Tensor | None = None,
) -> Pooled:
    """Memory for what pooling makes of images of this ``shape``, of the type and on the device of ``like``.

    ``y`` itself where it is given.  Shapes may be symbolic.
    """
    pooled_shape = (*shape[:2], *window.pooled(*shape[2:]))
    if y is None:
        order = memory_format(len(window.kernel), channels_last)
        y = torch.empty(pooled_shape, dtype=like.dtype, device=like.device, memory_format=order)
    kept = kept_beside_code(activation.row, window.fixed) if keeps else "nothing"
    bits = code_bits(window.fixed, kept == "mask")
    code_bytes = 0
    if keeps and bits:
        rows, columns = image_matrix(pooled_shape, channels_last)
        code_bytes = rows * ((columns * bits + 7) // 8)
    return Pooled(
        y,
        torch.empty(code_bytes, dtype=torch.uint8, device=like.device),
        torch.empty_like(y) if kept == "input" else like.new_empty(0),
        torch.empty_like(y, dtype=torch.int64) if emits_indices else like.new_empty(0, dtype=torch.int64),
    )


def image_matrix(shape: tuple[int, ...], channels_last: bool) -> tuple[int, int]:
    """Rows and columns of images of this shape, see above."""
    samples, channels, *size = shape
    return (samples * prod(size), channels) if channels_last else (prod(shape[:-1]), shape[-1])


def point_codes(code: Tensor, shape: tuple[int, ...], channels_last: bool, window: Window) -> Tensor:
    """The activation's bits in the codes of pooled images of this ``shape``, as codes of windows of one position."""
    if (bits := code_bits(window.fixed, True)) == 1:
        return code
    rows, columns = image_matrix(shape, channels_last)
    shifts = torch.arange(0, 8, bits, device=code.device)
    passes = (code.view(rows, -1, 1) >> shifts + (bits - 1) & 1).flatten(1)[:, :columns]
    passes = torch.constant_pad_nd(passes, (0, -columns % 8)).view(rows, -1, 8)
    return (passes << torch.arange(8, device=code.device)).sum(2).to(torch.uint8).flatten()


def winner_indices(
    code: Tensor, shape: tuple[int, ...], size: tuple[int, ...], channels_last: bool, window: Window, *, masked: bool
) -> Tensor:
    """Indices in the planes of images of this ``size``, from the codes of pooled images of this ``shape``."""
    rows, columns = image_matrix(shape, channels_last)
    if bits := code_bits(window.fixed, masked):
        shifts = torch.arange(0, 8, bits, device=code.device)
        position = (code.view(rows, -1, 1) >> shifts & 2 ** (bits - masked) - 1).flatten(1)[:, :columns]
    else:
        position = torch.zeros((rows, columns), dtype=torch.int64, device=code.device)
    if channels_last:
        position = position.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
    else:
        position = position.reshape(shape)
    indices = torch.zeros_like(position, dtype=torch.int64)
    positions = window.positions
    for axis, kernel in enumerate(window.kernel):
        positions //= kernel
        first = torch.arange(shape[2 + axis], device=code.device) * window.stride[axis] - window.padding[axis]
        place = first.view(-1, *[1] * (len(size) - axis - 1)) + position // positions % kernel * window.dilation[axis]
        indices = indices * size[axis] + place
    return indices
