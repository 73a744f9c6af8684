"""Batch norm's statistics: mean and variance of channels, of a tensor or of what a convolution left of it.

Each lane of a tile keeps its own running mean and sum of squared deviations (Welford), so nothing is exchanged between
threads until the end.  Programs write (count, mean, squared deviations), and what comes next merges them in a fixed
order (Chan, Golub, LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances", 1979): the
programs that normalise, or a small launch of its own where something else does.  Sums of squares, which cancel, never
appear: a constant channel has a variance of exactly 0.

Statistics are float32 (float64 for float64), and so is all arithmetic of the large launches: many GPUs do float64 at a
64th of the rate.  Lanes and programs merge about a mean that is nearly theirs, so no large terms cancel.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .base._triton import tl, triton
from .base.channels import (
    Plan,
    Tiling,
    channel_tile,
    common_tilings_of,
    configure_channels,
    lanes,
    lanes_inside,
    launch_over,
    plan_of,
    program_place,
    tile_place,
    tilings_of,
)
from .base.launch import ACCUMULATOR, DTYPES, TRITON_TYPE, Configuration, configure, kernel, launch, ships
from .base.layout import dense
from .base.numerics import divide, narrow, precise_sum, scalar, widen
from .base.tiles import aligned, cdiv, load
from .batch_norm_operands import Before
from .functions.activation import ACTIVATIONS, IDENTITY, Activation

__all__ = [
    "before_constants",
    "channel_shift",
    "copy_back",
    "merge_partial",
    "merge_statistics",
    "partial_over",
    "partial_statistics",
    "store_moments",
    "store_statistics",
    "value_before",
]

# --- Before the norm --------------------------------------------------------------------------------------------------


def before_constants(row: Activation | None, shifted: bool) -> dict[str, Any]:
    """Constants of kernels that can be told of an activation before the norm."""
    return {"BEFORE": row, **({} if shifted else {"shift_pointer": None})}


@triton.jit
def channel_shift(shift_pointer, channel, channels, COMPUTE):
    """What is added to each channel before the activation before the norm."""
    if shift_pointer is not None:
        return widen(tl.load(shift_pointer + channel, mask=channel < channels, other=0), COMPUTE)
    else:
        return tl.zeros(channel.shape, COMPUTE)


@triton.jit
def value_before(x, shift, a, b, BEFORE: tl.constexpr):
    """What is normalised of the input."""
    if BEFORE is None:
        return x
    else:
        return BEFORE.forward(x + shift, scalar(a, x.dtype), scalar(b, x.dtype))


# --- Kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def store_statistics(partial_pointer, split, channel, channels, count, mean, deviations):
    """Store what a program has of these channels: count, mean and sum of squared deviations."""
    element: tl.constexpr = partial_pointer.dtype.element_ty
    target = partial_pointer + split * 3 * channels + channel
    inside = channel < channels
    tl.store(target, (count + tl.zeros(channel.shape, count.dtype)).to(element), mask=inside)
    tl.store(target + channels, mean.to(element), mask=inside)
    tl.store(target + 2 * channels, deviations.to(element), mask=inside)


@triton.jit
def merge_lanes(count, mean, deviations, total, TILING: tl.constexpr, PRECISE: tl.constexpr):
    """Mean and sum of squared deviations of all lanes of each channel, which have ``total`` values.

    They are measured from the first lane's mean, then from the mean itself.  What that lost by rounding, and each
    distance from it, corrects it: the sum of all distances is 0.  ``PRECISE``: that sum is as accurate as float64's.
    """
    first_lane = lanes(TILING) == 0
    origin = tl.sum(tl.where(first_lane, mean, 0.0), axis=TILING.axis, keep_dims=True)
    shift = divide(tl.sum(count * (mean - origin), axis=TILING.axis, keep_dims=True), total)
    moved = origin + shift
    lost = (origin - (moved - shift)) + (shift - (moved - (moved - shift)))  # by rounding (Knuth's TwoSum)
    difference = mean - moved
    if PRECISE:
        behind = difference - mean
        rounded = ((mean - (difference - behind)) - (moved + behind)) - lost  # off the difference
        rest = precise_sum(count * difference, TILING.axis) + tl.sum(count * rounded, axis=TILING.axis, keep_dims=True)
        distance = difference + rounded
    else:
        distance = difference - lost
        rest = tl.sum(count * distance, axis=TILING.axis, keep_dims=True)
    deviations = tl.sum(deviations + count * distance * distance, axis=TILING.axis, keep_dims=True)
    return moved + (lost + divide(rest, total)), deviations


@triton.jit
def merge_partial(
    partial_pointer,
    splits,
    channel,
    channels,
    total,
    TILING: tl.constexpr,
):
    """Mean and biased variance of each channel of ``total`` values, from what programs of this geometry left."""
    split = lanes(TILING)
    inside = split < splits
    partial_pointer += split.to(tl.int64) * 3 * channels
    count = tl.load(partial_pointer, mask=inside, other=0)  # all channels have as many values
    inside = inside & (channel < channels)
    mean = tl.load(partial_pointer + channels + channel, mask=inside, other=0)
    deviations = tl.load(partial_pointer + 2 * channels + channel, mask=inside, other=0)
    # Every program merges, and there are few to merge: plain sums.
    mean, deviations = merge_lanes(count, mean, deviations, total, TILING, False)
    return mean, divide(deviations, total)


@triton.jit
def store_moments(
    mean_pointer,
    variance_pointer,
    running_mean_pointer,
    running_variance_pointer,
    batches_pointer,
    channel,
    inside,
    mean,
    variance,
    count,
    momentum,
):
    """Store statistics of ``count`` values (float64 all), and update the running ones."""
    tl.store(mean_pointer + channel, mean.to(mean_pointer.dtype.element_ty), mask=inside)
    tl.store(variance_pointer + channel, variance.to(variance_pointer.dtype.element_ty), mask=inside)
    if running_mean_pointer is not None:
        if batches_pointer is not None:
            rate = 1 / tl.load(batches_pointer).to(tl.float64)
        else:
            rate = scalar(momentum, tl.float64)
        running_mean = widen(tl.load(running_mean_pointer + channel, mask=inside, other=0), tl.float64)
        running_variance = widen(tl.load(running_variance_pointer + channel, mask=inside, other=0), tl.float64)
        new_mean = rate * mean + (1 - rate) * running_mean
        new_variance = rate * (variance * (count / (count - 1))) + (1 - rate) * running_variance
        element: tl.constexpr = running_mean_pointer.dtype.element_ty
        tl.store(running_mean_pointer + channel, narrow(new_mean, element), mask=inside)
        tl.store(running_variance_pointer + channel, narrow(new_variance, element), mask=inside)


@kernel
def batch_norm_statistics_kernel(
    x_pointer,  # input, (outer, channels, inner)
    partial_pointer,  # (splits, 3, channels): count, mean, sum of squared deviations
    shift_pointer,  # (channels,), added before the activation before the norm; or None
    outer: tl.int64,
    channels,
    columns,
    channel_blocks: tl.int64,
    tracks: tl.int64,
    tiles_per_track: tl.int64,
    tiles_per_program: tl.int64,
    along_inner: tl.int32,
    before_a: tl.float64,  # of that activation
    before_b: tl.float64,
    BEFORE: tl.constexpr,  # that activation; or None
    TILING: tl.constexpr,
    COMPUTE: tl.constexpr,
    STAGES: tl.constexpr,
    ALIGN: tl.constexpr,
):
    columns = aligned(columns, ALIGN)
    channel_block, track, first, end, split = program_place(channel_blocks, tracks, tiles_per_track, tiles_per_program)
    channel = channel_tile(channel_block, TILING)
    shift = channel_shift(shift_pointer, channel, channels, COMPUTE)
    mean = tl.full(TILING.shape, 0.0, COMPUTE)
    deviations = tl.full(TILING.shape, 0.0, COMPUTE)
    for step in tl.range(first, end, num_stages=STAGES):
        tile, present = tile_place(step, channel_block, track, outer, channels, columns, along_inner, TILING)
        x = value_before(load(x_pointer, tile, COMPUTE), shift, before_a, before_b, BEFORE)
        # A lane that is present now was present in all steps before: the step tells its count.
        rate = divide(scalar(1.0, COMPUTE), (step - first + 1).to(tl.int32).to(COMPUTE))
        difference = tl.where(present, x - mean, 0.0)
        mean += difference * rate
        deviations += difference * (x - mean)

    # A lane that starts inside leaves at the last step, if at all: the steps before have all lanes of the first.
    before = end - first - 1
    starts = lanes_inside(first, track, outer, columns, along_inner, TILING)
    stays = lanes_inside(end - 1, track, outer, columns, along_inner, TILING)
    lane = lanes(TILING)
    count = tl.where(lane < starts, before.to(COMPUTE), 0.0) + (lane < stays).to(COMPUTE)
    total = (starts * before + stays).to(COMPUTE)
    mean, deviations = merge_lanes(count, mean, deviations, total, TILING, True)
    store_statistics(partial_pointer, split, channel, channels, total, mean, deviations)


@triton.jit
def load_parts(partial_pointer, split, splits, channels, mask, HEIGHT: tl.constexpr):
    """Of splits from this one on: their rows, which of them are there, and their counts and means."""
    row = split + tl.arange(0, HEIGHT)[:, None]
    inside = (row < splits) & mask
    count = tl.load(partial_pointer + row * 3 * channels, mask=inside, other=0).to(tl.float64)
    return row, inside, count, tl.load(partial_pointer + (row * 3 + 1) * channels, mask=inside, other=0)


@kernel
def batch_norm_merge_kernel(
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
        _row, inside, n, mean = load_parts(partial_pointer, split, splits, channels, mask, HEIGHT)
        count += n
        weighted += tl.where(inside, n * (mean - origin), 0.0)
    count = tl.where(mask, tl.sum(count, axis=0, keep_dims=True), 2.0)  # no division by 0 outside
    shift = tl.sum(weighted, axis=0, keep_dims=True) / count

    deviations = tl.zeros((HEIGHT, WIDTH), tl.float64)
    for split in range(0, splits, HEIGHT):
        row, inside, n, mean = load_parts(partial_pointer, split, splits, channels, mask, HEIGHT)
        distance = mean - origin - shift
        own = tl.load(partial_pointer + (row * 3 + 2) * channels, mask=inside, other=0)
        deviations += tl.where(inside, own + n * distance * distance, 0.0)
    deviations = tl.sum(deviations, axis=0, keep_dims=True)

    store_moments(
        *(mean_pointer, variance_pointer, running_mean_pointer, running_variance_pointer, batches_pointer),
        *(channel, mask, origin + shift, deviations / count, count, momentum),
    )


# --- Configurations ---------------------------------------------------------------------------------------------------

# Splits and channels that a program merges at once.
_MERGE_SPLITS, _MERGE_CHANNELS = 256, 8


@cache
def _statistics(
    dtype: torch.dtype,
    tiling: Tiling,
    before: Activation | None = None,
    shifted: bool = False,
) -> Configuration:
    told = "" if before is None else f" of {before.name}{' of sums' * shifted}"
    return configure_channels(
        batch_norm_statistics_kernel,
        f"batch norm statistics{told}",
        dtype,
        tiling,
        before_constants(before, shifted),
        pointers={"partial": ACCUMULATOR[dtype], "shift": dtype},
        wide_loads=1,
        wide_stores=0,
    )


@cache
def _merge(dtype: torch.dtype, tracked: bool, averaged: bool) -> Configuration:
    absent = {"running_mean": not tracked, "running_variance": not tracked, "batches": not averaged}
    return configure(
        batch_norm_merge_kernel,
        f"batch norm merge{' tracked' * tracked}{' averaged' * averaged} {TRITON_TYPE[dtype]}",
        dtype,
        {
            **{f"{name}_pointer": None for name, missing in absent.items() if missing},
            "HEIGHT": _MERGE_SPLITS,
            "WIDTH": _MERGE_CHANNELS,
        },
        pointers={"batches": torch.int64},
        threads=256,
    )


# Whether running statistics are tracked, and whether they are averages.
_MERGED = ((False, False), (True, False), (True, True))


@ships("batch_norm")
def configurations() -> Iterator[Configuration]:
    usual = (
        _merge(torch.float32, True, True),
        _merge(torch.float64, False, False),
        *(_statistics(torch.bfloat16, tiling) for tiling in tilings_of(torch.bfloat16)),
        *(_statistics(dtype, tiling) for dtype in DTYPES for tiling in common_tilings_of(dtype)),
        *(
            _statistics(torch.bfloat16, tiling, ACTIVATIONS["relu"], True)
            for tiling in common_tilings_of(torch.bfloat16)
        ),
    )
    every = (
        *(_merge(dtype, *kind) for dtype in (torch.float32, torch.float64) for kind in _MERGED),
        *(_statistics(dtype, tiling) for dtype in DTYPES for tiling in tilings_of(dtype)),
        *(_statistics(torch.float32, common_tilings_of(torch.float32)[1], row, True) for row in ACTIVATIONS.values()),
    )
    yield from dict.fromkeys(usual)
    yield from (replace(other, rare=True) for other in every if other not in usual)


# --- Launchers --------------------------------------------------------------------------------------------------------


def partial_statistics(x: Tensor) -> Tensor:
    """(splits, 3, channels): of each part of each channel its count, mean, and sum of squared deviations."""
    x = dense(x)
    if not x.numel():
        return torch.zeros((1, 3, x.shape[1]), dtype=ACCUMULATOR[x.dtype], device=x.device)
    return partial_over(x, plan_of(x))


def partial_over(x: Tensor, plan: Plan, before: Before | None = None) -> Tensor:
    """`partial_statistics` of the dense ``x``, or of what comes ``before``, by the programs of its plan."""
    partial = torch.empty((plan.splits, 3, plan.channels), dtype=ACCUMULATOR[x.dtype], device=x.device)
    first, shift = (IDENTITY, None) if before is None else before
    configuration = _statistics(x.dtype, plan.tiling, None if before is None else first.row, shift is not None)
    launch_over(configuration, plan, (x, partial, shift), first.a, first.b)
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
    copy_back(running, updated)
    return mean, variance


def copy_back(statistics: Iterable[Tensor | None], updated: Iterable[Tensor | None]) -> None:
    """Give running statistics that were updated in another type, or a copy, their new values."""
    for statistic, update in zip(statistics, updated, strict=True):
        if update is not statistic and statistic is not None and update is not None:
            statistic.copy_(update)
