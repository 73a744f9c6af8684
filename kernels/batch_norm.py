"""Batch norm: statistics of channels, normalisation with activation and residual, and their gradients.

A dense tensor is (outer, channels, inner), whatever the order of its dimensions, and its memory is a matrix:

=====================  ========================  =============  ======================
layout                 rows x columns            a channel is   reduced axis of a tile
=====================  ========================  =============  ======================
(N, C, spatial)        (outer channels) x inner  a run of rows  1
channels last, (N, C)  outer x channels          a column       0
=====================  ========================  =============  ======================

**One geometry for all passes.**  The tiles that cover a block of channels form parallel tracks, and a program walks a
chunk of one track, a tile a step.  A track is a column of tiles, or runs along ``inner`` where that is longer.
Reductions walk forward and leave a partial result for each program; the pass that follows has the same programs, and
walks backward: what it reads first was read last, and is still in the L2 cache.

**Statistics.**  Each lane of a tile keeps its own running mean and sum of squared deviations (Welford), so nothing is
exchanged between threads until the end.  Programs write (count, mean, squared deviations), and one small launch merges
them in a fixed order (Chan, Golub, LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample
Variances", 1979).  Sums of squares, which cancel, never appear: a constant channel has a variance of exactly 0.

Means and variances are float32 (float64 for float64), but lanes and programs are merged in float64: of the rounding of
large terms that cancel, only that of single lanes is left.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property, lru_cache
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ._triton import tl, triton
from .functions.activation import ACTIVATIONS, IDENTITY, Activated, Activation, gradient_from_input
from .launch import ACCUMULATOR, COMPUTE, DTYPES, TRITON_TYPE, Configuration, kernel, launch, ships
from .layout import dense, dense_like
from .numerics import divide, narrow, scalar, square_root, widen
from .tiles import MASK_BYTES, TILE, cdiv, load_bits, store_bits, threads_for, tile_shape

__all__ = [
    "Plan",
    "batch_norm_backward",
    "batch_norm_forward",
    "batch_norm_reduce",
    "mask_bytes",
    "merge_statistics",
    "partial_statistics",
    "plan_of",
]

_TILE = tl.constexpr(TILE)

# --- Device functions -----------------------------------------------------------------------------------------------


@triton.jit
def program_place(channel_blocks, tracks, length, steps):
    """This program's block of channels and track, its steps (the first, and the one after the last), and its split."""
    program = tl.program_id(0).to(tl.int64)
    track = program % tracks
    channel_block = program // tracks % channel_blocks
    chunk = program // tracks // channel_blocks
    first = chunk * steps
    return channel_block, track, first, tl.minimum(first + steps, length), chunk * tracks + track


@triton.jit
def tile_place(
    step,
    channel_block,
    track,
    outer,
    channels,
    columns,
    along_inner,
    AXIS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Start of a tile, its offsets, which positions of the reduced axis are inside, and which elements are."""
    row = tl.arange(0, HEIGHT)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    if AXIS == 1:
        outer_index = tl.where(along_inner != 0, track, step)
        inner_block = tl.where(along_inner != 0, step, track)
        start = (outer_index * channels + channel_block * HEIGHT) * columns + inner_block * WIDTH
        row_inside = row < channels - channel_block * HEIGHT
        column_inside = column < columns - inner_block * WIDTH
        present = column_inside
    else:
        start = step * HEIGHT * columns + channel_block * WIDTH
        row_inside = row < outer - step * HEIGHT
        column_inside = column < columns - channel_block * WIDTH
        present = row_inside
    return start, row * columns + column, present, row_inside & column_inside


@triton.jit
def channel_tile(channel_block, AXIS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """The channels of a tile, broadcastable to (HEIGHT, WIDTH)."""
    if AXIS == 1:
        return channel_block * HEIGHT + tl.arange(0, HEIGHT)[:, None]
    else:
        return channel_block * WIDTH + tl.arange(0, WIDTH)[None, :]


@triton.jit
def lanes(AXIS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """The positions along the reduced axis, broadcastable to (HEIGHT, WIDTH)."""
    if AXIS == 1:
        return tl.arange(0, WIDTH)[None, :]
    else:
        return tl.arange(0, HEIGHT)[:, None]


@triton.jit
def normalisation(mean_pointer, variance_pointer, weight_pointer, bias_pointer, channel, channels, eps, COMPUTE):
    """Of each channel: mean, 1 / standard deviation, scale (that times the weight), and bias.

    The result is (x - mean) * scale + bias.  Without parameters, weight and bias are 1 and 0.
    """
    inside = channel < channels
    mean = tl.load(mean_pointer + channel, mask=inside, other=0)
    variance = tl.load(variance_pointer + channel, mask=inside, other=0)
    inverse_deviation = divide(scalar(1.0, COMPUTE), square_root(variance + scalar(eps, COMPUTE)))
    if weight_pointer is not None:
        scale = inverse_deviation * tl.load(weight_pointer + channel, mask=inside, other=0)
        bias = tl.load(bias_pointer + channel, mask=inside, other=0)
    else:
        scale = inverse_deviation
        bias = tl.zeros(channel.shape, COMPUTE)
    return mean, inverse_deviation, scale, bias


# --- Statistics -----------------------------------------------------------------------------------------------------


@kernel
def statistics_kernel(
    x_pointer,  # input, (outer, channels, inner)
    partial_pointer,  # (splits, 3, channels): count, mean, sum of squared deviations
    outer: tl.int64,
    channels,
    columns,
    channel_blocks: tl.int64,
    tracks: tl.int64,
    length: tl.int64,
    steps: tl.int64,
    along_inner: tl.int32,
    AXIS: tl.constexpr,
    COMPUTE: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    channel_block, track, first, end, split = program_place(channel_blocks, tracks, length, steps)
    mean = tl.zeros((HEIGHT, WIDTH), COMPUTE)
    deviations = tl.zeros((HEIGHT, WIDTH), COMPUTE)
    for step in range(first, end):
        start, offsets, present, inside = tile_place(
            step, channel_block, track, outer, channels, columns, along_inner, AXIS, HEIGHT, WIDTH
        )
        x = widen(tl.load(x_pointer + start + offsets, mask=inside, other=0), COMPUTE)
        # A lane that is present now was present in all steps before: the step tells its count.
        rate = divide(scalar(1.0, COMPUTE), (step - first + 1).to(COMPUTE))
        difference = tl.where(present, x - mean, 0.0)
        mean += difference * rate
        deviations += difference * (x - mean)

    channel = channel_tile(channel_block, AXIS, HEIGHT, WIDTH)
    target = partial_pointer + split * 3 * channels + channel
    mask = channel < channels

    # A lane that starts inside leaves at the last step, if at all.
    lane = lanes(AXIS, HEIGHT, WIDTH)
    _, _, starts, _ = tile_place(
        first, channel_block, track, outer, channels, columns, along_inner, AXIS, HEIGHT, WIDTH
    )
    _, _, stays, _ = tile_place(
        end - 1, channel_block, track, outer, channels, columns, along_inner, AXIS, HEIGHT, WIDTH
    )
    count = starts.to(COMPUTE) * (end - first - 1).to(COMPUTE) + stays.to(COMPUTE)
    merged_count = tl.sum(count.to(tl.float64), axis=AXIS, keep_dims=True)
    tl.store(target, (merged_count + tl.zeros(channel.shape, tl.float64)).to(COMPUTE), mask=mask)

    # Lanes merge about the first one's mean: differences don't lose what a large mean would swallow.
    origin = tl.sum(tl.where(lane == 0, mean, 0.0), axis=AXIS, keep_dims=True)
    shift = tl.sum((count * (mean - origin)).to(tl.float64), axis=AXIS, keep_dims=True) / merged_count
    tl.store(target + channels, (origin + shift).to(COMPUTE), mask=mask)
    distance = mean - origin - shift.to(COMPUTE)
    deviations += count * distance * distance
    merged_deviations = tl.sum(deviations.to(tl.float64), axis=AXIS, keep_dims=True)
    tl.store(target + 2 * channels, merged_deviations.to(COMPUTE), mask=mask)


@kernel
def merge_kernel(
    partial_pointer,  # (splits, 3, channels): count, mean, sum of squared deviations
    mean_pointer,  # mean, (channels,)
    variance_pointer,  # biased variance, (channels,)
    running_mean_pointer,  # updated, or None where nothing is tracked
    running_variance_pointer,
    batches_pointer,  # number of batches: the running statistics are averages over them; or None
    splits: tl.int64,
    channels: tl.int64,
    momentum: tl.float64,  # weight of this batch, where there is no number of batches
    HEIGHT: tl.constexpr,  # splits in a tile
    WIDTH: tl.constexpr,  # channels in a tile
):
    channel = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)[None, :]
    mask = channel < channels
    partial_pointer += channel
    origin = tl.load(partial_pointer + channels, mask=mask, other=0).to(tl.float64)

    count = tl.zeros((HEIGHT, WIDTH), tl.float64)
    weighted = tl.zeros((HEIGHT, WIDTH), tl.float64)
    for split in range(0, splits, HEIGHT):
        row = split + tl.arange(0, HEIGHT)[:, None]
        inside = (row < splits) & mask
        n = tl.load(partial_pointer + row * 3 * channels, mask=inside, other=0).to(tl.float64)
        mean = tl.load(partial_pointer + (row * 3 + 1) * channels, mask=inside, other=0)
        count += n
        weighted += tl.where(inside, n * (mean - origin), 0.0)
    count = tl.where(mask, tl.sum(count, axis=0, keep_dims=True), 2.0)  # no division by 0 outside
    shift = tl.sum(weighted, axis=0, keep_dims=True) / count

    deviations = tl.zeros((HEIGHT, WIDTH), tl.float64)
    for split in range(0, splits, HEIGHT):
        row = split + tl.arange(0, HEIGHT)[:, None]
        inside = (row < splits) & mask
        n = tl.load(partial_pointer + row * 3 * channels, mask=inside, other=0).to(tl.float64)
        mean = tl.load(partial_pointer + (row * 3 + 1) * channels, mask=inside, other=0)
        distance = mean - origin - shift
        own = tl.load(partial_pointer + (row * 3 + 2) * channels, mask=inside, other=0)
        deviations += tl.where(inside, own + n * distance * distance, 0.0)
    deviations = tl.sum(deviations, axis=0, keep_dims=True)

    mean = origin + shift
    tl.store(mean_pointer + channel, mean.to(mean_pointer.dtype.element_ty), mask=mask)
    tl.store(variance_pointer + channel, (deviations / count).to(variance_pointer.dtype.element_ty), mask=mask)
    if running_mean_pointer is not None:
        if batches_pointer is not None:
            rate = 1 / tl.load(batches_pointer).to(tl.float64)
        else:
            rate = scalar(momentum, tl.float64)
        running_mean = tl.load(running_mean_pointer + channel, mask=mask, other=0)
        running_variance = tl.load(running_variance_pointer + channel, mask=mask, other=0)
        new_mean = rate * mean + (1 - rate) * running_mean
        new_variance = rate * (deviations / (count - 1)) + (1 - rate) * running_variance
        tl.store(running_mean_pointer + channel, new_mean.to(running_mean.dtype), mask=mask)
        tl.store(running_variance_pointer + channel, new_variance.to(running_variance.dtype), mask=mask)


# --- Normalisation and its gradient ---------------------------------------------------------------------------------


@kernel
def normalise_kernel(
    x_pointer,  # input, (outer, channels, inner)
    residual_pointer,  # added before the activation, as x; or None
    y_pointer,  # output, as x
    mask_pointer,  # packed bits of the activation's mask, tile by tile; or None
    mean_pointer,  # (channels,)
    variance_pointer,
    weight_pointer,  # (channels,), or None
    bias_pointer,
    outer: tl.int64,
    channels,
    columns,
    channel_blocks: tl.int64,
    tracks: tl.int64,
    length: tl.int64,
    steps: tl.int64,
    along_inner: tl.int32,
    eps: tl.float64,
    a: tl.float64,
    b: tl.float64,
    ACTIVATION: tl.constexpr,
    AXIS: tl.constexpr,
    COMPUTE: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    channel_block, track, first, end, _split = program_place(channel_blocks, tracks, length, steps)
    channel = channel_tile(channel_block, AXIS, HEIGHT, WIDTH)
    mean, _, scale, bias = normalisation(
        mean_pointer, variance_pointer, weight_pointer, bias_pointer, channel, channels, eps, COMPUTE
    )
    a = scalar(a, COMPUTE)
    b = scalar(b, COMPUTE)
    for ahead in range(first, end):
        step = first + end - 1 - ahead  # backward
        start, offsets, _present, inside = tile_place(
            step, channel_block, track, outer, channels, columns, along_inner, AXIS, HEIGHT, WIDTH
        )
        x = widen(tl.load(x_pointer + start + offsets, mask=inside, other=0), COMPUTE)
        z = (x - mean) * scale + bias
        if residual_pointer is not None:
            z += widen(tl.load(residual_pointer + start + offsets, mask=inside, other=0), COMPUTE)
        if mask_pointer is not None:
            tile_index = (step * channel_blocks + channel_block) * tracks + track
            store_bits(mask_pointer, tl.reshape(ACTIVATION.mask(z, a, b), (1, _TILE)), tile_index, 1, _TILE)
        y = ACTIVATION.forward(z, a, b)
        tl.store(y_pointer + start + offsets, narrow(y, y_pointer.dtype.element_ty), mask=inside)


@kernel
def reduce_kernel(
    g_pointer,  # gradient of the output, as x
    x_pointer,  # input, (outer, channels, inner)
    residual_pointer,  # what was added before the activation, as x; or None
    mask_pointer,  # the packed bits that the forward pass left; or None
    dz_pointer,  # gradient of the activation's input, as x; or None where the next pass computes it again
    partial_pointer,  # (splits, 2, channels): sums of dz and of dz * normalised x
    mean_pointer,  # (channels,)
    variance_pointer,
    weight_pointer,  # (channels,), or None
    bias_pointer,
    outer: tl.int64,
    channels,
    columns,
    channel_blocks: tl.int64,
    tracks: tl.int64,
    length: tl.int64,
    steps: tl.int64,
    along_inner: tl.int32,
    eps: tl.float64,
    a: tl.float64,
    b: tl.float64,
    ACTIVATION: tl.constexpr,
    AXIS: tl.constexpr,
    COMPUTE: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    channel_block, track, first, end, split = program_place(channel_blocks, tracks, length, steps)
    channel = channel_tile(channel_block, AXIS, HEIGHT, WIDTH)
    mean, inverse_deviation, scale, bias = normalisation(
        mean_pointer, variance_pointer, weight_pointer, bias_pointer, channel, channels, eps, COMPUTE
    )
    a = scalar(a, COMPUTE)
    b = scalar(b, COMPUTE)
    sums = tl.zeros((HEIGHT, WIDTH), COMPUTE)
    products = tl.zeros((HEIGHT, WIDTH), COMPUTE)
    for step in range(first, end):
        start, offsets, present, inside = tile_place(
            step, channel_block, track, outer, channels, columns, along_inner, AXIS, HEIGHT, WIDTH
        )
        dz = widen(tl.load(g_pointer + start + offsets, mask=inside, other=0), COMPUTE)
        x = widen(tl.load(x_pointer + start + offsets, mask=inside, other=0), COMPUTE)
        centred = x - mean
        if mask_pointer is not None:
            tile_index = (step * channel_blocks + channel_block) * tracks + track
            kept = tl.reshape(load_bits(mask_pointer, tile_index, 1, _TILE), (HEIGHT, WIDTH))
            dz = ACTIVATION.gradient(dz, kept, a, b)
        else:
            z = centred * scale + bias
            if residual_pointer is not None:
                z += widen(tl.load(residual_pointer + start + offsets, mask=inside, other=0), COMPUTE)
            dz = gradient_from_input(dz, z, a, b, ACTIVATION)
        if dz_pointer is not None:
            tl.store(dz_pointer + start + offsets, narrow(dz, dz_pointer.dtype.element_ty), mask=inside)
        dz = tl.where(present, dz, 0.0)
        sums += dz
        products += dz * centred

    target = partial_pointer + split * 2 * channels + channel
    mask = channel < channels
    tl.store(target, tl.sum(sums.to(tl.float64), axis=AXIS, keep_dims=True), mask=mask)
    products_sum = tl.sum(products.to(tl.float64), axis=AXIS, keep_dims=True)
    tl.store(target + channels, products_sum * inverse_deviation, mask=mask)


@kernel
def gradient_kernel(
    g_pointer,  # gradient of the output, as x
    x_pointer,  # input, (outer, channels, inner)
    dx_pointer,  # gradient of the input, as x
    sums_pointer,  # (2, channels): sums of dz and of dz * normalised x; or None where the statistics are constants
    mean_pointer,  # (channels,)
    variance_pointer,
    weight_pointer,  # (channels,), or None
    bias_pointer,
    outer: tl.int64,
    channels,
    columns,
    channel_blocks: tl.int64,
    tracks: tl.int64,
    length: tl.int64,
    steps: tl.int64,
    along_inner: tl.int32,
    share: tl.float64,  # 1 / the number of values that the sums are over
    eps: tl.float64,
    a: tl.float64,
    b: tl.float64,
    ACTIVATION: tl.constexpr,
    AXIS: tl.constexpr,
    COMPUTE: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    channel_block, track, first, end, _split = program_place(channel_blocks, tracks, length, steps)
    channel = channel_tile(channel_block, AXIS, HEIGHT, WIDTH)
    mean, inverse_deviation, scale, bias = normalisation(
        mean_pointer, variance_pointer, weight_pointer, bias_pointer, channel, channels, eps, COMPUTE
    )
    if sums_pointer is not None:
        mask = channel < channels
        mean_dz = (tl.load(sums_pointer + channel, mask=mask, other=0) * share).to(COMPUTE)
        mean_product = (tl.load(sums_pointer + channels + channel, mask=mask, other=0) * share).to(COMPUTE)
        slope = mean_product * inverse_deviation
    a = scalar(a, COMPUTE)
    b = scalar(b, COMPUTE)
    for ahead in range(first, end):
        step = first + end - 1 - ahead  # backward
        start, offsets, _present, inside = tile_place(
            step, channel_block, track, outer, channels, columns, along_inner, AXIS, HEIGHT, WIDTH
        )
        dx = widen(tl.load(g_pointer + start + offsets, mask=inside, other=0), COMPUTE)
        if ACTIVATION.saves != "nothing" or sums_pointer is not None:
            x = widen(tl.load(x_pointer + start + offsets, mask=inside, other=0), COMPUTE)
            centred = x - mean
            dx = gradient_from_input(dx, centred * scale + bias, a, b, ACTIVATION)
            if sums_pointer is not None:
                dx = dx - mean_dz - centred * slope
        dx = dx * scale
        tl.store(dx_pointer + start + offsets, narrow(dx, dx_pointer.dtype.element_ty), mask=inside)


# --- Configurations -------------------------------------------------------------------------------------------------

# Widths of a tile by its reduced axis.  The widest is taken that needs at most a third more lanes than the best.
_WIDTHS = {0: (16, 64, 256), 1: (16, 64, 256, TILE)}

# Programs that a pass is split into, where it has work for as many.  Four on each of an H100's multiprocessors are
# resident at once, with up to 128 registers a thread.  A constant, so that results don't depend on the GPU.
_PROGRAMS = 512

# Splits and channels that a program merges at once.
_MERGE_SPLITS, _MERGE_CHANNELS = 256, 8

_EXTENTS = (
    ("outer", "i64"),
    ("channels", "i32"),
    ("columns", "i32"),
    ("channel_blocks", "i64"),
    ("tracks", "i64"),
    ("length", "i64"),
    ("steps", "i64"),
    ("along_inner", "i32"),
)
_PARAMETERS = ("mean_pointer", "variance_pointer", "weight_pointer", "bias_pointer")


@dataclass(frozen=True)
class _Tiling:
    axis: int
    width: int

    @property
    def height(self) -> int:
        return TILE // self.width

    def __str__(self) -> str:
        return f"{'rows' if self.axis == 1 else 'columns'} x{self.width}"


_TILINGS = tuple(_Tiling(axis, width) for axis, widths in _WIDTHS.items() for width in widths)


def _tilings_of(dtype: torch.dtype) -> tuple[_Tiling, ...]:
    """Of the widest rows, float64 statistics don't fit into registers."""
    return tuple(tiling for tiling in _TILINGS if dtype is not torch.float64 or tiling.width < TILE)


def _configuration(
    label: str,
    kernel: Any,
    dtype: torch.dtype,
    tiling: _Tiling,
    pointers: dict[str, str | None],
    scalars: tuple[str, ...] = (),
    constants: tuple[tuple[str, Any], ...] = (),
    *,
    wide_loads: int,
    wide_stores: int,
) -> Configuration:
    """``pointers`` gives each pointer's type, or None where there is none: a missing pointer is a constant."""
    rows = tile_shape(dtype)[0] if tiling.width >= 64 else 0  # narrower rows are narrower than a warp's accesses
    return Configuration(
        label=f"batch norm {label} {tiling} {TRITON_TYPE[dtype]}",
        kernel=kernel,
        signature=(
            *((name, kind) for name, kind in pointers.items() if kind),
            *_EXTENTS,
            *((name, "fp64") for name in scalars),
        ),
        constants=(
            *((name, None) for name, kind in pointers.items() if not kind),
            *constants,
            ("AXIS", tiling.axis),
            ("COMPUTE", COMPUTE[dtype]),
            ("HEIGHT", tiling.height),
            ("WIDTH", tiling.width),
        ),
        threads=threads_for(dtype),
        divisible=("columns",),
        wide_loads=wide_loads * rows,
        wide_stores=wide_stores * rows,
    )


def _types(dtype: torch.dtype) -> tuple[str, str]:
    """Pointer types of elements and of statistics."""
    return "*" + TRITON_TYPE[dtype], "*" + TRITON_TYPE[ACCUMULATOR[dtype]]


def _parameters(dtype: torch.dtype, affine: bool) -> dict[str, str | None]:
    statistic = _types(dtype)[1]
    return {name: statistic if affine or name[0] in "mv" else None for name in _PARAMETERS}


@cache
def _statistics(dtype: torch.dtype, tiling: _Tiling) -> Configuration:
    element, statistic = _types(dtype)
    pointers: dict[str, str | None] = {"x_pointer": element, "partial_pointer": statistic}
    return _configuration("statistics", statistics_kernel, dtype, tiling, pointers, wide_loads=1, wide_stores=0)


@cache
def _merge(dtype: torch.dtype, tracked: bool, averaged: bool) -> Configuration:
    statistic = "*" + TRITON_TYPE[dtype]
    pointers = {
        "partial_pointer": statistic,
        "mean_pointer": statistic,
        "variance_pointer": statistic,
        "running_mean_pointer": statistic if tracked else None,
        "running_variance_pointer": statistic if tracked else None,
        "batches_pointer": "*i64" if averaged else None,
    }
    return Configuration(
        label=f"batch norm merge{' tracked' * tracked}{' averaged' * averaged} {TRITON_TYPE[dtype]}",
        kernel=merge_kernel,
        signature=(
            *((name, kind) for name, kind in pointers.items() if kind),
            ("splits", "i64"),
            ("channels", "i64"),
            ("momentum", "fp64"),
        ),
        constants=(
            *((name, None) for name, kind in pointers.items() if not kind),
            ("HEIGHT", _MERGE_SPLITS),
            ("WIDTH", _MERGE_CHANNELS),
        ),
        threads=256,
    )


@cache
def _normalise(
    dtype: torch.dtype, tiling: _Tiling, row: Activation, residual: bool, masked: bool, affine: bool
) -> Configuration:
    element, _ = _types(dtype)
    parts = (
        "forward",
        row.label,
        residual and "+ residual",
        masked and "+ mask",
        not affine and "not affine",
    )
    pointers = {
        "x_pointer": element,
        "residual_pointer": element if residual else None,
        "y_pointer": element,
        "mask_pointer": "*u8" if masked else None,
        **_parameters(dtype, affine),
    }
    return _configuration(
        " ".join(part for part in parts if part),
        normalise_kernel,
        dtype,
        tiling,
        pointers,
        ("eps", "a", "b"),
        (("ACTIVATION", row),),
        wide_loads=2 if residual else 1,
        wide_stores=1,
    )


@cache
def _reduce(
    dtype: torch.dtype, tiling: _Tiling, row: Activation, residual: bool, masked: bool, affine: bool
) -> Configuration:
    element, _ = _types(dtype)
    parts = (
        "reduce",
        row.label,
        residual and "+ residual",
        masked and "+ mask",
        not affine and "not affine",
    )
    pointers = {
        "g_pointer": element,
        "x_pointer": element,
        "residual_pointer": element if residual else None,
        "mask_pointer": "*u8" if masked else None,
        "dz_pointer": element if residual or masked else None,
        "partial_pointer": "*fp64",
        **_parameters(dtype, affine),
    }
    return _configuration(
        " ".join(part for part in parts if part),
        reduce_kernel,
        dtype,
        tiling,
        pointers,
        ("eps", "a", "b"),
        (("ACTIVATION", row),),
        wide_loads=3 if residual else 2,
        wide_stores=1 if residual or masked else 0,
    )


@cache
def _gradient(dtype: torch.dtype, tiling: _Tiling, row: Activation, training: bool, affine: bool) -> Configuration:
    element, _ = _types(dtype)
    parts = (
        "backward",
        row.label,
        not training and "evaluation",
        not affine and "not affine",
    )
    pointers = {
        "g_pointer": element,
        "x_pointer": element,
        "dx_pointer": element,
        "sums_pointer": "*fp64" if training else None,
        **_parameters(dtype, affine),
    }
    return _configuration(
        " ".join(part for part in parts if part),
        gradient_kernel,
        dtype,
        tiling,
        pointers,
        ("share", "eps", "a", "b"),
        (("ACTIVATION", row),),
        wide_loads=2 if training or row is not IDENTITY.row else 1,
        wide_stores=1,
    )


# Tiles that most variants are compiled with, one of each axis: what varies knows nothing of the tile around it, and the
# tiles' own code is compiled, for every type, without an activation.
_COMMON_TILINGS = (_Tiling(0, 64), _Tiling(1, 256))


@ships("batch_norm")
def configurations() -> Iterator[Configuration]:
    usual = dict.fromkeys(_usual_configurations())
    yield from usual
    yield from (replace(other, rare=True) for other in dict.fromkeys(_other_configurations()) if other not in usual)


def _usual_configurations() -> Iterator[Configuration]:
    yield _merge(torch.float32, True, True)
    yield _merge(torch.float64, False, False)
    for tiling in _TILINGS:
        yield from _plain(torch.bfloat16, tiling)
    for tiling in _COMMON_TILINGS:
        yield from _plain(torch.float32, tiling)
        yield from _plain(torch.float64, tiling)
        yield from _fused(torch.bfloat16, tiling, ACTIVATIONS["relu"])
    rows = _COMMON_TILINGS[1]
    yield from _plain(torch.float16, rows)
    yield _normalise(torch.bfloat16, rows, IDENTITY.row, False, False, False)
    yield _gradient(torch.bfloat16, rows, IDENTITY.row, False, True)
    for name in ("gelu", "tanh"):
        yield _reduce(torch.float32, rows, ACTIVATIONS[name], False, False, True)


def _other_configurations() -> Iterator[Configuration]:
    for dtype in (torch.float32, torch.float64):
        for tracked, averaged in ((False, False), (True, False), (True, True)):
            yield _merge(dtype, tracked, averaged)
    for dtype in DTYPES:
        for tiling in _tilings_of(dtype):
            yield from _plain(dtype, tiling)
    for dtype, tiling in product(DTYPES, _COMMON_TILINGS):
        yield from _fused(dtype, tiling, ACTIVATIONS["relu"])
        yield _normalise(dtype, tiling, IDENTITY.row, False, False, False)
        yield _gradient(dtype, tiling, IDENTITY.row, True, False)
        yield _gradient(dtype, tiling, IDENTITY.row, False, True)
    for row in ACTIVATIONS.values():
        yield from _fused(torch.float32, _COMMON_TILINGS[1], row)


def _plain(dtype: torch.dtype, tiling: _Tiling) -> Iterator[Configuration]:
    """Training without an activation."""
    yield _statistics(dtype, tiling)
    yield _normalise(dtype, tiling, IDENTITY.row, False, False, True)
    yield _reduce(dtype, tiling, IDENTITY.row, False, False, True)
    yield _gradient(dtype, tiling, IDENTITY.row, True, True)


def _fused(dtype: torch.dtype, tiling: _Tiling, row: Activation) -> Iterator[Configuration]:
    """Training with an activation, alone and after a residual."""
    masked = row.saves == "mask"
    yield _normalise(dtype, tiling, row, False, False, True)
    yield _reduce(dtype, tiling, row, False, False, True)
    yield _gradient(dtype, tiling, row, True, True)
    yield _normalise(dtype, tiling, row, True, masked, True)
    yield _reduce(dtype, tiling, row, not masked, masked, True)


# --- Launchers ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """A dense tensor seen as (outer, channels, inner), and its division into programs."""

    tiling: _Tiling
    outer: int
    channels: int
    columns: int
    channel_blocks: int
    tracks: int
    length: int
    steps: int
    along_inner: bool

    @cached_property
    def splits(self) -> int:
        return self.tracks * cdiv(self.length, self.steps)

    @cached_property
    def programs(self) -> int:
        return self.splits * self.channel_blocks

    @cached_property
    def extents(self) -> tuple[int, ...]:
        return (
            self.outer,
            self.channels,
            self.columns,
            self.channel_blocks,
            self.tracks,
            self.length,
            self.steps,
            int(self.along_inner),
        )


def _tiling_for(dtype: torch.dtype, axis: int, columns: int, rows: int) -> _Tiling:
    """Tiles for a matrix of ``columns``, of which ``rows`` rows may share a tile."""
    tilings = [tiling for tiling in _tilings_of(dtype) if tiling.axis == axis]
    lanes = [
        cdiv(columns, tiling.width) * tiling.width * cdiv(rows, tiling.height) * tiling.height for tiling in tilings
    ]
    fewest = min(lanes)
    return next(
        tiling for tiling, count in zip(reversed(tilings), reversed(lanes), strict=True) if 3 * count <= 4 * fewest
    )


def plan_of(x: Tensor) -> Plan:
    """The division of the dense ``x`` into programs: a function of its shape and strides."""
    channels = x.shape[1]
    # Dense memory: the dimensions inside a channel span its stride, whatever their order.
    inner = x.numel() if channels == 1 else x.stride(1)
    outer = x.numel() // (channels * inner)
    # In a traced function sizes may be symbolic, and can't be a key.
    plan = _plan if type(outer) is int else _plan.__wrapped__
    return plan(x.dtype, outer, channels, inner)


@lru_cache(maxsize=4096)
def _plan(dtype: torch.dtype, outer: int, channels: int, inner: int) -> Plan:
    axis, columns = (0, channels) if inner == 1 else (1, inner)
    tiling = _tiling_for(dtype, axis, columns, channels if axis == 1 else outer)
    width = tiling.width
    if axis == 0:
        channel_blocks, tracks, length = cdiv(columns, width), 1, cdiv(outer, tiling.height)
    else:
        channel_blocks = cdiv(channels, tiling.height)
        tracks, length = sorted((outer, cdiv(columns, width)))
    steps = cdiv(length, max(1, _PROGRAMS // (channel_blocks * tracks)))
    along_inner = axis == 1 and length != outer
    return Plan(tiling, outer, channels, columns, channel_blocks, tracks, length, steps, along_inner)


def _launch(configuration: Configuration, plan: Plan, pointers: tuple[Tensor | None, ...], *scalars: float) -> None:
    given = (pointer for pointer in pointers if pointer is not None)
    launch(configuration, plan.programs, *given, *plan.extents, *scalars)


def _vectors(
    dtype: torch.dtype, mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Statistics and parameters as kernels take them: of the statistics' type; weight and bias both, or neither."""
    if weight is None and bias is not None:
        weight = torch.ones_like(bias)
    elif bias is None and weight is not None:
        bias = torch.zeros_like(weight)
    statistic = ACCUMULATOR[dtype]
    return tuple(
        v if v is None or (v.dtype is statistic and v.is_contiguous()) else v.to(statistic).contiguous()
        for v in (mean, variance, weight, bias)
    )


def partial_statistics(x: Tensor) -> Tensor:
    """(splits, 3, channels): of each part of each channel its count, mean, and sum of squared deviations."""
    x = dense(x)
    if not x.numel():
        return torch.zeros((1, 3, x.shape[1]), dtype=ACCUMULATOR[x.dtype], device=x.device)
    plan = plan_of(x)
    partial = torch.empty((plan.splits, 3, plan.channels), dtype=ACCUMULATOR[x.dtype], device=x.device)
    _launch(_statistics(x.dtype, plan.tiling), plan, (x, partial))
    return partial


def merge_statistics(
    partial: Tensor,
    running_mean: Tensor | None,
    running_variance: Tensor | None,
    batches: Tensor | None,
    momentum: float,
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel, from (splits, 3, channels) of `partial_statistics`.

    Updates the running statistics where there are any (the variance with the unbiased one): by ``momentum``, or with
    ``batches``, the number of batches so far, to their average over the batches.
    """
    splits, _, channels = partial.shape
    mean, variance = (torch.empty(channels, dtype=partial.dtype, device=partial.device) for _ in range(2))
    running = (running_mean, running_variance)
    updated = [None if statistic is None else statistic.to(partial.dtype) for statistic in running]
    configuration = _merge(partial.dtype, running_mean is not None, batches is not None)
    pointers = (pointer for pointer in (partial, mean, variance, *updated, batches) if pointer is not None)
    launch(configuration, cdiv(channels, _MERGE_CHANNELS), *pointers, splits, channels, momentum)
    for statistic, update in zip(running, updated, strict=True):
        if update is not statistic and statistic is not None and update is not None:
            statistic.copy_(update)
    return mean, variance


def mask_bytes(x: Tensor) -> int:
    """Bytes of the packed mask for the dense ``x``, whole tiles.  Sizes may be symbolic."""
    if not x.numel():
        return 0
    plan = plan_of(x)
    tiles: int = plan.tracks * plan.length * plan.channel_blocks
    return tiles * MASK_BYTES


def batch_norm_forward(
    x: Tensor,
    residual: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: Activated,
    *,
    masked: bool,
) -> tuple[Tensor, Tensor | None]:
    """activation((x - mean) / sqrt(variance + eps) * weight + bias + residual), in the memory order of ``x``.

    With ``masked``, also the packed bits that the activation's gradient needs.
    """
    x = dense(x)
    y = torch.empty_like(x)
    mask = torch.empty(mask_bytes(x), dtype=torch.uint8, device=x.device) if masked else None
    if not x.numel():
        return y, mask
    plan = plan_of(x)
    if residual is not None:
        residual = dense_like(residual, x.stride())
    vectors = _vectors(x.dtype, mean, variance, weight, bias)
    affine = vectors[2] is not None
    configuration = _normalise(x.dtype, plan.tiling, activation.row, residual is not None, masked, affine)
    _launch(configuration, plan, (x, residual, y, mask, *vectors), eps, activation.a, activation.b)
    return y, mask


def batch_norm_reduce(
    g: Tensor,
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: Activated,
) -> tuple[Tensor, Tensor | None]:
    """Sums over each channel, (2, channels): of dz, the gradient before the activation, and of dz * normalised x.

    With a residual or the mask, whose activation's input can't be computed from ``x`` alone, also dz itself.
    """
    x = dense(x)
    g = dense_like(g, x.stride())
    dz = torch.empty_like(x) if residual is not None or mask is not None else None
    if not x.numel():
        return torch.zeros((2, x.shape[1]), dtype=torch.float64, device=x.device), dz
    plan = plan_of(x)
    if residual is not None:
        residual = dense_like(residual, x.stride())
    partial = torch.empty((plan.splits, 2, plan.channels), dtype=torch.float64, device=x.device)
    vectors = _vectors(x.dtype, mean, variance, weight, bias)
    affine = vectors[2] is not None
    configuration = _reduce(x.dtype, plan.tiling, activation.row, residual is not None, mask is not None, affine)
    _launch(configuration, plan, (g, x, residual, mask, dz, partial, *vectors), eps, activation.a, activation.b)
    return partial.sum(0), dz


def batch_norm_backward(
    g: Tensor,
    x: Tensor,
    sums: Tensor | None,
    share: float,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: Activated,
) -> Tensor:
    """Gradient of the input.

    ``sums`` are those of `batch_norm_reduce`, and ``share`` is 1 / the number of values that they are over; None where
    the statistics don't depend on ``x``.
    """
    x = dense(x)
    g = dense_like(g, x.stride())
    dx = torch.empty_like(x)
    if not x.numel():
        return dx
    plan = plan_of(x)
    vectors = _vectors(x.dtype, mean, variance, weight, bias)
    configuration = _gradient(x.dtype, plan.tiling, activation.row, sums is not None, vectors[2] is not None)
    _launch(configuration, plan, (g, x, dx, sums, *vectors), share, eps, activation.a, activation.b)
    return dx
