"""Max pooling, and in the same pass the bias and the activation of the convolution before it.

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

**Backward** is a gather, so it needs no atomics: each element adds the gradients of the windows that it won.  Windows
of a fixed size and stride cut the image into cells of stride x stride elements, and a cell sees the same few windows
wherever it lies; a program reads these once, and writes the cells.  Other windows are looked for element by element.
The bias's gradient is summed on the way: a program writes the sums over its tile, and PyTorch's ``sum`` adds them in a
fixed order.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ._triton import tl, triton
from .functions.activation import ACTIVATIONS, IDENTITY, Activated, Activation, gradient_from_input
from .launch import ACCUMULATOR, COMPUTE, DTYPES, TRITON_TYPE, Configuration, kernel, launch, ships
from .layout import dense, dense_like
from .numerics import narrow, scalar, widen
from .tiles import cdiv

__all__ = [
    "LARGEST_EXTENT",
    "POINT",
    "Pooled",
    "Window",
    "code_bits",
    "contend",
    "images",
    "kept_beside_code",
    "most_positions",
    "pool_backward",
    "pool_forward",
    "pooled_like",
    "store_codes",
    "tile_place",
    "winner_indices",
]

#: Elements along a line or a column of an image that 32 bits can count in, inside a tile and its windows.
LARGEST_EXTENT = 2**30

_HEIGHT, _WIDTH = 32, 32
_THREADS = 128

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
def place_images(plane, column, columns, height, width, CHANNELS_LAST: tl.constexpr):
    """Where a plane of images of this height and width begins, and the distance of neighbouring places."""
    start = plane * height * width
    distance = 1
    if CHANNELS_LAST:
        start = start * columns + column
        distance = columns
    return start, distance


@triton.jit
def load_inputs(
    x_pointer, residual_pointer, offset, inside, mean, scale, bias, NORMALISES: tl.constexpr, COMPUTE: tl.constexpr
):
    """What the activation is applied to: elements of the images, normalised, with bias and residual."""
    x = widen(tl.load(x_pointer + offset, mask=inside, other=0), COMPUTE)
    if NORMALISES:
        x = (x - mean) * scale
    x += bias
    if residual_pointer is not None:
        x += widen(tl.load(residual_pointer + offset, mask=inside, other=0), COMPUTE)
    return x


@triton.jit
def contend(x, tap, inside, best, raw, position, a, b, ACTIVATION: tl.constexpr):
    """Let the elements at position ``tap`` contend for the maximum: its value, what that was before the activation, and
    its position.
    """
    value = ACTIVATION.forward(x, a, b)
    wins = inside & ((value > best) | (value != value) | (position < 0))
    return tl.where(wins, value, best), tl.where(wins, x, raw), tl.where(wins, tap, position)


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


@triton.jit
def store_sums(
    partial_pointer,
    total,
    first_row,
    first_column,
    rows,
    columns,
    CHANNELS_LAST: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Store the sums of a tile for each of its columns where these are channels, else for each of its rows."""
    if CHANNELS_LAST:
        column = first_column + tl.arange(0, WIDTH)
        sums = partial_pointer + first_row // HEIGHT * columns + column
        tl.store(sums, tl.sum(total, axis=0), mask=column < columns)
    else:
        row = first_row + tl.arange(0, HEIGHT)
        sums = partial_pointer + row * tl.cdiv(columns, WIDTH) + first_column // WIDTH
        tl.store(sums, tl.sum(total, axis=1), mask=row < rows)


# --- Kernels ----------------------------------------------------------------------------------------------------------

_WINDOW = ["kernel_height", "kernel_width", "stride_height", "stride_width"]
_WINDOW += ["padding_height", "padding_width", "dilation_height", "dilation_width"]


@kernel
def pool_forward_kernel(
    x_pointer,  # images
    residual_pointer,  # added to them, like ``x``, or None
    mean_pointer,  # of each channel, or None: with ``scale``, (x - mean) scale takes the place of x
    scale_pointer,
    bias_pointer,  # of each channel, or None
    y_pointer,  # pooled images; may be the images themselves where KERNEL is 1
    code_pointer,  # packed codes; not written unless keeps_code
    raw_pointer,  # the maxima before the activation, like ``y``, or None
    index_pointer,  # the maxima's place in the plane, like ``y``; not written unless emits_indices
    rows: tl.int64,
    columns,
    channels: tl.int32,
    height: tl.int32,
    width,
    pooled_height: tl.int32,
    pooled_width,
    kernel_height: tl.int32,
    kernel_width: tl.int32,
    stride_height: tl.int32,
    stride_width: tl.int32,
    padding_height: tl.int32,
    padding_width: tl.int32,
    dilation_height: tl.int32,
    dilation_width: tl.int32,
    keeps_code: tl.int32,
    emits_indices: tl.int32,
    a: tl.float64,
    b: tl.float64,
    ACTIVATION: tl.constexpr,
    KERNEL: tl.constexpr,  # size of the window, or 0: known at run time
    BITS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    COMPUTE: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    _, first_column, row, column, plane, line, place, inside = tile_place(
        rows, columns, pooled_height, pooled_width, CHANNELS_LAST, HEIGHT, WIDTH
    )
    a = scalar(a, COMPUTE)
    b = scalar(b, COMPUTE)
    if CHANNELS_LAST:
        channel = column
    else:
        channel = plane % channels
    mean = scalar(0.0, COMPUTE)
    scale = mean
    bias = mean
    if mean_pointer is not None:
        mean = tl.load(mean_pointer + channel, mask=channel < channels, other=0).to(COMPUTE)
        scale = tl.load(scale_pointer + channel, mask=channel < channels, other=0).to(COMPUTE)
    if bias_pointer is not None:
        bias = widen(tl.load(bias_pointer + channel, mask=channel < channels, other=0), COMPUTE)
    top, left = line, place
    if KERNEL != 1:
        top = line * stride_height - padding_height
        left = place * stride_width - padding_width
    start, distance = place_images(plane, column, columns, height, width, CHANNELS_LAST)
    best = tl.full((HEIGHT, WIDTH), float("-inf"), COMPUTE)
    raw = best
    position = tl.full((HEIGHT, WIDTH), -1, tl.int32)
    if KERNEL == 2 and not CHANNELS_LAST:
        # No padding, and windows side by side: two rows of them are loaded as they lie, and split.
        pair = first_column * 2 + tl.arange(0, 2 * WIDTH)[None, :]
        for tap_line in tl.static_range(2):
            line_inside = (row < rows) & (top + tap_line < height)
            offset = (top + tap_line).to(tl.int64) * width + pair
            x = load_inputs(
                *(x_pointer, residual_pointer, start + offset, line_inside & (pair < width), mean, scale, bias),
                *(mean_pointer is not None, COMPUTE),
            )
            first, second = tl.split(tl.reshape(x, (HEIGHT, WIDTH, 2)))
            within = inside & line_inside
            best, raw, position = contend(first, 2 * tap_line, within, best, raw, position, a, b, ACTIVATION)
            within = within & (left + 1 < width)
            best, raw, position = contend(second, 2 * tap_line + 1, within, best, raw, position, a, b, ACTIVATION)
    else:
        if KERNEL:
            taps: tl.constexpr = KERNEL * KERNEL
            for tap in tl.static_range(taps):
                tap_line = top + tap // KERNEL
                tap_place = left + tap % KERNEL
                within = inside & (tap_line >= 0) & (tap_line < height) & (tap_place >= 0) & (tap_place < width)
                offset = (tap_line.to(tl.int64) * width + tap_place) * distance
                x = load_inputs(
                    *(x_pointer, residual_pointer, start + offset, within, mean, scale, bias),
                    *(mean_pointer is not None, COMPUTE),
                )
                best, raw, position = contend(x, tap, within, best, raw, position, a, b, ACTIVATION)
        else:
            for tap in range(kernel_height * kernel_width):
                tap_line = top + tap // kernel_width * dilation_height
                tap_place = left + tap % kernel_width * dilation_width
                within = inside & (tap_line >= 0) & (tap_line < height) & (tap_place >= 0) & (tap_place < width)
                offset = (tap_line.to(tl.int64) * width + tap_place) * distance
                x = load_inputs(
                    *(x_pointer, residual_pointer, start + offset, within, mean, scale, bias),
                    *(mean_pointer is not None, COMPUTE),
                )
                best, raw, position = contend(x, tap, within, best, raw, position, a, b, ACTIVATION)

    offset = row * columns + column
    tl.store(y_pointer + offset, narrow(best, y_pointer.dtype.element_ty), mask=inside)
    if raw_pointer is not None:
        tl.store(raw_pointer + offset, narrow(raw, raw_pointer.dtype.element_ty), mask=inside)
    if BITS:  # noqa: SIM102 (a constant)
        if keeps_code:
            code = position
            if ACTIVATION.saves == "mask":
                code += ACTIVATION.mask(raw, a, b).to(tl.int32) << (BITS - 1)
            code = tl.where(inside, code, 0)
            store_codes(code_pointer, code, row, first_column, rows, columns, BITS, HEIGHT, WIDTH)
    if emits_indices:
        winner_line = top + position // kernel_width * dilation_height
        winner_place = left + position % kernel_width * dilation_width
        tl.store(index_pointer + offset, winner_line.to(tl.int64) * width + winner_place, mask=inside)


@kernel
def pool_backward_cells_kernel(
    g_pointer,  # gradient of the pooled images
    code_pointer,  # packed codes
    saved_pointer,  # what is kept beside the code, like ``g``; or None
    dx_pointer,  # gradient of the images
    partial_pointer,  # partial sums of the bias's gradient, see `_partial_shape`, or None
    rows: tl.int64,  # of cells
    columns,
    height: tl.int32,
    width,
    cells_height: tl.int32,
    cells_width: tl.int32,
    pooled_height: tl.int32,
    pooled_width,
    padding_height: tl.int32,
    padding_width: tl.int32,
    a: tl.float64,
    b: tl.float64,
    ACTIVATION: tl.constexpr,
    KEPT: tl.constexpr,  # `kept_beside_code`
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    BITS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    COMPUTE: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    first_row, first_column, row, column, plane, line, place, inside = tile_place(
        rows, columns, cells_height, cells_width, CHANNELS_LAST, HEIGHT, WIDTH
    )
    a = scalar(a, COMPUTE)
    b = scalar(b, COMPUTE)

    # Element (y, x) of cell (i, j) is position (y + STRIDE q, x + STRIDE r) of window (i - q, j - r).
    cell = ()
    for _ in tl.static_range(STRIDE * STRIDE):
        cell += (tl.zeros((HEIGHT, WIDTH), COMPUTE),)  # type: ignore[assignment]
    reach: tl.constexpr = (KERNEL + STRIDE - 1) // STRIDE
    for q in tl.static_range(reach):
        for r in tl.static_range(reach):
            position, g = load_gradient(
                *(g_pointer, code_pointer, saved_pointer, plane, line - q, place - r, column, columns),
                *(pooled_height, pooled_width, inside, a, b, ACTIVATION, KEPT, BITS, CHANNELS_LAST, COMPUTE),
            )
            sums = ()
            for y in tl.static_range(STRIDE):
                for x in tl.static_range(STRIDE):
                    dx = cell[y * STRIDE + x]  # type: ignore[var-annotated]
                    if y + STRIDE * q < KERNEL and x + STRIDE * r < KERNEL:
                        dx += tl.where(position == (y + STRIDE * q) * KERNEL + x + STRIDE * r, g, 0.0)
                    sums += (dx,)  # type: ignore[assignment]
            cell = sums

    start, distance = place_images(plane, column, columns, height, width, CHANNELS_LAST)
    total = tl.zeros((HEIGHT, WIDTH), COMPUTE)
    for y in tl.static_range(STRIDE):
        image_line = line * STRIDE + y
        if KERNEL == 3:  # the smaller windows have no padding
            image_line -= padding_height
        line_inside = (row < rows) & (image_line >= 0) & (image_line < height)
        if CHANNELS_LAST or STRIDE == 1:
            for x in tl.static_range(STRIDE):
                dx = cell[y * STRIDE + x]
                image_place = place * STRIDE + x
                if KERNEL == 3:
                    image_place -= padding_width
                within = inside & line_inside & (image_place >= 0) & (image_place < width)
                offset = (image_line.to(tl.int64) * width + image_place) * distance
                tl.store(dx_pointer + start + offset, narrow(dx, dx_pointer.dtype.element_ty), mask=within)
                total += dx
        else:
            # Neighbouring places are put side by side, and stored as they lie.
            dx = tl.reshape(tl.join(cell[y * STRIDE], cell[y * STRIDE + 1]), (HEIGHT, 2 * WIDTH))
            image_place = first_column * 2 + tl.arange(0, 2 * WIDTH)[None, :]
            if KERNEL == 3:
                image_place -= padding_width
            within = line_inside & (image_place >= 0) & (image_place < width)
            offset = image_line.to(tl.int64) * width + image_place
            tl.store(dx_pointer + start + offset, narrow(dx, dx_pointer.dtype.element_ty), mask=within)
            total += cell[y * STRIDE] + cell[y * STRIDE + 1]
    if partial_pointer is not None:
        store_sums(partial_pointer, total, first_row, first_column, rows, columns, CHANNELS_LAST, HEIGHT, WIDTH)


@kernel
def pool_backward_kernel(
    g_pointer,  # gradient of the pooled images
    code_pointer,  # packed codes
    saved_pointer,  # what is kept beside the code, like ``g``; or None
    dx_pointer,  # gradient of the images
    partial_pointer,  # partial sums of the bias's gradient, see `_partial_shape`, or None
    rows: tl.int64,
    columns,
    height: tl.int32,
    width,
    pooled_height: tl.int32,
    pooled_width: tl.int32,
    kernel_height: tl.int32,
    kernel_width: tl.int32,
    stride_height: tl.int32,
    stride_width: tl.int32,
    padding_height: tl.int32,
    padding_width: tl.int32,
    dilation_height: tl.int32,
    dilation_width: tl.int32,
    a: tl.float64,
    b: tl.float64,
    ACTIVATION: tl.constexpr,
    KEPT: tl.constexpr,  # `kept_beside_code`
    BITS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    COMPUTE: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    first_row, first_column, row, column, plane, line, place, inside = tile_place(
        rows, columns, height, width, CHANNELS_LAST, HEIGHT, WIDTH
    )
    a = scalar(a, COMPUTE)
    b = scalar(b, COMPUTE)

    dx = tl.zeros((HEIGHT, WIDTH), COMPUTE)
    for tap in range(kernel_height * kernel_width):
        # The window in which the element has this position, if there is one.
        top = line + padding_height - tap // kernel_width * dilation_height
        left = place + padding_width - tap % kernel_width * dilation_width
        aligned = (top >= 0) & (left >= 0) & (top % stride_height == 0) & (left % stride_width == 0)
        position, g = load_gradient(
            *(g_pointer, code_pointer, saved_pointer, plane, top // stride_height, left // stride_width),
            *(column, columns, pooled_height, pooled_width, inside & aligned, a, b),
            *(ACTIVATION, KEPT, BITS, CHANNELS_LAST, COMPUTE),
        )
        dx += tl.where(position == tap, g, 0.0)
    tl.store(dx_pointer + row * columns + column, narrow(dx, dx_pointer.dtype.element_ty), mask=inside)
    if partial_pointer is not None:
        store_sums(partial_pointer, dx, first_row, first_column, rows, columns, CHANNELS_LAST, HEIGHT, WIDTH)


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
        fits = square and (kernel, stride) in _FIXED and (kernel == 3 or self.padding == (0, 0))
        return (kernel, stride) if fits else (0, 0)

    @property
    def arguments(self) -> tuple[int, ...]:
        return (*self.kernel, *self.stride, *self.padding, *self.dilation)


_FIXED = ((1, 1), (2, 2), (3, 2))

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
    raw: Tensor
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
        rows, columns = _matrix(pooled_shape, channels_last)
        code_bytes = rows * ((columns * bits + 7) // 8)
    return Pooled(
        y,
        torch.empty(code_bytes, dtype=torch.uint8, device=like.device),
        torch.empty_like(y) if kept == "input" else like.new_empty(0),
        torch.empty_like(y, dtype=torch.int64) if emits_indices else like.new_empty(0, dtype=torch.int64),
    )


def _matrix(shape: tuple[int, ...], channels_last: bool) -> tuple[int, int]:
    """Rows and columns of images of this shape, see above."""
    samples, channels, height, width = shape
    return (samples * height * width, channels) if channels_last else (samples * channels * height, width)


# --- Configurations ---------------------------------------------------------------------------------------------------


@cache
def _configuration(
    direction: str,
    dtype: torch.dtype,
    row: Activation,
    fixed: tuple[int, int],
    channels_last: bool,
    biased: bool,
    keeps_raw: bool,
    normalises: bool = False,
    residual: bool = False,
) -> Configuration:
    """``biased``: a bias is added, or its gradient is summed."""
    element, accumulator = "*" + TRITON_TYPE[dtype], "*" + TRITON_TYPE[ACCUMULATOR[dtype]]
    kept = kept_beside_code(row, fixed)
    kernel, stride = fixed
    pointers: dict[str, str | None]
    constants: tuple[tuple[str, Any], ...]
    extents: tuple[str, ...]
    # Along a line, larger windows are met in strides.
    aligned = channels_last or kernel in (1, 2)
    wide = _HEIGHT * _WIDTH * dtype.itemsize // 16 // _THREADS
    if direction == "forward":
        function = pool_forward_kernel
        wide_loads, wide_stores = max(kernel * kernel, 1) if aligned else 0, 1
        pointers = {
            "x_pointer": element,
            "residual_pointer": element if residual else None,
            "mean_pointer": accumulator if normalises else None,
            "scale_pointer": accumulator if normalises else None,
            "bias_pointer": accumulator if normalises else element if biased else None,
            "y_pointer": element,
            "code_pointer": "*u8",
            "raw_pointer": element if keeps_raw else None,
            "index_pointer": "*i64",
        }
        extents = ("columns", "channels", "height", "width", "pooled_height", "pooled_width")
        extents += (*_WINDOW, "keeps_code", "emits_indices")
        constants = (("ACTIVATION", row), ("KERNEL", kernel))
    else:
        pointers = {
            "g_pointer": element,
            "code_pointer": "*u8",
            "saved_pointer": element if kept in ("output", "input") else None,
            "dx_pointer": element,
            "partial_pointer": accumulator if biased else None,
        }
        constants = (("ACTIVATION", row), ("KEPT", kept))
        if kernel:
            function = pool_backward_cells_kernel
            reach = cdiv(kernel, stride)
            wide_loads, wide_stores = (reach * reach, stride * stride) if aligned else (0, 0)
            extents = ("columns", "height", "width", "cells_height", "cells_width", "pooled_height", "pooled_width")
            extents += ("padding_height", "padding_width")
            constants += (("KERNEL", kernel), ("STRIDE", stride))
        else:
            function = pool_backward_kernel
            wide_loads, wide_stores = 1 if aligned else 0, 1
            extents = ("columns", "height", "width", "pooled_height", "pooled_width", *_WINDOW)
    divisible = ("columns",) if channels_last else ("columns", "width", "pooled_width")
    window = f"{kernel}x{kernel}" if kernel else "any"
    memory = "channels last" if channels_last else "contiguous"
    return Configuration(
        label=" ".join(
            part
            for part in (
                f"pool {direction} {window} {memory}",
                biased and "+ bias",
                normalises and "normalised",
                residual and "+ residual",
                row.label,
                TRITON_TYPE[dtype],
            )
            if part
        ),
        kernel=function,
        signature=(
            *((name, kind) for name, kind in pointers.items() if kind),
            ("rows", "i64"),
            *((name, "i32") for name in extents),
            ("a", "fp64"),
            ("b", "fp64"),
        ),
        constants=(
            *((name, None) for name, kind in pointers.items() if not kind),
            *constants,
            ("BITS", _bits_of(fixed, kept == "mask")),
            ("CHANNELS_LAST", channels_last),
            ("COMPUTE", COMPUTE[dtype]),
            ("HEIGHT", _HEIGHT),
            ("WIDTH", _WIDTH),
        ),
        threads=_THREADS,
        divisible=tuple(name for name in divisible if name in extents),
        wide_loads=wide * wide_loads,
        wide_stores=wide * wide_stores,
    )


def _bits_of(fixed: tuple[int, int], masked: bool) -> int:
    kernel, stride = fixed
    return code_bits(Window((kernel or 4, kernel or 4), (stride or 4, stride or 4)), masked)


# The types that are compiled where kernels differ in nothing else, and the activations that stand for the others:
# device functions know nothing of the window around them.
_COMMON_DTYPES = (torch.bfloat16, torch.float32)
_COMMON_ACTIVATIONS = ("relu", "leaky_relu", "tanh", "gelu")


@ships("pool")
def configurations() -> Iterator[Configuration]:
    relu, identity = ACTIVATIONS["relu"], IDENTITY.row
    for direction, channels_last in product(("forward", "backward"), (True, False)):
        for fixed, dtype in product(_FIXED[1:], DTYPES):
            pooling = _configuration(direction, dtype, identity, fixed, channels_last, False, False)
            yield replace(pooling, rare=dtype is torch.float16)
        for dtype in _COMMON_DTYPES:
            yield _configuration(direction, dtype, identity, (0, 0), channels_last, False, False)
        # Behind a convolution.
        for fixed, dtype in zip((*_FIXED, (0, 0)), (*_COMMON_DTYPES, *_COMMON_DTYPES), strict=True):
            yield _configuration(direction, dtype, relu, fixed, channels_last, True, False)
    for direction, row in product(("forward", "backward"), ACTIVATIONS.values()):
        if row is not relu:
            keeps_raw = direction == "forward" and kept_beside_code(row, (2, 2)) == "input"
            pass_ = _configuration(direction, torch.float32, row, (2, 2), True, True, keeps_raw)
            yield replace(pass_, rare=row.name not in _COMMON_ACTIVATIONS)
    # Behind a batch norm.
    for (fixed, dtype), residual in product(zip(_FIXED[1:], _COMMON_DTYPES, strict=True), (False, True)):
        yield _configuration("forward", dtype, relu, fixed, True, True, False, True, residual)


# --- Launchers --------------------------------------------------------------------------------------------------------


def _programs(rows: int, columns: int) -> int:
    return cdiv(rows, _HEIGHT) * cdiv(columns, _WIDTH)


def pool_forward(
    x: Tensor,
    bias: Tensor | None,
    window: Window,
    activation: Activated = IDENTITY,
    *,
    keeps: bool,
    emits_indices: bool = False,
    inplace: bool = False,
    mean: Tensor | None = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
) -> Pooled:
    """max over windows of activation((x - mean) scale + bias + residual), and what was asked for besides.

    ``mean`` and ``scale`` go together; they and the bias are then float32, or float64 where the images are.

    ``keeps``: what the backward pass needs.  ``inplace``, for windows of one position: write over the images ``x``,
    which must be in one of the memory formats.
    """
    x, channels_last = images(x)
    if residual is not None:
        residual = dense_like(residual, x.stride())
    if bias is not None:
        bias = bias.contiguous()
    results = pooled_like(
        *(x, x.shape, channels_last, window, activation),
        keeps=keeps,
        emits_indices=emits_indices,
        y=x if inplace else None,
    )
    _, channels, height, width = x.shape
    rows, columns = _matrix(results.y.shape, channels_last)
    pooled_height, pooled_width = results.y.shape[2:]
    keeps_raw = keeps and kept_beside_code(activation.row, window.fixed) == "input"
    launch(
        _configuration(
            *("forward", x.dtype, activation.row, window.fixed, channels_last, bias is not None, keeps_raw),
            normalises=mean is not None,
            residual=residual is not None,
        ),
        _programs(rows, columns),
        *(tensor for tensor in (x, residual, mean, scale, bias, results.y, results.code) if tensor is not None),
        *((results.raw,) if keeps_raw else ()),
        *(results.indices, rows, columns, channels, height, width, pooled_height, pooled_width, *window.arguments),
        *(int(keeps), int(emits_indices), activation.a, activation.b),
    )
    return results


def pool_backward(
    g: Tensor,
    code: Tensor,
    saved: Tensor | None,
    size: tuple[int, int],
    channels_last: bool,
    window: Window,
    activation: Activated = IDENTITY,
    *,
    sums_bias: bool = False,
) -> tuple[Tensor, Tensor]:
    """Gradient of images of this ``size`` (height, width), and that of the bias: empty unless asked for.

    ``saved`` is what `kept_beside_code` names: the pooled images, the maxima before the activation, or None.
    """
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    g = g.contiguous(memory_format=memory_format)
    samples, channels, pooled_height, pooled_width = g.shape
    shape = (samples, channels, *size)
    dx = torch.empty(shape, dtype=g.dtype, device=g.device, memory_format=memory_format)
    kernel, stride = window.fixed
    if kernel:
        # Cells that cover the padding before the image, and all of the image.
        cells = [cdiv(extent + padding, stride) for extent, padding in zip(size, window.padding, strict=True)]
        rows, columns = _matrix((samples, channels, *cells), channels_last)
        extents = (*size, *cells, pooled_height, pooled_width, *window.padding)
    else:
        rows, columns = _matrix(shape, channels_last)
        extents = (*size, pooled_height, pooled_width, *window.arguments)
    accumulator = ACCUMULATOR[g.dtype]
    sums = _partial_shape(rows, columns, channels_last) if sums_bias else (0,)
    partial = torch.empty(sums, dtype=accumulator, device=g.device)
    launch(
        _configuration("backward", g.dtype, activation.row, window.fixed, channels_last, sums_bias, False),
        _programs(rows, columns),
        *(tensor for tensor in (g, code, saved, dx) if tensor is not None),
        *((partial,) if sums_bias else ()),
        *(rows, columns, *extents, activation.a, activation.b),
    )
    if not sums_bias:
        return dx, g.new_empty(0)
    db = partial.sum(0) if channels_last else partial.view(samples, channels, -1).sum((0, 2))
    return dx, db.to(g.dtype)


def winner_indices(
    code: Tensor, shape: tuple[int, ...], size: tuple[int, int], channels_last: bool, window: Window
) -> Tensor:
    """Indices in the planes of images of this ``size``, from the codes of pooled images of this ``shape``."""
    samples, channels, pooled_height, pooled_width = shape
    rows, columns = _matrix(shape, channels_last)
    if bits := code_bits(window, False):
        shifts = torch.arange(0, 8, bits, device=code.device)
        position = (code.view(rows, -1, 1) >> shifts & 2**bits - 1).flatten(1)[:, :columns]
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


def _partial_shape(rows: int, columns: int, channels_last: bool) -> tuple[int, int]:
    """A partial sum for each column of a block of rows, or for each row of a block of columns."""
    if channels_last:
        return cdiv(rows, _HEIGHT), columns
    return rows, cdiv(columns, _WIDTH)
