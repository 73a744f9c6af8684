"""Max pooling, and in the same pass what comes before it: batch norm, bias, residual and activation."""

from .base._triton import tl, triton
from .base.launch import kernel
from .base.numerics import narrow, scalar, widen
from .base.tiles import aligned
from .batch_norm import normalisation
from .pool_window import (
    covered_offset,
    divided,
    maximum_of,
    place_images,
    plane_offset,
    rank_of,
    store_codes,
    surpasses,
    tile_place,
    update_maximum,
    within,
)

__all__ = ["pool_forward_kernel"]

# --- Device functions -------------------------------------------------------------------------------------------------


@triton.jit
def load_inputs(
    x_pointer,
    residual_pointer,
    offset,
    inside,
    mean,
    scale,
    bias,
    NORMALISES: tl.constexpr,
    ROUNDS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """What the activation is applied to: elements of the images, normalised, with bias and residual, as it is kept."""
    x = widen(tl.load(x_pointer + offset, mask=inside, other=0), COMPUTE)
    if NORMALISES:
        x = (x - mean) * scale
    x += bias
    if residual_pointer is not None:
        x += widen(tl.load(residual_pointer + offset, mask=inside, other=0), COMPUTE)
    if ROUNDS:
        x = widen(narrow(x, x_pointer.dtype.element_ty), COMPUTE)
    return x


@triton.jit
def parted(x, PARTS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """The tiles (HEIGHT, WIDTH) whose columns take turns in ``x``, as of `interleaved`."""
    if PARTS == 2:
        return tl.split(tl.reshape(x, (HEIGHT, WIDTH, 2)))
    else:
        even, odd = tl.split(tl.reshape(x, (HEIGHT, 2 * WIDTH, 2)))
        first, third = tl.split(tl.reshape(even, (HEIGHT, WIDTH, 2)))
        second, fourth = tl.split(tl.reshape(odd, (HEIGHT, WIDTH, 2)))
        return first, second, third, fourth


@triton.jit
def edged(start, tap, extent, KERNEL: tl.constexpr):
    """Place ``tap`` of a window that begins at ``start``, or the image's nearest; and its number in the window."""
    if KERNEL == 1:
        return start, 0
    else:
        place = tl.minimum(start + tap, extent - 1)
        if KERNEL == 3:  # the others have no padding
            place = tl.maximum(place, 0)
        return place, place - start


# --- The kernel -------------------------------------------------------------------------------------------------------


@kernel
def pool_forward_kernel(
    x_pointer,  # images
    residual_pointer,  # added to them, like ``x``, or None
    mean_pointer,  # of each channel, or None: as of `normalisation`, which takes the place of x
    variance_pointer,
    weight_pointer,
    bias_pointer,  # of each channel, or None
    y_pointer,  # pooled images; may be the images themselves where KERNEL is 1
    code_pointer,  # packed codes; not written unless wants_code
    pre_activation_pointer,  # the maxima before the activation, like ``y``, or None
    index_pointer,  # the maxima's place in the plane, like ``y``; not written unless wants_indices
    rows: tl.int64,
    columns,
    channels: tl.int32,
    depth,  # of volumes, or None, as all that ends so
    height: tl.int32,
    width,
    pooled_depth,
    pooled_height: tl.int32,
    pooled_width,
    kernel_depth,
    kernel_height: tl.int32,
    kernel_width: tl.int32,
    stride_depth,
    stride_height: tl.int32,
    stride_width: tl.int32,
    padding_depth,
    padding_height: tl.int32,
    padding_width: tl.int32,
    dilation_depth,
    dilation_height: tl.int32,
    dilation_width: tl.int32,
    wants_code: tl.int32,
    wants_indices: tl.int32,
    eps: tl.float64,
    a: tl.float64,
    b: tl.float64,
    ACTIVATION: tl.constexpr,
    KERNEL: tl.constexpr,  # size of the window in its directions, or 0: known at run time
    DIRECTIONS: tl.constexpr,
    BITS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    COVERED: tl.constexpr,  # contiguous images are whole windows side by side
    COMPUTE: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """The maximum of each window, its code, and what else was asked for."""
    columns = aligned(columns, ALIGN)
    if COVERED:
        width = aligned(width, KERNEL * ALIGN)
    elif not CHANNELS_LAST:
        width = aligned(width, ALIGN)
    first_row, first_column, row, column, plane, level, line, place, inside = tile_place(
        rows, columns, pooled_depth, pooled_height, pooled_width, CHANNELS_LAST, HEIGHT, WIDTH
    )
    a = scalar(a, COMPUTE)
    b = scalar(b, COMPUTE)
    if CHANNELS_LAST:
        channel = column
    else:
        # Only the first plane's needs 64 bits to be divided.
        first_plane = first_row // pooled_height
        if depth is not None:
            first_plane = first_plane // pooled_depth
        channel = (first_plane % channels).to(tl.int32) + (plane - first_plane).to(tl.int32)
        _, channel = divided(channel, channels)
    mean = scalar(0.0, COMPUTE)
    scale = mean
    bias = mean
    if mean_pointer is not None:
        mean, _inverse_deviation, scale, bias = normalisation(
            mean_pointer, variance_pointer, weight_pointer, bias_pointer, channel, channels, eps, COMPUTE
        )
    elif bias_pointer is not None:
        bias = widen(tl.load(bias_pointer + channel, mask=channel < channels, other=0), COMPUTE)
    front, top, left = level, line, place
    if KERNEL != 1:
        left = place * stride_width - padding_width
        if DIRECTIONS != 1:
            top = line * stride_height - padding_height
        if depth is not None:
            front = level * stride_depth - padding_depth
    start, distance = place_images(plane, column, columns, depth, height, width, CHANNELS_LAST)
    best = tl.full((HEIGHT, WIDTH), float("-inf"), COMPUTE)
    pre_activation = best
    position = tl.full((HEIGHT, WIDTH), -1, tl.int32)
    first = position + 1  # the first position inside
    # Before an activation that is made again of what is kept: as PyTorch, whose convolution's result is rounded, does.
    adds: tl.constexpr = mean_pointer is None and (bias_pointer is not None or residual_pointer is not None)
    rounds: tl.constexpr = adds and (ACTIVATION.saves == "input" or ACTIVATION.saves == "output")
    lines: tl.constexpr = KERNEL if DIRECTIONS > 1 else 1
    levels: tl.constexpr = KERNEL if DIRECTIONS > 2 else 1
    if KERNEL:
        # What of a window lies outside of the image is taken from its edge, which lies in the window too: so each
        # element is there, and no comparison need ask.
        side_by_side: tl.constexpr = (KERNEL == 2 or KERNEL == 4) and not CHANNELS_LAST
        for tap_line in tl.static_range(levels * lines):
            tap_level, level_position = edged(front, tap_line // lines, depth, KERNEL if DIRECTIONS > 2 else 1)
            line, line_position = edged(top, tap_line % lines, height, KERNEL if DIRECTIONS > 1 else 1)
            line_position += level_position * lines
            if side_by_side:
                # No padding, and windows side by side: rows of them are loaded as they lie, and parted.
                places = first_column * KERNEL + tl.arange(0, KERNEL * WIDTH)[None, :]
                if COVERED:
                    line_position = tap_line
                    start = first_row * lines * width
                    offset = covered_offset(tap_line, width, lines, HEIGHT) + places
                else:
                    offset, _inside = plane_offset(*(tap_level, line, places, depth, height, width, 1))
                x = load_inputs(
                    *(x_pointer, residual_pointer, start + offset, (row < rows) & (places < width)),
                    *(mean, scale, bias, mean_pointer is not None, rounds, COMPUTE),
                )
                parts = parted(x, KERNEL, HEIGHT, WIDTH)
            for tap in tl.static_range(KERNEL):
                tap_position = line_position * KERNEL
                if side_by_side:
                    x = parts[tap]
                    tap_position += tap
                else:
                    tap_place, place_position = edged(left, tap, width, KERNEL)
                    tap_position += place_position
                    offset, _inside = plane_offset(*(tap_level, line, tap_place, depth, height, width, distance))
                    x = load_inputs(
                        *(x_pointer, residual_pointer, start + offset, inside, mean, scale, bias),
                        *(mean_pointer is not None, rounds, COMPUTE),
                    )
                rank = rank_of(x, a, b, ACTIVATION)
                if tap_line == 0 and tap == 0:
                    first = tap_position
                    best, pre_activation, position = rank, x, tl.zeros((HEIGHT, WIDTH), tl.int32) + first
                else:
                    if side_by_side and not COVERED:
                        rank = tl.where(left + tap < width, rank, float("-inf"))
                    best, pre_activation, position = update_maximum(
                        surpasses(rank, best), rank, x, tap_position, best, pre_activation, position
                    )
    else:
        positions = kernel_height * kernel_width
        if depth is not None:
            positions *= kernel_depth
        for tap in range(positions):
            tap_line = tap // kernel_width
            tap_level = front
            if depth is not None:
                tap_level += tap_line // kernel_height * dilation_depth
                tap_line = tap_line % kernel_height
            tap_place = left + tap % kernel_width * dilation_width
            offset, within_plane = plane_offset(
                *(tap_level, top + tap_line * dilation_height, tap_place, depth, height, width, distance),
            )
            there = inside & within_plane & within(tap_place, width)
            x = load_inputs(
                *(x_pointer, residual_pointer, start + offset, there, mean, scale, bias),
                *(mean_pointer is not None, rounds, COMPUTE),
            )
            rank = rank_of(x, a, b, ACTIVATION)
            wins = there & (surpasses(rank, best) | (position < 0))
            first = tl.where(there & (position < 0), tap, first)
            best, pre_activation, position = update_maximum(wins, rank, x, tap, best, pre_activation, position)
    best, position = maximum_of(best, pre_activation, position, first, a, b, ACTIVATION)

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
            if ALIGN * BITS % 8:  # else bytes are whole
                code = tl.where(inside, code, 0)
            store_codes(code_pointer, code, row, first_column, rows, columns, BITS, HEIGHT, WIDTH)
    if wants_indices:
        winner_level = front
        winner_line = position // kernel_width
        if depth is not None:
            winner_level += winner_line // kernel_height * dilation_depth
            winner_line = winner_line % kernel_height
        winner_place = left + position % kernel_width * dilation_width
        index, _winner_inside = plane_offset(
            *(winner_level, top + winner_line * dilation_height, winner_place, depth, height, width, 1)
        )
        tl.store(index_pointer + offset, index, mask=inside)
