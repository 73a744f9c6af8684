"""Max pooling, and in the same pass the bias and the activation of the convolution before it.

`pool_window` has the windows, how images lie in tiles, and the code of a window, which is all that the backward pass
needs besides the gradient.

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
from typing import Any

import torch
from torch import Tensor

from .base._triton import tl, triton
from .base.channels import ChannelMatrix, sums_tile
from .base.launch import ACCUMULATOR, COMPUTE, DTYPES, TRITON_TYPE, Configuration, configure, kernel, launch, ships
from .base.layout import dense_like
from .base.numerics import narrow, scalar, widen
from .base.tiles import aligned, cdiv, store
from .functions.activation import ACTIVATIONS, IDENTITY, Activated, Activation
from .pool_window import (
    FIXED_WINDOWS,
    Pooled,
    Window,
    code_bits,
    image_matrix,
    images,
    kept_beside_code,
    load_gradient,
    pooled_like,
    store_codes,
    tile_place,
    update_maximum,
)

__all__ = ["pool_backward", "pool_forward"]

_HEIGHT, _WIDTH = 32, 32
_THREADS = 128

# --- Device functions -------------------------------------------------------------------------------------------------


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


# --- Kernels ----------------------------------------------------------------------------------------------------------


@kernel
def pool_forward_kernel(
    x_pointer,  # images
    residual_pointer,  # added to them, like ``x``, or None
    mean_pointer,  # of each channel, or None: with ``scale``, (x - mean) scale takes the place of x
    scale_pointer,
    bias_pointer,  # of each channel, or None
    y_pointer,  # pooled images; may be the images themselves where KERNEL is 1
    code_pointer,  # packed codes; not written unless wants_code
    pre_activation_pointer,  # the maxima before the activation, like ``y``, or None
    index_pointer,  # the maxima's place in the plane, like ``y``; not written unless wants_indices
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
    wants_code: tl.int32,
    wants_indices: tl.int32,
    a: tl.float64,
    b: tl.float64,
    ACTIVATION: tl.constexpr,
    KERNEL: tl.constexpr,  # size of the window, or 0: known at run time
    BITS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    COMPUTE: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    ALIGN: tl.constexpr,
):
    columns = aligned(columns, ALIGN)
    if not CHANNELS_LAST:
        width = aligned(width, ALIGN)
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
    pre_activation = best
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
            best, pre_activation, position = update_maximum(
                first, 2 * tap_line, within, best, pre_activation, position, a, b, ACTIVATION
            )
            within = within & (left + 1 < width)
            best, pre_activation, position = update_maximum(
                second, 2 * tap_line + 1, within, best, pre_activation, position, a, b, ACTIVATION
            )
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
                best, pre_activation, position = update_maximum(
                    x, tap, within, best, pre_activation, position, a, b, ACTIVATION
                )
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
                best, pre_activation, position = update_maximum(
                    x, tap, within, best, pre_activation, position, a, b, ACTIVATION
                )

    offset = row * columns + column
    tl.store(y_pointer + offset, narrow(best, y_pointer.dtype.element_ty), mask=inside)
    if pre_activation_pointer is not None:
        tl.store(
            pre_activation_pointer + offset,
            narrow(pre_activation, pre_activation_pointer.dtype.element_ty),
            mask=inside,
        )
    if BITS:  # noqa: SIM102 (a constant)
        if wants_code:
            code = position
            if ACTIVATION.saves == "mask":
                code += ACTIVATION.mask(pre_activation, a, b).to(tl.int32) << (BITS - 1)
            code = tl.where(inside, code, 0)
            store_codes(code_pointer, code, row, first_column, rows, columns, BITS, HEIGHT, WIDTH)
    if wants_indices:
        winner_line = top + position // kernel_width * dilation_height
        winner_place = left + position % kernel_width * dilation_width
        tl.store(index_pointer + offset, winner_line.to(tl.int64) * width + winner_place, mask=inside)


@kernel
def pool_backward_cells_kernel(
    g_pointer,  # gradient of the pooled images
    code_pointer,  # packed codes
    saved_pointer,  # what is kept beside the code, like ``g``; or None
    dx_pointer,  # gradient of the images
    partial_pointer,  # partial sums of the bias's gradient, see `ChannelMatrix`, or None
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
    ALIGN: tl.constexpr,
):
    columns = aligned(columns, ALIGN)
    if not CHANNELS_LAST:
        width = aligned(width, ALIGN)
        pooled_width = aligned(pooled_width, ALIGN)
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
        sums = sums_tile(
            *(first_row // HEIGHT, first_column // WIDTH, rows, columns, tl.cdiv(columns, WIDTH)),
            *(not CHANNELS_LAST, HEIGHT, WIDTH),
        )
        store(partial_pointer, sums, tl.sum(total, axis=0 if CHANNELS_LAST else 1))


@kernel
def pool_backward_kernel(
    g_pointer,  # gradient of the pooled images
    code_pointer,  # packed codes
    saved_pointer,  # what is kept beside the code, like ``g``; or None
    dx_pointer,  # gradient of the images
    partial_pointer,  # partial sums of the bias's gradient, see `ChannelMatrix`, or None
    rows: tl.int64,
    columns,
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
    a: tl.float64,
    b: tl.float64,
    ACTIVATION: tl.constexpr,
    KEPT: tl.constexpr,  # `kept_beside_code`
    BITS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    COMPUTE: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    ALIGN: tl.constexpr,
):
    columns = aligned(columns, ALIGN)
    if not CHANNELS_LAST:
        width = aligned(width, ALIGN)
        pooled_width = aligned(pooled_width, ALIGN)
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
        begins = (top >= 0) & (left >= 0) & (top % stride_height == 0) & (left % stride_width == 0)
        position, g = load_gradient(
            *(g_pointer, code_pointer, saved_pointer, plane, top // stride_height, left // stride_width),
            *(column, columns, pooled_height, pooled_width, inside & begins, a, b),
            *(ACTIVATION, KEPT, BITS, CHANNELS_LAST, COMPUTE),
        )
        dx += tl.where(position == tap, g, 0.0)
    tl.store(dx_pointer + row * columns + column, narrow(dx, dx_pointer.dtype.element_ty), mask=inside)
    if partial_pointer is not None:
        sums = sums_tile(
            *(first_row // HEIGHT, first_column // WIDTH, rows, columns, tl.cdiv(columns, WIDTH)),
            *(not CHANNELS_LAST, HEIGHT, WIDTH),
        )
        store(partial_pointer, sums, tl.sum(dx, axis=0 if CHANNELS_LAST else 1))


# --- Configurations ---------------------------------------------------------------------------------------------------


@cache
def _configuration(
    direction: str,
    dtype: torch.dtype,
    row: Activation,
    fixed: tuple[int, int],
    channels_last: bool,
    biased: bool,
    keeps_pre_activation: bool,
    normalises: bool = False,
    residual: bool = False,
) -> Configuration:
    """``biased``: a bias is added, or its gradient is summed."""
    kept = kept_beside_code(row, fixed)
    kernel, stride = fixed
    statistic = ACCUMULATOR[dtype]
    # Along a line, larger windows are met in strides.
    contiguous = channels_last or kernel in (1, 2)
    wide = _HEIGHT * _WIDTH * dtype.itemsize // 16 // _THREADS
    constants: dict[str, Any] = {"ACTIVATION": row}
    if direction == "forward":
        function = pool_forward_kernel
        wide_loads, wide_stores = max(kernel * kernel, 1) if contiguous else 0, 1
        constants |= {"KERNEL": kernel}
        present = {"residual": residual, "mean": normalises, "scale": normalises, "bias": biased}
        present |= {"pre_activation": keeps_pre_activation}
    else:
        constants |= {"KEPT": kept}
        present = {"saved": kept in ("output", "input"), "partial": biased}
        if kernel:
            function = pool_backward_cells_kernel
            reach = cdiv(kernel, stride)
            wide_loads, wide_stores = (reach * reach, stride * stride) if contiguous else (0, 0)
            constants |= {"KERNEL": kernel, "STRIDE": stride}
        else:
            function = pool_backward_kernel
            wide_loads, wide_stores = 1 if contiguous else 0, 1
    parts = (
        f"pool {direction}",
        f"{kernel}x{kernel}" if kernel else "any",
        "channels last" if channels_last else "contiguous",
        biased and "+ bias",
        normalises and "normalised",
        residual and "+ residual",
        row.label,
        TRITON_TYPE[dtype],
    )
    return configure(
        function,
        " ".join(part for part in parts if part),
        dtype,
        {
            **{f"{name}_pointer": None for name, there in present.items() if not there},
            **constants,
            "BITS": _bits_of(fixed, kept == "mask"),
            "CHANNELS_LAST": channels_last,
            "COMPUTE": COMPUTE[dtype],
            "HEIGHT": _HEIGHT,
            "WIDTH": _WIDTH,
        },
        pointers={
            "code": torch.uint8,
            "index": torch.int64,
            "partial": statistic,
            "mean": statistic,
            "scale": statistic,
            "bias": statistic if normalises else dtype,
        },
        threads=_THREADS,
        aligned=("columns",) if channels_last else ("columns", "width", "pooled_width"),
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
        for fixed, dtype in product(FIXED_WINDOWS[1:], DTYPES):
            pooling = _configuration(direction, dtype, identity, fixed, channels_last, False, False)
            yield replace(pooling, rare=dtype is torch.float16)
        for dtype in _COMMON_DTYPES:
            yield _configuration(direction, dtype, identity, (0, 0), channels_last, False, False)
        # Behind a convolution.
        for fixed, dtype in zip((*FIXED_WINDOWS, (0, 0)), (*_COMMON_DTYPES, *_COMMON_DTYPES), strict=True):
            yield _configuration(direction, dtype, relu, fixed, channels_last, True, False)
    for direction, row in product(("forward", "backward"), ACTIVATIONS.values()):
        if row is not relu:
            keeps_pre_activation = direction == "forward" and kept_beside_code(row, (2, 2)) == "input"
            pass_ = _configuration(direction, torch.float32, row, (2, 2), True, True, keeps_pre_activation)
            yield replace(pass_, rare=row.name not in _COMMON_ACTIVATIONS)
    # Behind a batch norm.
    for (fixed, dtype), residual in product(zip(FIXED_WINDOWS[1:], _COMMON_DTYPES, strict=True), (False, True)):
        yield _configuration("forward", dtype, relu, fixed, True, True, False, True, residual)


# --- Launchers --------------------------------------------------------------------------------------------------------


def _matrix(shape: tuple[int, ...], channels_last: bool) -> ChannelMatrix:
    """Of images of this shape, which aren't empty."""
    rows, columns = image_matrix(shape, channels_last)
    return ChannelMatrix(
        not channels_last, rows, columns, shape[1], _HEIGHT, _WIDTH, run=1 if channels_last else shape[2]
    )


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
    matrix = _matrix(results.y.shape, channels_last)
    pooled_height, pooled_width = results.y.shape[2:]
    keeps_pre_activation = keeps and kept_beside_code(activation.row, window.fixed) == "input"
    launch(
        _configuration(
            *("forward", x.dtype, activation.row, window.fixed, channels_last, bias is not None, keeps_pre_activation),
            normalises=mean is not None,
            residual=residual is not None,
        ),
        matrix.programs,
        *(tensor for tensor in (x, residual, mean, scale, bias, results.y, results.code) if tensor is not None),
        *((results.pre_activation,) if keeps_pre_activation else ()),
        *(
            results.indices,
            matrix.rows,
            matrix.columns,
            channels,
            height,
            width,
            pooled_height,
            pooled_width,
            *window.arguments,
        ),
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
    """Gradient of images of this ``size`` (height, width), and that of the bias, not rounded: empty unless asked for.

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
        matrix = _matrix((samples, channels, *cells), channels_last)
        extents = (*size, *cells, pooled_height, pooled_width, *window.padding)
    else:
        matrix = _matrix(shape, channels_last)
        extents = (*size, pooled_height, pooled_width, *window.arguments)
    partial = torch.empty(matrix.partial_shape, dtype=ACCUMULATOR[g.dtype], device=g.device) if sums_bias else None
    launch(
        _configuration("backward", g.dtype, activation.row, window.fixed, channels_last, sums_bias, False),
        matrix.programs,
        *(tensor for tensor in (g, code, saved, dx, partial) if tensor is not None),
        *(matrix.rows, matrix.columns, *extents, activation.a, activation.b),
    )
    return dx, g.new_empty(0) if partial is None else matrix.totals(partial)
