"""Batch norm's last pass where of each channel of a sample only the maximum, or the mean, over all places is wanted.

A program has a block of channels of one sample, and walks over its places; the normalised and activated tensor is never
written.  Of the maximum its place is kept, and the input there: sums of gradients are over these alone.  Without
statistics it is a bias, an activation and the reduction.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .base._triton import tl, triton
from .base.channels import Tiling, channel_tile, common_tilings_of, lanes, tile_place, tiling_for, tilings_of
from .base.launch import ACCUMULATOR, DTYPES, Configuration, kernel, launch, ships
from .base.numerics import divide, narrow, precise_sum, scalar, widen
from .base.tiles import aligned, cdiv, load
from .batch_norm import channel_slopes, configuration_of, normalisation
from .batch_norm_operands import Around, Norm
from .functions.activation import ACTIVATIONS, IDENTITY, PRELU, Activation

__all__ = ["MOST_PLACES", "batch_norm_pool", "shared_gradient"]

#: Places of a channel that 32 bits can count.
MOST_PLACES = 2**31 - 2**15

# --- Kernel -----------------------------------------------------------------------------------------------------------


@kernel
def batch_norm_pool_kernel(
    x_pointer,  # input, (samples, channels, places), channels last or not
    y_pointer,  # (samples, channels): the maxima or means of activation(normalised x)
    winner_pointer,  # (samples, channels): the input where the maximum is; or None
    position_pointer,  # (samples, channels): its place; or None
    mean_pointer,  # (channels,); or None: the input is taken as it is
    variance_pointer,
    weight_pointer,  # (channels,), or None
    bias_pointer,  # (channels,), or None
    slope_pointer,  # PReLU's slopes, (slopes,), which take the place of ``a``; or None
    channels,
    places,
    columns,  # places, or channels where these are last
    channel_blocks: tl.int64,
    steps: tl.int32,
    eps: tl.float64,
    a: tl.float64,
    b: tl.float64,
    slopes,  # one, or one for each channel; or None
    ACTIVATION: tl.constexpr,
    MAXIMUM: tl.constexpr,
    TILING: tl.constexpr,
    COMPUTE: tl.constexpr,
    STAGES: tl.constexpr,
    ALIGN: tl.constexpr,
):
    columns = aligned(columns, ALIGN)
    program = tl.program_id(0).to(tl.int64)
    channel_block = program % channel_blocks
    sample = program // channel_blocks
    channel = channel_tile(channel_block, TILING)
    mean, _, scale, bias = normalisation(
        mean_pointer, variance_pointer, weight_pointer, bias_pointer, channel, channels, eps, COMPUTE
    )
    a = channel_slopes(slope_pointer, scalar(a, COMPUTE), channel, channels, slopes, COMPUTE)
    b = scalar(b, COMPUTE)
    track = sample
    if TILING.axis == 0:
        x_pointer += sample * places * columns
        track = 0
    sums = tl.full(TILING.shape, 0.0, COMPUTE)
    best = tl.full(TILING.shape, 0.0, COMPUTE)
    winner = tl.full(TILING.shape, 0.0, COMPUTE)
    position = tl.full(TILING.shape, -1, tl.int32)
    for step in tl.range(0, steps, num_stages=STAGES):
        tile, present = tile_place(step, channel_block, track, places, channels, columns, 1, TILING)
        x = load(x_pointer, tile, COMPUTE)
        value = ACTIVATION.forward((x - mean) * scale + bias, a, b)
        if MAXIMUM:
            # The first of equal ones, and the first that isn't a number before all.
            wins = (value > best) | ((value != value) & (best == best)) | (position < 0)
            wins = wins & present
            best = tl.where(wins, value, best)
            winner = tl.where(wins, x, winner)
            position = tl.where(
                wins, step * (TILING.height if TILING.axis == 0 else TILING.width) + lanes(TILING), position
            )
        else:
            sums += tl.where(present, value, 0.0)

    target = sample * channels + channel
    inside = channel < channels
    if MAXIMUM:
        there = position >= 0
        unlike = there & (best != best)
        unlikes = tl.max(unlike.to(tl.int32), axis=TILING.axis, keep_dims=True)
        peak = tl.max(tl.where(there & (unlike == 0), best, float("-inf")), axis=TILING.axis, keep_dims=True)
        leads = there & tl.where(unlikes != 0, unlike, best == peak)
        first = tl.min(tl.where(leads, position, 2147483647), axis=TILING.axis, keep_dims=True)
        leads = leads & (position == first)
        y = tl.sum(tl.where(leads, best, 0.0), axis=TILING.axis, keep_dims=True)
        if position_pointer is not None:
            x = tl.sum(tl.where(leads, winner, 0.0), axis=TILING.axis, keep_dims=True)
            tl.store(winner_pointer + target, narrow(x, winner_pointer.dtype.element_ty), mask=inside)
            tl.store(position_pointer + target, first.to(tl.int64), mask=inside)
    else:
        y = divide(precise_sum(sums, TILING.axis), places.to(COMPUTE))
    tl.store(y_pointer + target, narrow(y, y_pointer.dtype.element_ty), mask=inside)


# --- The gradient ----------------------------------------------------------------------------------------------------


@triton.jit
def shared_gradient(
    g_pointer,
    position_pointer,
    tile,
    step,
    track,
    channel,
    channels,
    places,
    along_inner,
    COMPUTE: tl.constexpr,
    TILING: tl.constexpr,
):
    """The gradient of a tile's elements, where (samples, channels) is that of what was reduced over all places.

    Of a maximum it is that of the element at its position; of a mean all have an equal share.
    """
    if TILING.axis == 1:
        start = tl.where(along_inner != 0, track, step) * channels
        offset = channel.to(tl.int32)
        place = (tl.where(along_inner != 0, step, track) * TILING.width).to(tl.int32) + lanes(TILING)
        inside = channel < channels
    else:
        # Only the first row needs 64 bits.
        first = step * TILING.height
        row = (first % places).to(tl.int32) + lanes(TILING)
        start = first // places * channels
        offset = row // places * channels + channel.to(tl.int32)
        place = row % places
        inside = tile.inside
    g = widen(tl.load(g_pointer + start + offset, mask=inside, other=0), COMPUTE)
    if position_pointer is not None:
        position = tl.load(position_pointer + start + offset, mask=inside, other=-1).to(tl.int32)
        return tl.where(place == position, g, 0.0)
    else:
        return divide(g, scalar(places, COMPUTE)) + tl.full(TILING.shape, 0.0, COMPUTE)


# --- Configurations ---------------------------------------------------------------------------------------------------

_OPTIONAL = ("bias", "mean", "position", "slope", "variance", "weight", "winner")
_NORM = frozenset({"bias", "mean", "variance", "weight"})
_KEPT = frozenset({"position", "winner"})


@cache
def _configuration(
    dtype: torch.dtype,
    tiling: Tiling,
    row: Activation,
    maximum: bool,
    given: frozenset[str],
    parameters: torch.dtype | None = None,
) -> Configuration:
    """``given`` are the pointers that aren't None, of those that may be."""
    return configuration_of(
        batch_norm_pool_kernel,
        f"over all places, {'maximum' if maximum else 'mean'}",
        *(dtype, parameters or ACCUMULATOR[dtype], tiling, row),
        {name: name in given for name in _OPTIONAL},
        {"without statistics": "mean" not in given, "kept": "position" in given},
        wide_loads=1,
        wide_stores=0,
        constants={"MAXIMUM": maximum},
    )


@ships("batch_norm")
def configurations() -> Iterator[Configuration]:
    bfloat16, relu = torch.bfloat16, ACTIVATIONS["relu"]
    usual = [
        *(_configuration(bfloat16, tiling, relu, True, _NORM | _KEPT) for tiling in common_tilings_of(bfloat16)),
        *(_configuration(bfloat16, tiling, relu, False, _NORM) for tiling in common_tilings_of(bfloat16)),
        _configuration(bfloat16, common_tilings_of(bfloat16)[1], relu, True, _KEPT | {"bias"}, bfloat16),
        _configuration(torch.float32, common_tilings_of(torch.float32)[1], PRELU.row, True, _NORM | _KEPT | {"slope"}),
    ]
    every = (
        _configuration(dtype, tiling, row, maximum, given)
        for dtype in DTYPES
        for tiling in tilings_of(dtype)
        for row in (relu, IDENTITY.row)
        for maximum, given in ((True, _NORM | _KEPT), (False, _NORM))
    )
    yield from usual
    yield from (replace(other, rare=True) for other in every if other not in usual)


# --- Launcher ---------------------------------------------------------------------------------------------------------


class _Division(NamedTuple):
    """How the programs of (samples, channels, places) have it."""

    tiling: Tiling
    programs: int
    extents: tuple[int, ...]


@lru_cache(maxsize=4096)
def _divide(dtype: torch.dtype, samples: int, channels: int, places: int, channels_last: bool) -> _Division:
    axis = 0 if channels_last else 1
    columns, rows = (channels, places) if channels_last else (places, channels)
    tiling = tiling_for(dtype, axis, columns, rows)
    channel_blocks = cdiv(channels, tiling.width if channels_last else tiling.height)
    return _Division(
        tiling, samples * channel_blocks, (channels, places, columns, channel_blocks, cdiv(places, tiling.lanes))
    )


def batch_norm_pool(
    x: Tensor, norm: Norm, around: Around, *, maximum: bool, keeps: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """max or mean over all places of activation(norm(x)): nothing before the norm, and no dropout.

    The result is (samples, channels).  ``x`` as of `placed`.  Where it ``keeps`` of the maxima what the gradient needs,
    also the input and its place, int64, counted in the order of memory.
    """
    samples, channels = x.shape[:2]
    places = x.numel() // (samples * channels)
    channels_last = channels > 1 and x.stride(1) == 1 and places > 1
    y = torch.empty((samples, channels), dtype=x.dtype, device=x.device)
    keeps = keeps and maximum
    winner = torch.empty_like(y) if keeps else None
    position = torch.empty_like(y, dtype=torch.int64) if keeps else None
    parameters = norm.parameter_type(x.dtype)
    pointers = {
        "x": x,
        "y": y,
        "winner": winner,
        "position": position,
        **norm.vectors(x.dtype, parameters),
        "slope": around.pointers["slope"],
    }
    given = frozenset(name for name in _OPTIONAL if pointers[name] is not None)
    tiling, programs, extents = _divide(x.dtype, samples, channels, places, channels_last)
    launch(
        _configuration(x.dtype, tiling, around.activation.row, maximum, given, parameters),
        programs,
        *(pointer for pointer in pointers.values() if pointer is not None),
        *(*extents, norm.eps, around.activation.a, around.activation.b),
        *(() if around.slopes is None else (around.slopes.numel(),)),
    )
    return y, winner, position
