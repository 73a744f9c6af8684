"""Convolution, bias, activation and max pooling in a single kernel.

The convolution is a matrix product, of which neither operand is written out: (pooled places) x (taps and channels) of
the images, gathered as it is needed, times (taps and channels) x (filters).  A program holds an accumulator for each
position of the pooling window, and all of them share each tile of the filters.  So the maximum and its position are
selections between registers, and nothing but the pooled result and its code reaches memory.

Images are channels-last, and filters (filters, height, width, channels): taps and channels are then one dimension, in
which neighbours lie together as far as a tap's channels reach.  Three channels, as in a first layer, would be gathered
one by one: that is cuDNN's.

Without pooling, the same kernel can leave the statistics of its channels, for a batch norm behind it.

`takes_single` chooses between this kernel and cuDNN's convolution followed by a pass (`fusednn.kernels.pool`).
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from .base._triton import tl
from .base.device import device_at, device_of
from .base.figures import most_convolution_depth
from .base.launch import TRITON_TYPE, Configuration, configure, kernel, launch, ships
from .base.numerics import add_product, narrow, scalar, widen
from .base.tiles import cdiv
from .batch_norm_statistics import store_statistics
from .functions.activation import ACTIVATIONS, IDENTITY, Activated, Activation
from .pool_window import (
    POINT,
    Fixed,
    Pooled,
    Window,
    code_bits,
    kept_beside_code,
    pooled_like,
    store_codes,
    surpasses,
    tile_place,
    update_maximum,
    within,
)

__all__ = [
    "conv_pool_forward",
    "conv_pooled_like",
    "conv_size",
    "conv_statistics",
    "precision",
    "statistics_like",
    "takes_single",
]

#: Of an image's lines and columns.
Pair = tuple[int, int]


@kernel
def conv_pool_kernel(
    x_pointer,  # images, (samples, height, width, channels)
    w_pointer,  # filters, (filters, kernel_height, kernel_width, channels), or seen as (filters, depth)
    bias_pointer,  # one of each filter; not read unless has_bias
    y_pointer,  # pooled images, (rows, filters)
    code_pointer,  # packed codes, see `pool_window`; not written unless wants_code
    pre_activation_pointer,  # the maxima before the activation, like ``y``; not written unless wants_pre_activation
    partial_pointer,  # (row blocks, 3, filters): count, mean, squared deviations; or None.  POOL is 1 there
    rows: tl.int64,
    filters,
    channels,
    depth,
    height: tl.int32,
    width: tl.int32,
    conv_height: tl.int32,
    conv_width: tl.int32,
    pooled_height: tl.int32,
    pooled_width: tl.int32,
    kernel_width: tl.int32,
    stride_height: tl.int32,
    stride_width: tl.int32,
    padding_height: tl.int32,
    padding_width: tl.int32,
    pool_padding_height: tl.int32,
    pool_padding_width: tl.int32,
    has_bias: tl.int32,
    wants_code: tl.int32,
    wants_pre_activation: tl.int32,
    a: tl.float64,
    b: tl.float64,
    ACTIVATION: tl.constexpr,
    POOL: tl.constexpr,
    POOL_STRIDE: tl.constexpr,
    BITS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    first_row, first_filter, row, column, plane, _, line, place, inside = tile_place(
        rows, filters, None, pooled_height, pooled_width, True, HEIGHT, WIDTH
    )
    filter_ = first_filter + tl.arange(0, WIDTH)[:, None]
    # Of the window's first position: its place in the convolution's result, and in the image.
    line = line * POOL_STRIDE - pool_padding_height
    place = place * POOL_STRIDE - pool_padding_width
    top = line * stride_height - padding_height
    left = place * stride_width - padding_width
    start = ((plane * height + top) * width + left) * channels

    products = ()
    for _ in tl.static_range(POOL * POOL):
        products += (tl.zeros((HEIGHT, WIDTH), tl.float32),)  # type: ignore[assignment]
    for first in range(0, depth, DEPTH):
        k = first + tl.arange(0, DEPTH)[None, :]
        tap = k // channels
        tap_line = top + tap // kernel_width
        tap_place = left + tap % kernel_width
        x_offset = start + (tap // kernel_width * width + tap % kernel_width) * channels + k % channels
        w_inside = (filter_ < filters) & (k < depth)
        w = tl.load(w_pointer + filter_.to(tl.int64) * depth + k, mask=w_inside, other=0)
        x_inside = (row < rows) & (k < depth)
        sums = ()
        for y in tl.static_range(POOL):
            for x in tl.static_range(POOL):
                image_line = tap_line + y * stride_height
                image_place = tap_place + x * stride_width
                there = x_inside & within(image_line, height) & within(image_place, width)
                step = (y * stride_height * width + x * stride_width) * channels
                tile = tl.load(x_pointer + x_offset + step, mask=there, other=0)
                product = add_product(products[y * POOL + x], tile, tl.trans(w), PRECISION)
                sums += (product,)  # type: ignore[assignment]
        products = sums

    a = scalar(a, tl.float32)
    b = scalar(b, tl.float32)
    bias = tl.zeros((1, WIDTH), tl.float32)
    if has_bias:
        bias += widen(tl.load(bias_pointer + column, mask=column < filters, other=0), tl.float32)
    best = tl.full((HEIGHT, WIDTH), float("-inf"), tl.float32)
    pre_activation = best
    position = tl.full((HEIGHT, WIDTH), -1, tl.int32)
    for y in tl.static_range(POOL):
        for x in tl.static_range(POOL):
            product = products[y * POOL + x] + bias
            if ACTIVATION.saves == "input" or ACTIVATION.saves == "output":  # made again of what is kept, as it is kept
                product = widen(narrow(product, y_pointer.dtype.element_ty), tl.float32)
            there = inside & within(line + y, conv_height) & within(place + x, conv_width)
            # Asked of each: fewer registers than a window begun with its first element.
            rank = ACTIVATION.forward(product, a, b)
            wins = there & (surpasses(rank, best) | (position < 0))
            best, pre_activation, position = update_maximum(
                wins, rank, product, y * POOL + x, best, pre_activation, position
            )

    offset = row * filters + column
    tl.store(y_pointer + offset, narrow(best, y_pointer.dtype.element_ty), mask=inside)
    if wants_pre_activation:
        tl.store(
            pre_activation_pointer + offset,
            narrow(pre_activation, pre_activation_pointer.dtype.element_ty),
            mask=inside,
        )
    if partial_pointer is not None:
        # Of what was stored, and about the first row's values: a large mean doesn't swallow the differences.
        stored = tl.where(inside, widen(narrow(best, y_pointer.dtype.element_ty), tl.float32), 0.0)
        count = tl.minimum(rows - first_row, HEIGHT).to(tl.float64)
        origin = tl.sum(tl.where(row == first_row, stored, 0.0), axis=0, keep_dims=True)
        difference = tl.where(inside, stored - origin, 0.0)
        shift = tl.sum(difference.to(tl.float64), axis=0, keep_dims=True) / count
        deviation = tl.where(inside, difference - shift.to(tl.float32), 0.0)
        squares = tl.sum((deviation * deviation).to(tl.float64), axis=0, keep_dims=True)
        store_statistics(partial_pointer, first_row // HEIGHT, column, filters, count, origin + shift, squares)
    if BITS:  # noqa: SIM102 (a constant)
        if wants_code:
            code = position
            if ACTIVATION.saves == "mask":
                code += ACTIVATION.mask(pre_activation, a, b).to(tl.int32) << (BITS - 1)
            store_codes(code_pointer, tl.where(inside, code, 0), row, first_filter, rows, filters, BITS, HEIGHT, WIDTH)


# --- Configurations ---------------------------------------------------------------------------------------------------


class _Tile(NamedTuple):
    height: int  # pooled places
    width: int  # filters
    depth: int  # taps and channels, of 16 bits; half as many of 32


# By the size of the pooling window: the accumulators of all its positions fit into the registers, and beside them,
# where tiles are narrow, TF32's operands or the arithmetic of smooth activations.  A program has four warps: with
# eight, tap loops like this were seen to be miscompiled (PyTorch #173068, #183989).
_TILES = {1: _Tile(64, 64, 32), 2: _Tile(64, 64, 32), 3: _Tile(16, 64, 32)}
_NARROW = 32
_CROWDED = 2  # the pooling window whose wide tile spills where operands take registers, too: see `Device`
_THREADS = 128


def _tile(pool: int, row: Activation, precision: str, large: bool) -> _Tile:
    smooth = row.saves in ("output", "input")
    crowded = pool == _CROWDED and not large
    return _TILES[pool]._replace(width=_NARROW) if smooth or crowded or precision == "tf32" else _TILES[pool]


_STAGES, _AMD_STAGES = 3, 2

# The largest depth, taps times channels, at which the single kernel is taken, by the size of the pooling window: 416,
# or 96 where windows overlap.  Predicted, not measured.
_MOST_DEPTH = {window: most_convolution_depth(window) for window in (1, 2, 3)}
_PRECISIONS = ("fp16", "bf16", "tf32")

#: The type of the operands of products, by their precision.
_OPERANDS = {**{name: dtype for dtype, name in TRITON_TYPE.items()}, "tf32": torch.float32}


@torch.compiler.assume_constant_result
def _allows_tf32(device: int) -> bool:
    """PyTorch's switch, which its compiler can't read while it traces; False where the device has no TF32."""
    allowed = torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
    return bool(allowed) and device_at(device).has_tf32


def precision(x: Tensor) -> str:
    """The precision of a convolution's products, as cuDNN's have it: TF32 only where it is allowed."""
    if x.dtype is torch.float32 and _allows_tf32(x.get_device()):
        return "tf32"
    return TRITON_TYPE[x.dtype]


def takes_single(x: Tensor, weight: Tensor, dilation: tuple[int, ...], groups: int, window: Window) -> bool:
    """Whether convolution and pooling are made by the single kernel, rather than by cuDNN and a pass."""
    pool, _, directions = window.fixed
    if x.dim() != 4 or directions not in (0, 2):
        return False
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    depth = weight.shape[1] * weight.shape[2] * weight.shape[3]
    plain = channels_last and groups == 1 and dilation == (1, 1)
    # Of other numbers of channels elements are gathered one by one: for the 3 of an image, 32 x 224 x 224 in bfloat16,
    # instructions take 137 us, and cuDNN and a pass 110 us for their bytes (an H200, counted).
    plain = plain and weight.shape[1] % 16 == 0
    return plain and precision(x) in _PRECISIONS and depth <= _MOST_DEPTH.get(pool, 0)


@cache
def _configuration(
    precision: str, row: Activation, fixed: Fixed, statistics: bool = False, large: bool = True
) -> Configuration:
    """``large`` where the device takes large tiles."""
    pool, pool_stride, _ = fixed
    tile = _tile(pool, row, precision, large)
    narrow = tile != _tile(pool, row, precision, True)
    parts = (f"conv pool {pool}x{pool}", row.label, statistics and "+ statistics", precision, narrow and "narrow")
    return configure(
        conv_pool_kernel,
        " ".join(part for part in parts if part),
        _OPERANDS[precision],
        {
            **({} if statistics else {"partial_pointer": None}),
            "ACTIVATION": row,
            "POOL": pool,
            "POOL_STRIDE": pool_stride,
            "BITS": code_bits(fixed, row.saves == "mask"),
            "HEIGHT": tile.height,
            "WIDTH": tile.width,
            "DEPTH": tile.depth // 2 if precision == "tf32" else tile.depth,
            "PRECISION": "tf32" if precision == "tf32" else "ieee",
        },
        pointers={"code": torch.uint8, "partial": torch.float32},
        threads=_THREADS,
        num_stages=_STAGES,
        amd_stages=_AMD_STAGES,
        tensor_cores=True,
        large=tile != _tile(pool, row, precision, False),
        rare=narrow,
    )


@ships("conv")
def configurations() -> Iterator[Configuration]:
    # Activations know nothing of the product before them: one of each kind stands for the others.
    for precision in _PRECISIONS:
        for fixed in (POINT.fixed, Fixed(2, 2), Fixed(3, 2)):
            yield replace(_configuration(precision, ACTIVATIONS["relu"], fixed), rare=precision == "fp16")
            if (narrow := _configuration(precision, ACTIVATIONS["relu"], fixed, large=False)).label.endswith("narrow"):
                yield narrow
        yield replace(_configuration(precision, IDENTITY.row, POINT.fixed, statistics=True), rare=precision == "fp16")
    yield _configuration("bf16", IDENTITY.row, Fixed(2, 2))
    yield _configuration("tf32", ACTIVATIONS["gelu"], Fixed(2, 2))


def conv_size(
    shape: tuple[int, ...],
    filters: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...] = (1, 1),
) -> tuple[int, ...]:
    """The size of the convolution of images and filters of these shapes.  May be symbolic."""
    directions = len(stride)
    return tuple(
        (size + 2 * border - spread * (taps - 1) - 1) // step + 1
        for size, taps, step, border, spread in zip(
            *(shape[-directions:], filters[-directions:], stride, padding, dilation), strict=True
        )
    )


def conv_pooled_like(
    x: Tensor,
    weight: Tensor,
    stride: Pair,
    padding: Pair,
    activation: Activated,
    window: Window,
    *,
    keeps: bool,
) -> Pooled:
    """Memory for the results of `conv_pool_forward`.  Shapes may be symbolic."""
    shape = (x.shape[0], weight.shape[0], *conv_size(x.shape, weight.shape, stride, padding))
    return pooled_like(x, shape, True, window, activation, keeps=keeps)


def conv_pool_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    activation: Activated,
    window: Window,
    *,
    keeps: bool,
    partial: Tensor | None = None,
) -> Pooled:
    """max over windows of activation(conv(x) + bias), channels last; otherwise as `fusednn.kernels.pool.pool_forward`.

    ``window`` is one of the sizes that have kernels; dilation 1, one group.  ``partial``: where to write the statistics
    of the result's channels, for a convolution alone.
    """
    results = conv_pooled_like(x, weight, stride, padding, activation, window, keeps=keeps)
    samples, channels, height, width = x.shape
    filters, _, kernel_height, kernel_width = weight.shape
    conv_height, conv_width = conv_size(x.shape, weight.shape, stride, padding)
    x = x.contiguous(memory_format=torch.channels_last)
    weight = weight.permute(0, 2, 3, 1).contiguous()
    has_bias = bias is not None
    bias = x if bias is None else bias.contiguous()
    pooled_height, pooled_width = results.y.shape[2:]
    rows = samples * pooled_height * pooled_width
    products = precision(x)
    large = device_of(x).takes_large_tiles
    configuration = _configuration(products, activation.row, window.fixed, partial is not None, large)
    tile = _tile(window.fixed[0], activation.row, products, large)
    keeps_pre_activation = keeps and kept_beside_code(activation.row, window.fixed) == "input"
    launch(
        configuration,
        cdiv(rows, tile.height) * cdiv(filters, tile.width),
        *(x, weight, bias, results.y, results.code, results.pre_activation),
        *(() if partial is None else (partial,)),
        *(rows, filters, channels, kernel_height * kernel_width * channels, height, width, conv_height, conv_width),
        *(pooled_height, pooled_width, kernel_width, *stride, *padding, *window.padding),
        *(int(has_bias), int(keeps), int(keeps_pre_activation), activation.a, activation.b),
    )
    return results


def statistics_like(x: Tensor, weight: Tensor, stride: Pair, padding: Pair) -> tuple[Tensor, Tensor]:
    """Memory for the results of `conv_statistics`.  Shapes may be symbolic."""
    results = conv_pooled_like(x, weight, stride, padding, IDENTITY, POINT, keeps=False)
    samples, filters, height, width = results.y.shape
    blocks = (samples * height * width + _TILES[1].height - 1) // _TILES[1].height
    return results.y, torch.empty((blocks, 3, filters), dtype=torch.float32, device=x.device)


def conv_statistics(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair
) -> tuple[Tensor, Tensor]:
    """The convolution, channels last, and count, mean and sum of squared deviations of parts of its channels.

    These are (parts, 3, filters), as `fusednn.kernels.batch_norm_statistics.partial_statistics` gives them.
    """
    _, partial = statistics_like(x, weight, stride, padding)
    results = conv_pool_forward(*(x, weight, bias, stride, padding, IDENTITY, POINT), keeps=False, partial=partial)
    return results.y, partial
