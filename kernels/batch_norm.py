"""Batch norm: normalisation of channels, with activation and residual, and its gradients.

`batch_norm_statistics` has the statistics, `channels` the division of a tensor into programs.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any

import torch
from torch import Tensor

from .base._triton import tl, triton
from .base.channels import (
    COMMON_TILINGS,
    TILINGS,
    Tiling,
    channel_tile,
    configure_channels,
    launch_over,
    plan_of,
    program_place,
    tile_place,
    tilings_of,
)
from .base.launch import ACCUMULATOR, DTYPES, Configuration, kernel, ships
from .base.layout import dense, dense_like
from .base.numerics import divide, scalar, square_root
from .base.tiles import MASK_BYTES, TILE, aligned, load, load_bits, store, store_bits
from .functions.activation import ACTIVATIONS, IDENTITY, Activated, Activation, gradient_from_input

__all__ = [
    "batch_norm_backward",
    "batch_norm_forward",
    "batch_norm_reduce",
    "channel_vectors",
    "mask_bytes",
    "normalisation",
]

_TILE = tl.constexpr(TILE)

# --- Device functions -----------------------------------------------------------------------------------------------


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


# --- Normalisation and its gradient ---------------------------------------------------------------------------------


@kernel
def batch_norm_forward_kernel(
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
    tiles_per_track: tl.int64,
    tiles_per_program: tl.int64,
    along_inner: tl.int32,
    eps: tl.float64,
    a: tl.float64,
    b: tl.float64,
    ACTIVATION: tl.constexpr,
    AXIS: tl.constexpr,
    COMPUTE: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    ALIGN: tl.constexpr,
):
    columns = aligned(columns, ALIGN)
    channel_block, track, first, end, _split = program_place(channel_blocks, tracks, tiles_per_track, tiles_per_program)
    channel = channel_tile(channel_block, AXIS, HEIGHT, WIDTH)
    mean, _, scale, bias = normalisation(
        mean_pointer, variance_pointer, weight_pointer, bias_pointer, channel, channels, eps, COMPUTE
    )
    a = scalar(a, COMPUTE)
    b = scalar(b, COMPUTE)
    for ahead in range(first, end):
        step = first + end - 1 - ahead  # backward
        tile, _present = tile_place(
            step, channel_block, track, outer, channels, columns, along_inner, AXIS, HEIGHT, WIDTH
        )
        x = load(x_pointer, tile, COMPUTE)
        z = (x - mean) * scale + bias
        if residual_pointer is not None:
            z += load(residual_pointer, tile, COMPUTE)
        if mask_pointer is not None:
            tile_index = (step * channel_blocks + channel_block) * tracks + track
            store_bits(mask_pointer, tl.reshape(ACTIVATION.mask(z, a, b), (1, _TILE)), tile_index, 1, _TILE)
        y = ACTIVATION.forward(z, a, b)
        store(y_pointer, tile, y)


@kernel
def batch_norm_reduce_kernel(
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
    tiles_per_track: tl.int64,
    tiles_per_program: tl.int64,
    along_inner: tl.int32,
    eps: tl.float64,
    a: tl.float64,
    b: tl.float64,
    ACTIVATION: tl.constexpr,
    AXIS: tl.constexpr,
    COMPUTE: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    ALIGN: tl.constexpr,
):
    columns = aligned(columns, ALIGN)
    channel_block, track, first, end, split = program_place(channel_blocks, tracks, tiles_per_track, tiles_per_program)
    channel = channel_tile(channel_block, AXIS, HEIGHT, WIDTH)
    mean, inverse_deviation, scale, bias = normalisation(
        mean_pointer, variance_pointer, weight_pointer, bias_pointer, channel, channels, eps, COMPUTE
    )
    a = scalar(a, COMPUTE)
    b = scalar(b, COMPUTE)
    sums = tl.zeros((HEIGHT, WIDTH), COMPUTE)
    products = tl.zeros((HEIGHT, WIDTH), COMPUTE)
    for step in range(first, end):
        tile, present = tile_place(
            step, channel_block, track, outer, channels, columns, along_inner, AXIS, HEIGHT, WIDTH
        )
        dz = load(g_pointer, tile, COMPUTE)
        x = load(x_pointer, tile, COMPUTE)
        centred = x - mean
        if mask_pointer is not None:
            tile_index = (step * channel_blocks + channel_block) * tracks + track
            kept = tl.reshape(load_bits(mask_pointer, tile_index, 1, _TILE), (HEIGHT, WIDTH))
            dz = ACTIVATION.gradient(dz, kept, a, b)
        else:
            z = centred * scale + bias
            if residual_pointer is not None:
                z += load(residual_pointer, tile, COMPUTE)
            dz = gradient_from_input(dz, z, a, b, ACTIVATION)
        if dz_pointer is not None:
            store(dz_pointer, tile, dz)
        dz = tl.where(present, dz, 0.0)
        sums += dz
        products += dz * centred

    target = partial_pointer + split * 2 * channels + channel
    mask = channel < channels
    tl.store(target, tl.sum(sums.to(tl.float64), axis=AXIS, keep_dims=True), mask=mask)
    products_sum = tl.sum(products.to(tl.float64), axis=AXIS, keep_dims=True)
    tl.store(target + channels, products_sum * inverse_deviation, mask=mask)


@kernel
def batch_norm_backward_kernel(
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
    tiles_per_track: tl.int64,
    tiles_per_program: tl.int64,
    along_inner: tl.int32,
    inverse_count: tl.float64,  # 1 / the number of values that the sums are over
    eps: tl.float64,
    a: tl.float64,
    b: tl.float64,
    ACTIVATION: tl.constexpr,
    AXIS: tl.constexpr,
    COMPUTE: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    ALIGN: tl.constexpr,
):
    columns = aligned(columns, ALIGN)
    channel_block, track, first, end, _split = program_place(channel_blocks, tracks, tiles_per_track, tiles_per_program)
    channel = channel_tile(channel_block, AXIS, HEIGHT, WIDTH)
    mean, inverse_deviation, scale, bias = normalisation(
        mean_pointer, variance_pointer, weight_pointer, bias_pointer, channel, channels, eps, COMPUTE
    )
    if sums_pointer is not None:
        mask = channel < channels
        mean_dz = (tl.load(sums_pointer + channel, mask=mask, other=0) * inverse_count).to(COMPUTE)
        mean_product = (tl.load(sums_pointer + channels + channel, mask=mask, other=0) * inverse_count).to(COMPUTE)
        slope = mean_product * inverse_deviation
    a = scalar(a, COMPUTE)
    b = scalar(b, COMPUTE)
    for ahead in range(first, end):
        step = first + end - 1 - ahead  # backward
        tile, _present = tile_place(
            step, channel_block, track, outer, channels, columns, along_inner, AXIS, HEIGHT, WIDTH
        )
        dx = load(g_pointer, tile, COMPUTE)
        if ACTIVATION.saves != "nothing" or sums_pointer is not None:
            x = load(x_pointer, tile, COMPUTE)
            centred = x - mean
            dx = gradient_from_input(dx, centred * scale + bias, a, b, ACTIVATION)
            if sums_pointer is not None:
                dx = dx - mean_dz - centred * slope
        dx = dx * scale
        store(dx_pointer, tile, dx)


# --- Configurations -------------------------------------------------------------------------------------------------

_VECTORS = ("mean", "variance", "weight", "bias")


def _configuration(
    kernel: Any,
    label: str,
    dtype: torch.dtype,
    tiling: Tiling,
    row: Activation,
    affine: bool,
    absent: dict[str, bool],
    *,
    wide_loads: int,
    wide_stores: int,
) -> Configuration:
    """``absent`` tells which of the pointers that may be None are."""
    absent |= {"weight": not affine, "bias": not affine}
    return configure_channels(
        kernel,
        f"batch norm {label}{' not affine' * (not affine)}",
        dtype,
        tiling,
        {"ACTIVATION": row, **{f"{name}_pointer": None for name, missing in absent.items() if missing}},
        pointers={
            "mask": torch.uint8,
            "partial": torch.float64,
            "sums": torch.float64,
            **dict.fromkeys(_VECTORS, ACCUMULATOR[dtype]),
        },
        wide_loads=wide_loads,
        wide_stores=wide_stores,
    )


def _label(direction: str, row: Activation, residual: bool, masked: bool) -> str:
    parts = (direction, row.label, residual and "+ residual", masked and "+ mask")
    return " ".join(part for part in parts if part)


@cache
def _normalise(
    dtype: torch.dtype, tiling: Tiling, row: Activation, residual: bool, masked: bool, affine: bool
) -> Configuration:
    return _configuration(
        batch_norm_forward_kernel,
        _label("forward", row, residual, masked),
        *(dtype, tiling, row, affine),
        {"residual": not residual, "mask": not masked},
        wide_loads=2 if residual else 1,
        wide_stores=1,
    )


@cache
def _reduce(
    dtype: torch.dtype, tiling: Tiling, row: Activation, residual: bool, masked: bool, affine: bool
) -> Configuration:
    writes_dz = residual or masked
    return _configuration(
        batch_norm_reduce_kernel,
        _label("reduce", row, residual, masked),
        *(dtype, tiling, row, affine),
        {"residual": not residual, "mask": not masked, "dz": not writes_dz},
        wide_loads=3 if residual else 2,
        wide_stores=1 if writes_dz else 0,
    )


@cache
def _gradient(dtype: torch.dtype, tiling: Tiling, row: Activation, training: bool, affine: bool) -> Configuration:
    return _configuration(
        batch_norm_backward_kernel,
        _label("backward", row, False, False) + " evaluation" * (not training),
        *(dtype, tiling, row, affine),
        {"sums": not training},
        wide_loads=2 if training or row is not IDENTITY.row else 1,
        wide_stores=1,
    )


@ships("batch_norm")
def configurations() -> Iterator[Configuration]:
    usual = dict.fromkeys(_usual_configurations())
    yield from usual
    yield from (replace(other, rare=True) for other in dict.fromkeys(_other_configurations()) if other not in usual)


def _usual_configurations() -> Iterator[Configuration]:
    for tiling in TILINGS:
        yield from _plain(torch.bfloat16, tiling)
    for tiling in COMMON_TILINGS:
        yield from _plain(torch.float32, tiling)
        yield from _plain(torch.float64, tiling)
        yield from _fused(torch.bfloat16, tiling, ACTIVATIONS["relu"])
    rows = COMMON_TILINGS[1]
    yield from _plain(torch.float16, rows)
    yield _normalise(torch.bfloat16, rows, IDENTITY.row, False, False, False)
    yield _gradient(torch.bfloat16, rows, IDENTITY.row, False, True)
    for name in ("gelu", "tanh"):
        yield _reduce(torch.float32, rows, ACTIVATIONS[name], False, False, True)


def _other_configurations() -> Iterator[Configuration]:
    for dtype in DTYPES:
        for tiling in tilings_of(dtype):
            yield from _plain(dtype, tiling)
    for dtype, tiling in product(DTYPES, COMMON_TILINGS):
        yield from _fused(dtype, tiling, ACTIVATIONS["relu"])
        yield _normalise(dtype, tiling, IDENTITY.row, False, False, False)
        yield _gradient(dtype, tiling, IDENTITY.row, True, False)
        yield _gradient(dtype, tiling, IDENTITY.row, False, True)
    for row in ACTIVATIONS.values():
        yield from _fused(torch.float32, COMMON_TILINGS[1], row)


def _plain(dtype: torch.dtype, tiling: Tiling) -> Iterator[Configuration]:
    """Training without an activation."""
    yield _normalise(dtype, tiling, IDENTITY.row, False, False, True)
    yield _reduce(dtype, tiling, IDENTITY.row, False, False, True)
    yield _gradient(dtype, tiling, IDENTITY.row, True, True)


def _fused(dtype: torch.dtype, tiling: Tiling, row: Activation) -> Iterator[Configuration]:
    """Training with an activation, alone and after a residual."""
    masked = row.saves == "mask"
    yield _normalise(dtype, tiling, row, False, False, True)
    yield _reduce(dtype, tiling, row, False, False, True)
    yield _gradient(dtype, tiling, row, True, True)
    yield _normalise(dtype, tiling, row, True, masked, True)
    yield _reduce(dtype, tiling, row, not masked, masked, True)


# --- Launchers ------------------------------------------------------------------------------------------------------


def channel_vectors(
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


def mask_bytes(x: Tensor) -> int:
    """Bytes of the packed mask for the dense ``x``, whole tiles.  Sizes may be symbolic."""
    if not x.numel():
        return 0
    plan = plan_of(x)
    tiles: int = plan.tracks * plan.tiles_per_track * plan.channel_blocks
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
    vectors = channel_vectors(x.dtype, mean, variance, weight, bias)
    affine = vectors[2] is not None
    configuration = _normalise(x.dtype, plan.tiling, activation.row, residual is not None, masked, affine)
    launch_over(configuration, plan, (x, residual, y, mask, *vectors), eps, activation.a, activation.b)
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
    vectors = channel_vectors(x.dtype, mean, variance, weight, bias)
    affine = vectors[2] is not None
    configuration = _reduce(x.dtype, plan.tiling, activation.row, residual is not None, mask is not None, affine)
    launch_over(configuration, plan, (g, x, residual, mask, dz, partial, *vectors), eps, activation.a, activation.b)
    return partial.sum(0), dz


def batch_norm_backward(
    g: Tensor,
    x: Tensor,
    sums: Tensor | None,
    inverse_count: float,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: Activated,
) -> Tensor:
    """Gradient of the input.

    ``sums`` are those of `batch_norm_reduce`, and ``inverse_count`` is 1 / the number of values that they are over.
    None where the statistics don't depend on ``x``.
    """
    x = dense(x)
    g = dense_like(g, x.stride())
    dx = torch.empty_like(x)
    if not x.numel():
        return dx
    plan = plan_of(x)
    vectors = channel_vectors(x.dtype, mean, variance, weight, bias)
    configuration = _gradient(x.dtype, plan.tiling, activation.row, sums is not None, vectors[2] is not None)
    launch_over(configuration, plan, (g, x, dx, sums, *vectors), inverse_count, eps, activation.a, activation.b)
    return dx
