"""Windows of images, and what is kept of them: shared by pooling and by the convolution that pools.

Images (N, C, H, W) are read in either memory format, and a tile of the result is (rows, columns) of memory:

=============  ========================  ===============
format         row                       column
=============  ========================  ===============
channels last  (sample, line, place)     channel
contiguous     (sample, channel, line)   place
=============  ========================  ===============

**The code** of a window is all that the backward pass needs besides the gradient: the position of the maximum in the
window, counted along its lines, and above it a bit that is set where the activation passes the gradient on.  It takes
1, 2, 4 or 8 bits, so a window has at most 256 positions, or 128 with an activation of one bit.  Codes are packed along
the columns; each row of them begins with a byte of its own.  Of an activation whose gradient needs more, the maxima
before the activation are kept (see `kept_beside_code`).

As in PyTorch the first of equal maxima wins, the last NaN, and in a window of negative infinities the first position
that lies inside the image.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .base._triton import tl, triton
from .base.layout import dense
from .base.numerics import widen
from .functions.activation import Activated, Activation, gradient_from_input

__all__ = [
    "FIXED_WINDOWS",
    "LARGEST_EXTENT",
    "POINT",
    "Kept",
    "Pooled",
    "Window",
    "code_bits",
    "image_matrix",
    "images",
    "kept_beside_code",
    "load_gradient",
    "most_positions",
    "point_codes",
    "pooled_like",
    "store_codes",
    "tile_place",
    "update_maximum",
    "winner_indices",
]

#: Elements along a line or a column of an image that 32 bits can count in, inside a tile and its windows.
LARGEST_EXTENT = 2**30

# --- Device functions -------------------------------------------------------------------------------------------------


@triton.jit
def tile_place(rows, columns, height, width, CHANNELS_LAST: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """This program's first row and column, and of its elements, broadcastable: row, column, plane, line and place, and
    which are inside.

    A plane is a sample where channels are last, else a sample's channel.
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
        offset += (first % width).to(tl.int32)
        first = first // width
        place = offset % width
        offset = offset // width
    else:
        place = column
    offset += (first % height).to(tl.int32)
    plane = first // height + offset // height
    return first_row, first_column, row, column, plane, offset % height, place, inside


@triton.jit
def update_maximum(x, window_position, inside, best, pre_activation, position, a, b, ACTIVATION: tl.constexpr):
    """The maximum with the elements at ``window_position``: its value, what that was before the activation, and its
    position.
    """
    value = ACTIVATION.forward(x, a, b)
    wins = inside & ((value > best) | (value != value) | (position < 0))
    return tl.where(wins, value, best), tl.where(wins, x, pre_activation), tl.where(wins, window_position, position)


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
def load_gradient(
    g_pointer,
    code_pointer,
    saved_pointer,
    plane,
    line,
    place,
    column,
    columns,
    height,
    width,
    inside,
    a,
    b,
    ACTIVATION: tl.constexpr,
    KEPT: tl.constexpr,
    BITS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Of the windows at these lines and places of pooled images: the position of the maximum, and its gradient."""
    inside = inside & (line >= 0) & (line < height) & (place >= 0) & (place < width)
    row = plane * height + line
    if CHANNELS_LAST:
        row = row * width + place
    else:
        column = place
        columns = width
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


class Window(NamedTuple):
    """The windows of a pooling layer; each pair is (along the height, along the width)."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    ceil_mode: bool = False

    @property
    def positions(self) -> int:
        return self.kernel[0] * self.kernel[1]

    def pooled(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the pooled images.  May be symbolic."""
        return self._pooled(0, height), self._pooled(1, width)

    def _pooled(self, axis: int, size: int) -> int:
        stride, padding = self.stride[axis], self.padding[axis]
        covered = size + 2 * padding - self.dilation[axis] * (self.kernel[axis] - 1) - 1
        windows = (covered + (stride - 1 if self.ceil_mode else 0)) // stride + 1
        # The last window must begin inside the image, or in the padding before it.
        return windows - 1 if self.ceil_mode and (windows - 1) * stride >= size + padding else windows

    @property
    def fixed(self) -> tuple[int, int]:
        """Kernel and stride where kernels are compiled for them, else (0, 0)."""
        (kernel, other), (stride, _) = self.kernel, self.stride
        square = kernel == other and self.stride == (stride, stride) and self.dilation == (1, 1)
        # Pairs are loaded side by side, which padding would push out of line.
        fits = square and (kernel, stride) in FIXED_WINDOWS and (kernel == 3 or self.padding == (0, 0))
        return (kernel, stride) if fits else (0, 0)

    @property
    def arguments(self) -> tuple[int, ...]:
        return (*self.kernel, *self.stride, *self.padding, *self.dilation)


#: Kernel and stride of the windows that kernels are compiled for.
FIXED_WINDOWS = ((1, 1), (2, 2), (3, 2))

#: What is kept for the gradient of an activation.
Kept = Literal["nothing", "mask", "output", "input"]

#: Windows of one position: no pooling.
POINT = Window((1, 1), (1, 1))


def most_positions(masked: bool) -> int:
    """The largest window whose code fits into a byte; ``masked`` where a bit of it is the activation's."""
    return 128 if masked else 256


def code_bits(window: Window, masked: bool) -> int:
    """Bits of a window's code."""
    if not any(window.fixed):
        return 8
    needed = (window.positions - 1).bit_length() + masked
    return next(bits for bits in (0, 1, 2, 4, 8) if bits >= needed)


class Pooled(NamedTuple):
    """What a forward pass leaves; what it wasn't asked for is empty."""

    y: Tensor
    code: Tensor
    pre_activation: Tensor
    indices: Tensor


def images(x: Tensor) -> tuple[Tensor, bool]:
    """``x`` (N, C, H, W) in one of the memory formats, itself or a copy, and whether that is channels-last."""
    x = dense(x)
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    # No copy is asked for where none is made: torch 2.11's compiler takes what comes back for another tensor.
    return (x if channels_last or x.is_contiguous() else x.contiguous()), channels_last


def kept_beside_code(row: Activation, fixed: tuple[int, int]) -> Kept:
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
    samples, channels, height, width = shape
    pooled_shape = (samples, channels, *window.pooled(height, width))
    if y is None:
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        y = torch.empty(pooled_shape, dtype=like.dtype, device=like.device, memory_format=memory_format)
    kept = kept_beside_code(activation.row, window.fixed) if keeps else "nothing"
    bits = code_bits(window, kept == "mask")
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
    samples, channels, height, width = shape
    return (samples * height * width, channels) if channels_last else (samples * channels * height, width)


def point_codes(code: Tensor, shape: tuple[int, ...], channels_last: bool, window: Window) -> Tensor:
    """The activation's bits in the codes of pooled images of this ``shape``, as codes of windows of one position."""
    if (bits := code_bits(window, True)) == 1:
        return code
    rows, columns = image_matrix(shape, channels_last)
    shifts = torch.arange(0, 8, bits, device=code.device)
    passes = (code.view(rows, -1, 1) >> shifts + (bits - 1) & 1).flatten(1)[:, :columns]
    passes = torch.constant_pad_nd(passes, (0, -columns % 8)).view(rows, -1, 8)
    return (passes << torch.arange(8, device=code.device)).sum(2).to(torch.uint8).flatten()


def winner_indices(
    code: Tensor, shape: tuple[int, ...], size: tuple[int, int], channels_last: bool, window: Window, *, masked: bool
) -> Tensor:
    """Indices in the planes of images of this ``size``, from the codes of pooled images of this ``shape``."""
    samples, channels, pooled_height, pooled_width = shape
    rows, columns = image_matrix(shape, channels_last)
    if bits := code_bits(window, masked):
        shifts = torch.arange(0, 8, bits, device=code.device)
        position = (code.view(rows, -1, 1) >> shifts & 2 ** (bits - masked) - 1).flatten(1)[:, :columns]
    else:
        position = torch.zeros((rows, columns), dtype=torch.int64, device=code.device)
    if channels_last:
        position = position.view(samples, pooled_height, pooled_width, channels).permute(0, 3, 1, 2)
    else:
        position = position.reshape(shape)
    top, left = (
        torch.arange(pooled, device=code.device) * stride - padding
        for pooled, stride, padding in zip(shape[2:], window.stride, window.padding, strict=True)
    )
    line = top[:, None] + position // window.kernel[1] * window.dilation[0]
    place = left + position % window.kernel[1] * window.dilation[1]
    indices: Tensor = line * size[1] + place
    return indices
