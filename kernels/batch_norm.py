"""Batch norm: normalisation of channels, with activation and residual, by given statistics or by those of the tensor.

`batch_norm_statistics` has the statistics, `batch_norm_gradients` the gradients, `channels` the division of a tensor
into programs.  In training the programs that normalise put together what those of the statistics left.
"""

from collections.abc import Iterator, Mapping
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
    launch_over,
    plan_of,
    program_place,
    tile_place,
    tilings_of,
)
from .base.launch import ACCUMULATOR, DTYPES, Configuration, kernel, ships
from .base.layout import dense, dense_like
from .base.numerics import divide, scalar, square_root, widen
from .base.random import channels_kept, keep_tile
from .base.tiles import aligned, load, store, store_bits
from .batch_norm_operands import Around, Norm, Running, as_type, plan_behind, takes_halves
from .batch_norm_statistics import (
    before_constants,
    channel_shift,
    copy_back,
    merge_partial,
    merge_statistics,
    partial_over,
    store_moments,
    value_before,
)
from .functions.activation import ACTIVATIONS, IDENTITY, PRELU, Activation

__all__ = [
    "AFFINE",
    "batch_norm_forward",
    "batch_norm_training",
    "before_told",
    "channel_slopes",
    "configuration_of",
    "mask_bytes",
    "noise_tile",
    "normalisation",
    "spatial_constants",
]

# --- Device functions -----------------------------------------------------------------------------------------------


@triton.jit
def normalisation(mean_pointer, variance_pointer, weight_pointer, bias_pointer, channel, channels, eps, COMPUTE):
    """Of each channel: mean, 1 / standard deviation, scale (that times the weight), and bias.

    The result is (x - mean) * scale + bias.  Without parameters, weight and bias are 1 and 0; without statistics it is
    x + bias.
    """
    inside = channel < channels
    if mean_pointer is not None:
        mean = tl.load(mean_pointer + channel, mask=inside, other=0)
        variance = tl.load(variance_pointer + channel, mask=inside, other=0)
        inverse_deviation, scale, bias = affine(variance, weight_pointer, bias_pointer, channel, channels, eps, COMPUTE)
        return mean, inverse_deviation, scale, bias
    else:
        zero = tl.zeros(channel.shape, COMPUTE)
        bias = zero
        if bias_pointer is not None:
            bias = widen(tl.load(bias_pointer + channel, mask=inside, other=0), COMPUTE)
        return zero, zero + 1, zero + 1, bias


@triton.jit
def affine(variance, weight_pointer, bias_pointer, channel, channels, eps, COMPUTE):
    """Of each channel: 1 / standard deviation, scale and bias, as of `normalisation`."""
    inside = channel < channels
    inverse_deviation = divide(scalar(1.0, COMPUTE), square_root(variance + scalar(eps, COMPUTE)))
    if weight_pointer is not None:
        scale = inverse_deviation * widen(tl.load(weight_pointer + channel, mask=inside, other=0), COMPUTE)
        bias = widen(tl.load(bias_pointer + channel, mask=inside, other=0), COMPUTE)
    else:
        scale = inverse_deviation
        bias = tl.zeros(channel.shape, COMPUTE)
    return inverse_deviation, scale, bias


@triton.jit
def channel_slopes(slope_pointer, a, channel, channels, slopes, COMPUTE):
    """PReLU's slopes, of which there is one or one for each channel; of other activations ``a``."""
    if slope_pointer is not None:
        return widen(tl.load(slope_pointer + channel % slopes, mask=channel < channels, other=0), COMPUTE)
    else:
        return a


@triton.jit
def noise_tile(
    seed_pointer,
    last,
    spatial,
    step,
    channel_block,
    track,
    channel_blocks,
    tracks,
    channels,
    along_inner,
    ELEMENT: tl.constexpr,
    COMPUTE: tl.constexpr,
    TILING: tl.constexpr,
):
    """What dropout multiplies a tile by: 1 / (1 - p), where ``last`` random numbers of 2^32 are the last kept, or 0.

    The ``spatial`` elements of a sample's channel have one number, if that isn't None, as of `channels_kept`.
    """
    if spatial is None:
        serves_eight: tl.constexpr = ELEMENT.primitive_bitwidth == 16
        tile_index = (step * channel_blocks + channel_block) * tracks + track
        keep = keep_tile(
            tl.load(seed_pointer), tile_index, scalar(last, tl.uint32), 1, TILING.height * TILING.width, serves_eight
        )
        keep = tl.reshape(keep, TILING.shape)
    else:
        if TILING.axis == 1:
            sample = tl.where(along_inner != 0, track, step)
            row, column = sample * channels + channel_block * TILING.height, channel_block * 0
        else:
            row, column = step * TILING.height, channel_block * TILING.width
        keep = channels_kept(
            seed_pointer, last, row, column, channels, spatial, TILING.axis == 1, TILING.height, TILING.width
        )
    scale = (4294967296.0 / (scalar(last, tl.float64) + 1)).to(COMPUTE)
    return tl.where(keep, scale, scale * 0)


# --- Kernel -----------------------------------------------------------------------------------------------------------


@kernel
def batch_norm_forward_kernel(
    x_pointer,  # input, (outer, channels, inner)
    residual_pointer,  # added before the activation, as x; or None
    y_pointer,  # output, as x
    mask_pointer,  # packed bits of the activation's mask, tile by tile; or None
    partial_pointer,  # (splits, 3, channels): what `batch_norm_statistics_kernel` left; or None
    mean_pointer,  # (channels,): of the partial statistics, or given
    variance_pointer,
    weight_pointer,  # (channels,), or None
    bias_pointer,
    running_mean_pointer,  # updated, or None where nothing is tracked
    running_variance_pointer,
    batches_pointer,  # number of batches: the running statistics are averages over them; or None
    slope_pointer,  # PReLU's slopes, (slopes,), which take the place of ``a``; or None
    seed_pointer,  # one int64, where dropout follows; or None
    shift_pointer,  # (channels,), added before the activation before the norm; or None
    outer: tl.int64,
    channels,
    columns,
    channel_blocks: tl.int64,
    tracks: tl.int64,
    tiles_per_track: tl.int64,
    tiles_per_program: tl.int64,
    along_inner: tl.int32,
    splits: tl.int64,
    values: tl.float64,  # of each channel
    momentum: tl.float64,  # weight of this batch, where there is no number of batches
    eps: tl.float64,
    a: tl.float64,
    b: tl.float64,
    slopes,  # one, or one for each channel; or None
    last,  # the last random number that is kept; or None
    spatial,  # the elements of a sample's channel, if dropout drops them together; or None
    before_a: tl.float64,  # of the activation before the norm
    before_b: tl.float64,
    BEFORE: tl.constexpr,  # that activation; or None
    ACTIVATION: tl.constexpr,
    TILING: tl.constexpr,
    COMPUTE: tl.constexpr,
    PLAN: tl.constexpr,  # the tile of the plan, of which this one may be half
    STAGES: tl.constexpr,
    ALIGN: tl.constexpr,
):
    columns = aligned(columns, ALIGN)
    channel_block, track, first, end, split = program_place(channel_blocks, tracks, tiles_per_track, tiles_per_program)
    channel = channel_tile(channel_block, TILING)
    if partial_pointer is not None:
        total = scalar(values, COMPUTE)
        mean, variance = merge_partial(partial_pointer, splits, channel, channels, total, PLAN)
        if split == 0:
            store_moments(
                *(mean_pointer, variance_pointer, running_mean_pointer, running_variance_pointer, batches_pointer),
                *(channel, channel < channels, mean.to(tl.float64), variance.to(tl.float64), values, momentum),
            )
        _, scale, bias = affine(variance, weight_pointer, bias_pointer, channel, channels, eps, COMPUTE)
    else:
        mean, _, scale, bias = normalisation(
            mean_pointer, variance_pointer, weight_pointer, bias_pointer, channel, channels, eps, COMPUTE
        )
    a = channel_slopes(slope_pointer, scalar(a, COMPUTE), channel, channels, slopes, COMPUTE)
    b = scalar(b, COMPUTE)
    shift = channel_shift(shift_pointer, channel, channels, COMPUTE)
    for ahead in tl.range(first, end, num_stages=STAGES):
        step = first + end - 1 - ahead  # backward
        tile, _present = tile_place(step, channel_block, track, outer, channels, columns, along_inner, TILING)
        x = value_before(load(x_pointer, tile, COMPUTE), shift, before_a, before_b, BEFORE)
        z = (x - mean) * scale + bias
        if residual_pointer is not None:
            z += load(residual_pointer, tile, COMPUTE)
        if mask_pointer is not None:
            tile_index = (step * channel_blocks + channel_block) * tracks + track
            store_bits(
                mask_pointer,
                tl.reshape(ACTIVATION.mask(z, a, b), (1, TILING.height * TILING.width)),
                tile_index,
                1,
                TILING.height * TILING.width,
            )
        y = ACTIVATION.forward(z, a, b)
        if seed_pointer is not None:
            y *= noise_tile(
                *(seed_pointer, last, spatial, step, channel_block, track, channel_blocks, tracks, channels),
                *(along_inner, y_pointer.dtype.element_ty, COMPUTE, TILING),
            )
        store(y_pointer, tile, y)


# --- Configurations ---------------------------------------------------------------------------------------------------

#: Pointers to a layer's parameters, and to its running statistics.
AFFINE = frozenset({"weight", "bias"})
_TRACKED = frozenset({"running_mean", "running_variance"})
_OPTIONAL = AFFINE | _TRACKED | {"residual", "mask", "partial", "batches", "slope", "seed", "shift"}


def configuration_of(
    kernel: Any,
    direction: str,
    dtype: torch.dtype,
    parameters: torch.dtype,
    tiling: Tiling,
    row: Activation,
    given: Mapping[str, bool],
    tells: Mapping[str, bool],
    *,
    wide_loads: int,
    wide_stores: int,
    constants: Mapping[str, Any] | None = None,
) -> Configuration:
    """``given`` tells which of the pointers that may be None aren't, ``tells`` what of it the label tells.

    ``parameters`` is the type of the layer's parameters and running statistics.
    """
    tells = {**tells, "not affine": not given["weight"], "narrow parameters": parameters is not ACCUMULATOR[dtype]}
    parts = ("batch norm", direction, row.label, *(part for part, told in tells.items() if told))
    return configure_channels(
        kernel,
        " ".join(filter(None, parts)),
        dtype,
        tiling,
        {
            "ACTIVATION": row,
            **{f"{name}_pointer": None for name, there in given.items() if not there},
            **({} if given["slope"] else {"slopes": None}),
            **({} if given.get("seed", True) else {"last": None}),
            **(constants or {}),
        },
        pointers={
            "mask": torch.uint8,
            **dict.fromkeys(("batches", "position", "seed"), torch.int64),
            **dict.fromkeys(("mean", "variance", "partial", "dshift"), ACCUMULATOR[dtype]),
            **dict.fromkeys((*AFFINE, *_TRACKED, "dweight", "dbias"), parameters),
        },
        wide_loads=wide_loads,
        wide_stores=wide_stores,
    )


@cache
def _forward(
    dtype: torch.dtype,
    tiling: Tiling,
    row: Activation,
    given: frozenset[str],
    parameters: torch.dtype | None = None,
    before: Activation | None = None,
    of_channels: bool = False,
) -> Configuration:
    """``given`` are the pointers that aren't None, of those that may be; ``of_channels``: dropout drops whole ones."""
    training = "partial" in given
    return configuration_of(
        batch_norm_forward_kernel,
        "forward",
        *(dtype, parameters or ACCUMULATOR[dtype], tiling, row),
        {name: name in given for name in sorted(_OPTIONAL)},
        {
            "+ residual": "residual" in given,
            "+ mask": "mask" in given,
            "evaluation": not training,
            "not tracked": training and not given >= _TRACKED,
            "averaged": "batches" in given,
            f"+ dropout{' of channels' * of_channels}": "seed" in given,
            **before_told(before, given),
        },
        wide_loads=1 + ("residual" in given),
        wide_stores=1,
        constants=before_constants(before, "shift" in given) | spatial_constants(of_channels) | {"PLAN": tiling.whole},
    )


def spatial_constants(of_channels: bool) -> dict[str, None]:
    """The argument that is None where dropout doesn't drop whole channels."""
    return {} if of_channels else {"spatial": None}


def before_told(before: Activation | None, given: frozenset[str]) -> dict[str, bool]:
    """What labels tell of an activation before the norm."""
    return {} if before is None else {f"of {before.name}{' of sums' * ('shift' in given)}": True}


_USUAL = AFFINE | _TRACKED | {"partial"}


@ships("batch_norm")
def configurations() -> Iterator[Configuration]:
    usual = dict.fromkeys(_usual_configurations())
    yield from usual
    yield from (replace(other, rare=True) for other in dict.fromkeys(_other_configurations()) if other not in usual)


def _usual_configurations() -> Iterator[Configuration]:
    bfloat16 = torch.bfloat16
    for tiling in tilings_of(bfloat16):
        yield _forward(bfloat16, tiling, IDENTITY.row, _USUAL)
    for dtype in (torch.float32, torch.float64):
        for tiling in common_tilings_of(dtype):
            yield _forward(dtype, tiling, IDENTITY.row, _USUAL)
    for tiling in common_tilings_of(bfloat16):
        yield from _fused(bfloat16, tiling, ACTIVATIONS["relu"])
    _, rows = common_tilings_of(bfloat16)
    yield _forward(torch.float16, rows, IDENTITY.row, _USUAL)
    yield _forward(bfloat16, rows, IDENTITY.row, AFFINE)
    yield _forward(bfloat16, rows, IDENTITY.row, _USUAL | {"shift"}, before=ACTIVATIONS["relu"])
    yield _forward(bfloat16, rows, IDENTITY.row, _USUAL, bfloat16)
    for tiling in common_tilings_of(bfloat16):
        yield _forward(bfloat16, tiling, PRELU.row, _USUAL | {"slope"})
        for of_channels in (False, True):
            yield _forward(bfloat16, tiling, ACTIVATIONS["relu"], _USUAL | {"seed"}, of_channels=of_channels)


def _other_configurations() -> Iterator[Configuration]:
    for dtype in DTYPES:
        for tiling in tilings_of(dtype):
            yield _forward(dtype, tiling, IDENTITY.row, _USUAL)
        for tiling in common_tilings_of(dtype):
            yield from _fused(dtype, tiling, ACTIVATIONS["relu"])
            for given in (AFFINE, _USUAL - AFFINE, _USUAL - _TRACKED, _USUAL | {"batches"}):
                yield _forward(dtype, tiling, IDENTITY.row, given)
            yield _forward(dtype, tiling, IDENTITY.row, _USUAL, dtype)
    for row in ACTIVATIONS.values():
        yield from _fused(torch.float32, common_tilings_of(torch.float32)[1], row)
        columns, _ = common_tilings_of(torch.float32)
        columns = columns.halved if takes_halves(torch.float32, row) else columns
        yield _forward(torch.float32, columns, IDENTITY.row, _USUAL, before=row)


def _fused(dtype: torch.dtype, tiling: Tiling, row: Activation) -> Iterator[Configuration]:
    """Training with an activation, alone and after a residual."""
    yield _forward(dtype, tiling, row, _USUAL)
    yield _forward(dtype, tiling, row, _USUAL | {"residual"} | ({"mask"} if row.saves == "mask" else set()))


# --- Launchers --------------------------------------------------------------------------------------------------------


def mask_bytes(x: Tensor) -> int:
    """Bytes of the packed mask for the dense ``x``, whole tiles.  Sizes may be symbolic."""
    if not x.numel():
        return 0
    plan = plan_of(x)
    tiles: int = plan.tracks * plan.tiles_per_track * plan.channel_blocks
    return tiles * plan.tiling.height * plan.tiling.width // 8


def batch_norm_training(
    x: Tensor, residual: Tensor | None, running: Running, norm: Norm, around: Around, *, masked: bool
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """`batch_norm_forward` with the statistics of ``x``, which come last, and update the running ones.

    As of `merge_statistics`, whose work the programs that normalise do here.
    """
    x = dense(x)
    plan = plan_of(x, around.spatial(x))
    partial = partial_over(x, plan, around.before)
    if plan.splits > plan.tiling.lanes:
        mean, variance = merge_statistics(partial, *running)
        y, mask = batch_norm_forward(x, residual, norm._replace(mean=mean, variance=variance), around, masked=masked)
    else:
        mean, variance = (torch.empty(plan.channels, dtype=partial.dtype, device=x.device) for _ in range(2))
        norm = norm._replace(mean=mean, variance=variance)
        y, mask = _normalise(x, plan, residual, partial, running, norm, around, masked)
    return y, mask, mean, variance


def batch_norm_forward(
    x: Tensor, residual: Tensor | None, norm: Norm, around: Around, *, masked: bool
) -> tuple[Tensor, Tensor | None]:
    """dropout(activation(norm(before(x)) + residual)), in the memory order of ``x``.

    With ``masked``, also the packed bits that the activation's gradient needs.
    """
    x = dense(x)
    if not x.numel():
        return torch.empty_like(x), x.new_empty(0, dtype=torch.uint8) if masked else None
    plan = plan_of(x, around.spatial(x))
    return _normalise(x, plan, residual, None, Running(None, None, None, 0.0), norm, around, masked)


def _normalise(
    x: Tensor,
    plan: Plan,
    residual: Tensor | None,
    partial: Tensor | None,
    running: Running,
    norm: Norm,
    around: Around,
    masked: bool,
) -> tuple[Tensor, Tensor | None]:
    plan = plan_behind(x.dtype, plan, around.before)
    y = torch.empty_like(x)
    mask = torch.empty(mask_bytes(x), dtype=torch.uint8, device=x.device) if masked else None
    tracked = (running.mean, running.variance)
    parameters = norm.parameter_type(x.dtype, *tracked)
    updated = as_type(parameters, *tracked)
    pointers = {
        "x": x,
        "residual": None if residual is None else dense_like(residual, x.stride()),
        "y": y,
        "mask": mask,
        "partial": partial,
        **norm.vectors(x.dtype, parameters),
        "running_mean": updated[0],
        "running_variance": updated[1],
        "batches": running.batches,
        **around.pointers,
    }
    given = frozenset(name for name in _OPTIONAL if pointers[name] is not None)
    kind = (parameters, around.row_before, around.of_channels)
    launch_over(
        _forward(x.dtype, plan.tiling, around.activation.row, given, *kind),
        plan,
        tuple(pointers.values()),
        *(plan.splits, float(x.numel() // plan.channels), running.momentum, norm.eps, *around.scalars(x)),
    )
    copy_back(tracked, updated)
    return y, mask
