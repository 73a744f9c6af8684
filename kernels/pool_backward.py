"""The gradient of max pooling, of the activation before it, and of the bias before that.

It is a gather, so it needs no atomics: each element adds the gradients of the windows that it won.  Windows
of a fixed size and stride cut the image into cells of stride x stride elements, and a cell sees the same few windows
wherever it lies; a program reads these once, and writes the cells.  Other windows are looked for element by element.
The bias's gradient is summed on the way: a program writes the sums over its tile, and PyTorch's ``sum`` adds them in a
fixed order.
"""

from .base._triton import tl, triton
from .base.launch import kernel
from .base.matrix import sums_tile
from .base.numerics import narrow, scalar
from .base.tiles import aligned, store
from .pool_window import covered_offset, load_gradient, place_images, plane_offset, tile_place, window_place, within

__all__ = ["pool_backward_cells_kernel", "pool_backward_kernel"]

# --- Device functions -------------------------------------------------------------------------------------------------


@triton.jit
def interleaved(tiles, FIRST: tl.constexpr, PARTS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """PARTS of ``tiles``, whose columns take turns."""
    if PARTS == 2:
        return tl.reshape(tl.join(tiles[FIRST], tiles[FIRST + 1]), (HEIGHT, 2 * WIDTH))
    else:
        even = tl.reshape(tl.join(tiles[FIRST], tiles[FIRST + 2]), (HEIGHT, 2 * WIDTH))
        odd = tl.reshape(tl.join(tiles[FIRST + 1], tiles[FIRST + 3]), (HEIGHT, 2 * WIDTH))
        return tl.reshape(tl.join(even, odd), (HEIGHT, 4 * WIDTH))


# --- Kernels ----------------------------------------------------------------------------------------------------------


@kernel
def pool_backward_cells_kernel(
    g_pointer,  # gradient of the pooled images
    code_pointer,  # packed codes
    saved_pointer,  # what is kept beside the code, like ``g``; or None
    dx_pointer,  # gradient of the images
    partial_pointer,  # partial sums of the bias's gradient, see `ChannelMatrix`, or None
    rows: tl.int64,  # of cells
    columns,
    depth,  # of volumes, or None, as all that ends so
    height: tl.int32,
    width,
    cells_depth,
    cells_height: tl.int32,
    cells_width: tl.int32,
    pooled_depth,
    pooled_height: tl.int32,
    pooled_width,
    padding_depth,
    padding_height: tl.int32,
    padding_width: tl.int32,
    a: tl.float64,
    b: tl.float64,
    ACTIVATION: tl.constexpr,
    KEPT: tl.constexpr,  # `kept_beside_code`
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    DIRECTIONS: tl.constexpr,
    BITS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    COVERED: tl.constexpr,  # contiguous images are cells of whole windows, see `pool_window`
    COMPUTE: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Windows of a fixed size: a cell of elements for each place of a tile."""
    columns = aligned(columns, ALIGN)
    if COVERED:
        width = aligned(width, STRIDE * ALIGN)
    elif not CHANNELS_LAST:
        width = aligned(width, ALIGN)
        pooled_width = aligned(pooled_width, ALIGN)
    first_row, first_column, row, column, plane, level, line, place, inside = tile_place(
        rows, columns, cells_depth, cells_height, cells_width, CHANNELS_LAST, HEIGHT, WIDTH
    )
    a = scalar(a, COMPUTE)
    b = scalar(b, COMPUTE)
    lines: tl.constexpr = KERNEL if DIRECTIONS > 1 else 1
    levels: tl.constexpr = KERNEL if DIRECTIONS > 2 else 1
    line_stride: tl.constexpr = STRIDE if DIRECTIONS > 1 else 1
    level_stride: tl.constexpr = STRIDE if DIRECTIONS > 2 else 1

    # Element (y, x) of cell (i, j) is position (y + STRIDE q, x + STRIDE r) of window (i - q, j - r); levels likewise.
    # Cells begin where windows do, in the padding; where they cover the image, where it does, and then windows begin
    # one place, ``ahead``, before their cell.
    ahead: tl.constexpr = KERNEL - STRIDE if COVERED else 0
    line_ahead: tl.constexpr = lines - line_stride if COVERED else 0
    cell = ()
    for _ in tl.static_range(level_stride * line_stride * STRIDE):
        cell += (tl.zeros((HEIGHT, WIDTH), COMPUTE),)  # type: ignore[assignment]
    reach: tl.constexpr = (KERNEL + STRIDE - 1) // STRIDE
    line_reach: tl.constexpr = (lines + line_stride - 1) // line_stride
    level_reach: tl.constexpr = (levels + level_stride - 1) // level_stride
    for p in tl.static_range(level_reach):
        for q in tl.static_range(-line_ahead, line_reach - line_ahead):
            for r in tl.static_range(-ahead, reach - ahead):
                window_row, window_column, window_columns, there = row - q, column - r, columns, inside
                if COVERED:
                    if q != 0:
                        there = there & (line - q < pooled_height)
                    if r != 0:
                        there = there & (column - r < columns)
                else:
                    window_row, window_column, window_columns, there = window_place(
                        *(plane, level - p, line - q, place - r, column, columns),
                        *(pooled_depth, pooled_height, pooled_width, inside, CHANNELS_LAST),
                    )
                position, g = load_gradient(
                    *(g_pointer, code_pointer, saved_pointer, window_row, window_column, window_columns, there),
                    *(a, b, ACTIVATION, KEPT, BITS, COMPUTE),
                )
                sums = ()
                for z in tl.static_range(level_stride):
                    for y in tl.static_range(line_stride):
                        for x in tl.static_range(STRIDE):
                            dx = cell[(z * line_stride + y) * STRIDE + x]  # type: ignore[var-annotated]
                            if (
                                z + level_stride * p < levels
                                and y + line_stride * q >= -line_ahead
                                and y + line_stride * q < lines - line_ahead
                                and x + STRIDE * r >= -ahead
                                and x + STRIDE * r < KERNEL - ahead
                            ):
                                tap_line = (z + level_stride * p) * lines + y + line_stride * q + line_ahead
                                dx += tl.where(position == tap_line * KERNEL + x + STRIDE * r + ahead, g, 0.0)
                            sums += (dx,)  # type: ignore[assignment]
                cell = sums

    start, distance = place_images(plane, column, columns, depth, height, width, CHANNELS_LAST)
    total = tl.zeros((HEIGHT, WIDTH), COMPUTE)
    for part in tl.static_range(level_stride * line_stride):
        image_level = level * level_stride + part // line_stride
        image_line = line * line_stride + part % line_stride
        if levels == 3:  # the smaller windows have no padding
            image_level -= padding_depth
        if lines == 3:
            image_line -= padding_height
        if CHANNELS_LAST or STRIDE == 1:
            for x in tl.static_range(STRIDE):
                dx = cell[part * STRIDE + x]
                image_place = place * STRIDE + x
                if KERNEL == 3:
                    image_place -= padding_width
                offset, there = plane_offset(*(image_level, image_line, image_place, depth, height, width, distance))
                there = inside & there & within(image_place, width)
                tl.store(dx_pointer + start + offset, narrow(dx, dx_pointer.dtype.element_ty), mask=there)
                total += dx
        else:
            # Neighbouring places are put side by side, and stored as they lie.
            dx = interleaved(cell, part * STRIDE, STRIDE, HEIGHT, WIDTH)
            image_place = first_column * STRIDE + tl.arange(0, STRIDE * WIDTH)[None, :]
            if COVERED:
                start = first_row * line_stride * width
                offset = covered_offset(part, width, line_stride, HEIGHT) + image_place
                there = (row < rows) & (image_place < width)
            else:
                if KERNEL == 3:
                    image_place -= padding_width
                offset, there = plane_offset(*(image_level, image_line, image_place, depth, height, width, 1))
                there = (row < rows) & there & within(image_place, width)
            tl.store(dx_pointer + start + offset, narrow(dx, dx_pointer.dtype.element_ty), mask=there)
            for x in tl.static_range(STRIDE):
                total += cell[part * STRIDE + x]
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
    """Any windows: an element for each place of a tile, which looks for its windows."""
    columns = aligned(columns, ALIGN)
    if not CHANNELS_LAST:
        width = aligned(width, ALIGN)
        pooled_width = aligned(pooled_width, ALIGN)
    first_row, first_column, row, column, plane, level, line, place, inside = tile_place(
        rows, columns, depth, height, width, CHANNELS_LAST, HEIGHT, WIDTH
    )
    a = scalar(a, COMPUTE)
    b = scalar(b, COMPUTE)

    dx = tl.zeros((HEIGHT, WIDTH), COMPUTE)
    positions = kernel_height * kernel_width
    if depth is not None:
        positions *= kernel_depth
    for tap in range(positions):
        # The window in which the element has this position, if there is one.
        tap_line = tap // kernel_width
        left = place + padding_width - tap % kernel_width * dilation_width
        begins = (left >= 0) & (left % stride_width == 0)
        front = level
        if depth is not None:
            front += padding_depth - tap_line // kernel_height * dilation_depth
            tap_line = tap_line % kernel_height
            begins = begins & (front >= 0) & (front % stride_depth == 0)
            front = front // stride_depth
        top = line + padding_height - tap_line * dilation_height
        begins = begins & (top >= 0) & (top % stride_height == 0)
        window_row, window_column, window_columns, there = window_place(
            *(plane, front, top // stride_height, left // stride_width, column, columns),
            *(pooled_depth, pooled_height, pooled_width, inside & begins, CHANNELS_LAST),
        )
        position, g = load_gradient(
            *(g_pointer, code_pointer, saved_pointer, window_row, window_column, window_columns, there),
            *(a, b, ACTIVATION, KEPT, BITS, COMPUTE),
        )
        dx += tl.where(position == tap, g, 0.0)
    tl.store(dx_pointer + row * columns + column, narrow(dx, dx_pointer.dtype.element_ty), mask=inside)
    if partial_pointer is not None:
        sums = sums_tile(
            *(first_row // HEIGHT, first_column // WIDTH, rows, columns, tl.cdiv(columns, WIDTH)),
            *(not CHANNELS_LAST, HEIGHT, WIDTH),
        )
        store(partial_pointer, sums, tl.sum(dx, axis=0 if CHANNELS_LAST else 1))
