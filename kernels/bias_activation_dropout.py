"""Bias, activation, dropout and a residual in one pass each way: y = dropout(activation(x + bias)) + residual.

A dense tensor is a matrix in which a channel (what shares an element of the bias) is a run of rows or a column, as for
PReLU: ``BY_ROW`` for (N, C, spatial), otherwise (rows, C).  What the backward pass needs beside the gradient:

=================================  ================================================================
activation                         saved
=================================  ================================================================
its gradient is 0 where its mask   1 bit an element: alive in the activation and kept by dropout
is (ReLU, Hardtanh, ...)
LeakyReLU                          1 bit an element (the sign), and the seed: dropout is drawn again
any other                          the input, the bias and the seed: x + bias is computed again
PReLU                              these, and the slopes
=================================  ================================================================

The gradients of the bias and of PReLU's slopes leave the kernel as partial sums, one for each channel and program;
PyTorch's ``sum`` adds them in a fixed order.  What varies from call to call (whether there are a bias, a residual and
dropout, and whether the bits are wanted) is decided at run time, by branches that a whole program takes alike, so that
one configuration serves; PReLU, and dropout of whole channels, have their own.
"""

from collections.abc import Iterator, Sequence
from functools import cache

import torch
from torch import Tensor

from .base._triton import tl, triton
from .base.launch import ACCUMULATOR, COMPUTE, DTYPES, TRITON_TYPE, Configuration, configure, kernel, launch, ships
from .base.layout import dense, dense_like, is_dense
from .base.matrix import ChannelMatrix, channel_matrix, channel_values, place_of, store_sums, tile_of, tiling_of
from .base.numerics import scalar, widen
from .base.random import channels_kept, keep_threshold, keep_tile
from .base.tiles import (
    MASK_BYTES,
    TILE,
    load,
    load_bits,
    store,
    store_bits,
    threads_for,
    tile_shape,
)
from .functions.activation import (
    ACTIVATIONS,
    PRELU,
    Activated,
    Activation,
    gradient_of,
    prelu_slope_gradient,
    value_of,
)

__all__ = [
    "bias_activation_dropout_backward",
    "bias_activation_dropout_forward",
    "has_channels",
    "saved_mask_bytes",
    "sums_shape",
]


@triton.jit
def slope_values(pointer, block_row, place, slopes, COMPUTE: tl.constexpr, TILING: tl.constexpr):
    """PReLU's slopes, of which there is one or one for each channel, broadcastable to a tile."""
    if TILING.by_row:
        values = tl.load(pointer + (block_row * TILING.height + tl.arange(0, TILING.height)) % slopes)[:, None]
    else:
        values = tl.load(pointer + (place.block_column * TILING.width + tl.arange(0, TILING.width)) % slopes)[None, :]
    return widen(values, COMPUTE)


@triton.jit
def noise_tile(
    seed_pointer, tile_index, block_row, place, spatial, last, scale, has_seed, COMPUTE, ELEMENT, TILING: tl.constexpr
):
    """What dropout multiplies the flat tile by: ``scale`` or 0; 1 where nothing drops."""
    scale = scalar(scale, COMPUTE)
    if has_seed:
        if spatial is None:
            keep = keep_tile(
                *(tl.load(seed_pointer), tile_index, scalar(last, tl.uint32)),
                *(TILING.flat_rows, TILING.flat_columns, ELEMENT.primitive_bitwidth == 16),
            )
        else:
            keep = channels_kept(
                *(seed_pointer, last, block_row * TILING.height, place.block_column * TILING.width),
                *(place.columns, spatial, TILING.by_row, TILING.height, TILING.width),
            )
            keep = tl.reshape(keep, (TILING.flat_rows, TILING.flat_columns))
        noise = tl.where(keep, scale, scale * 0)
    else:
        noise = tl.full((TILING.flat_rows, TILING.flat_columns), 1.0, COMPUTE)
    return noise


@kernel
def bias_activation_dropout_forward_kernel(
    x_pointer,  # input, (rows, columns)
    bias_pointer,  # (channels,)
    residual_pointer,  # (rows, columns)
    y_pointer,  # output, (rows, columns)
    mask_pointer,  # packed bits, a tile's as for flat tiles
    seed_pointer,  # one int64
    slope_pointer,  # PReLU's slopes, (slopes,), which take the place of ``a``; or None
    rows: tl.int64,
    columns,
    channels: tl.int32,
    row_blocks: tl.int64,
    steps: tl.int64,  # row blocks per program
    column_blocks: tl.int64,
    has_bias: tl.int32,
    has_residual: tl.int32,
    has_seed: tl.int32,
    wants_mask: tl.int32,
    last: tl.int64,  # the last random number that is kept
    scale: tl.float64,
    a: tl.float64,
    b: tl.float64,
    slopes,  # one, or one for each channel; or None
    spatial,  # the elements of a channel, if they are dropped together; or None
    ACTIVATION: tl.constexpr,  # whose bits, where its mask gates, tell of dropout too
    TILING: tl.constexpr,
    COMPUTE: tl.constexpr,
    ALIGN: tl.constexpr,
):
    place = place_of(rows, columns, column_blocks, ALIGN)
    a, b = scalar(a, COMPUTE), scalar(b, COMPUTE)
    for block_row in range(place.part * steps, tl.minimum(place.part * steps + steps, row_blocks)):
        tile = tile_of(block_row, place, TILING)
        tile_index = block_row * place.column_blocks + place.block_column

        h = load(x_pointer, tile, COMPUTE)
        if has_bias:
            h += channel_values(bias_pointer, block_row, place, channels, COMPUTE, TILING)
        slope = a
        if slope_pointer is not None:
            slope = slope_values(slope_pointer, block_row, place, slopes, COMPUTE, TILING)
        y = value_of(h, slope, b, ACTIVATION)
        noise = noise_tile(
            *(seed_pointer, tile_index, block_row, place, spatial, last, scale, has_seed),
            *(COMPUTE, x_pointer.dtype.element_ty, TILING),
        )
        y = y * tl.reshape(noise, (TILING.height, TILING.width))
        if has_residual:
            y += load(residual_pointer, tile, COMPUTE)
        store(y_pointer, tile, y)
        if ACTIVATION.saves == "mask":  # noqa: SIM102 (this condition is the compiler's, the next one the program's)
            if wants_mask:
                bits = tl.reshape(ACTIVATION.mask(h, a, b), (TILING.flat_rows, TILING.flat_columns))
                if ACTIVATION.mask_gates:
                    bits = bits & (noise != 0)
                store_bits(mask_pointer, bits, tile_index, TILING.flat_rows, TILING.flat_columns)


@kernel
def bias_activation_dropout_backward_kernel(
    g_pointer,  # gradient of the output, (rows, columns)
    saved_pointer,  # packed bits, or the input, (rows, columns)
    bias_pointer,  # (channels,)
    dx_pointer,  # gradient of the input, (rows, columns)
    partial_pointer,  # partial sums of the bias's gradient, see `ChannelMatrix`
    seed_pointer,  # the forward pass's; not read where the activation's mask gates
    slope_pointer,  # PReLU's slopes, whose gradient's partial sums lie behind the bias's; or None
    rows: tl.int64,
    columns,
    channels: tl.int32,
    row_blocks: tl.int64,
    steps: tl.int64,
    column_blocks: tl.int64,
    has_bias: tl.int32,
    has_seed: tl.int32,
    wants_sums: tl.int32,
    last: tl.int64,
    scale: tl.float64,
    a: tl.float64,
    b: tl.float64,
    slopes,  # one, or one for each channel; or None
    spatial,  # the elements of a channel, if they are dropped together; or None
    ACTIVATION: tl.constexpr,
    TILING: tl.constexpr,
    COMPUTE: tl.constexpr,
    ALIGN: tl.constexpr,
):
    place = place_of(rows, columns, column_blocks, ALIGN)
    a, b = scalar(a, COMPUTE), scalar(b, COMPUTE)
    totals = tl.full((TILING.height, TILING.width), 0.0, COMPUTE)
    if slope_pointer is not None:
        slope_totals = tl.full((TILING.height, TILING.width), 0.0, COMPUTE)
        behind = rows * column_blocks if TILING.by_row else tl.cdiv(row_blocks, steps) * place.columns
    for block_row in range(place.part * steps, tl.minimum(place.part * steps + steps, row_blocks)):
        tile = tile_of(block_row, place, TILING)
        tile_index = block_row * place.column_blocks + place.block_column

        if ACTIVATION.saves == "mask":
            saved = load_bits(saved_pointer, tile_index, TILING.flat_rows, TILING.flat_columns)
            saved = tl.reshape(saved, (TILING.height, TILING.width))
        else:
            saved = load(saved_pointer, tile, COMPUTE)
            if has_bias:
                saved += channel_values(bias_pointer, block_row, place, channels, COMPUTE, TILING)
            if ACTIVATION.saves == "output":  # which is made again, before the noise takes registers
                saved = value_of(saved, a, b, ACTIVATION)
        g = load(g_pointer, tile, COMPUTE)
        if ACTIVATION.mask_gates:
            g = g * scalar(scale, COMPUTE)
        else:
            noise = noise_tile(
                *(seed_pointer, tile_index, block_row, place, spatial, last, scale, has_seed),
                *(COMPUTE, g_pointer.dtype.element_ty, TILING),
            )
            g = g * tl.reshape(noise, (TILING.height, TILING.width))
        slope = a
        if slope_pointer is not None:
            slope = slope_values(slope_pointer, block_row, place, slopes, COMPUTE, TILING)
        dx = gradient_of(g, saved, slope, b, ACTIVATION)
        store(dx_pointer, tile, dx)

        if wants_sums:
            addend = tl.where(tile.inside, dx, 0.0)  # an infinite bias gives NaN outside, too
            if TILING.by_row:
                store_sums(partial_pointer, addend, block_row, place, TILING)
            else:
                totals += addend
            if slope_pointer is not None:
                slope_addend = tl.where(tile.inside, prelu_slope_gradient(g, saved), 0.0)
                if TILING.by_row:
                    store_sums(partial_pointer + behind, slope_addend, block_row, place, TILING)
                else:
                    slope_totals += slope_addend
    if not TILING.by_row:  # noqa: SIM102 (this condition is the compiler's, the next one the program's)
        if wants_sums:
            store_sums(partial_pointer, totals, place.part, place, TILING)
            if slope_pointer is not None:
                store_sums(partial_pointer + behind, slope_totals, place.part, place, TILING)


# --- Configurations and launchers -----------------------------------------------------------------------------------

_ROW_WIDTHS = (16, 256, TILE)
_COLUMN_WIDTHS = (16, 64, 256)


@cache
def _configuration(
    direction: str, row: Activation, dtype: torch.dtype, by_row: bool, width: int, of_channels: bool = False
) -> Configuration:
    forward, masked = direction == "forward", row.saves == "mask"
    dropout = "dropout of channels" if of_channels else "dropout"
    wide = tile_shape(dtype)[0] if width > 16 else 0
    return configure(
        bias_activation_dropout_forward_kernel if forward else bias_activation_dropout_backward_kernel,
        f"bias + {row.name} + {dropout} {direction} {'rows' if by_row else 'columns'} x{width} {TRITON_TYPE[dtype]}",
        dtype,
        {
            **({} if row is PRELU.row else {"slope_pointer": None, "slopes": None}),
            **({} if of_channels else {"spatial": None}),
            "ACTIVATION": row.for_results_of(dtype),
            "TILING": tiling_of(dtype, by_row, width),
            "COMPUTE": COMPUTE[dtype],
        },
        pointers={
            **({"saved": torch.uint8} if masked else {}),
            "mask": torch.uint8,
            "seed": torch.int64,
            "partial": ACCUMULATOR[dtype],
        },
        aligned=("columns",),
        threads=threads_for(dtype),
        wide_loads=wide if masked and not forward else 2 * wide,
        wide_stores=wide,
    )


@ships("bias_activation_dropout")
def configurations() -> Iterator[Configuration]:
    """Of the hundreds that the launchers can ask for: every geometry with ReLU in two dtypes, and every activation and
    dtype in one geometry.  What is left out are the same device functions in other combinations.
    """
    relu, bfloat16 = ACTIVATIONS["relu"], torch.bfloat16
    for direction in ("forward", "backward"):
        for by_row, widths in ((True, _ROW_WIDTHS), (False, _COLUMN_WIDTHS)):
            for width in widths:
                for dtype in DTYPES if (by_row, width) == (False, 256) else (bfloat16, torch.float32):
                    yield _configuration(direction, relu, dtype, by_row, width)
        for row in (*ACTIVATIONS.values(), PRELU.row):
            if row is not relu:
                yield _configuration(direction, row, bfloat16, False, 256)
        yield _configuration(direction, PRELU.row, bfloat16, True, 256)
        for by_row in (True, False):
            yield _configuration(direction, ACTIVATIONS["gelu"], bfloat16, by_row, 256, True)


def _matrix(shape: Sequence[int], strides: Sequence[int], dim: int) -> ChannelMatrix:
    """Of a dense tensor that isn't empty; its channels lie along ``dim``."""
    return channel_matrix(shape, strides, dim, shape[dim], _ROW_WIDTHS, _COLUMN_WIDTHS)


def saved_mask_bytes(shape: Sequence[int], strides: Sequence[int], dim: int) -> int:
    """Bytes of the packed mask of a dense tensor, whole tiles; its channels lie along ``dim``."""
    matrix = _matrix(shape, strides, dim)
    return matrix.row_blocks * matrix.column_blocks * MASK_BYTES


def _there(*operands: Tensor | None) -> tuple[int, ...]:
    """For each operand whether it is there."""
    return tuple(int(operand is not None) for operand in operands)


def _noise(p: float) -> tuple[int, float]:
    """The kernels' ``last`` and ``scale``."""
    return keep_threshold(p), 0.0 if p == 1 else 1 / (1 - p)


def has_channels(x: Tensor) -> bool:
    """Whether a tensor's samples lie one after another, and its channels (dimension 1) next to one another or last.

    That is how kernels find the channel that an element is dropped with.
    """
    samples, channels = x.shape[:2]
    spatial = x[0, 0].numel()
    inner = x.stride(1) in (1, spatial)
    return channels > 1 and inner and (samples == 1 or x.stride(0) == channels * spatial) and is_dense(x)


def _counts(x: Tensor, slopes: Tensor | None, of_channels: bool) -> tuple[int, ...]:
    """The kernels' ``slopes`` and ``spatial``."""
    spatial = (x.numel() // (x.shape[0] * x.shape[1]),) if of_channels else ()
    return (*(() if slopes is None else (slopes.numel(),)), *spatial)


def bias_activation_dropout_forward(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    activation: Activated,
    p: float,
    dim: int,
    *,
    slopes: Tensor | None = None,
    of_channels: bool = False,
    save: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """dropout(activation(x + bias)) + residual, and the packed mask where the activation has one and ``save`` wants it.

    ``bias`` and PReLU's ``slopes`` lie along ``dim``; ``residual`` has the shape of ``x``.  Without a ``seed``, ``p``
    has to be 0.  With ``of_channels``, those of dimension 1 are dropped as a whole; see `has_channels`.
    """
    x = dense(x)
    y = torch.empty_like(x)
    mask = None
    if save and activation.saves == "mask":
        mask = torch.empty(saved_mask_bytes(x.shape, x.stride(), dim), dtype=torch.uint8, device=x.device)
    if bias is not None:
        bias = bias.contiguous()
    if residual is not None:
        residual = dense_like(residual, x.stride())
    matrix = _matrix(x.shape, x.stride(), dim)
    launch(
        _configuration("forward", activation.row, x.dtype, matrix.by_row, matrix.width, of_channels),
        matrix.programs,
        x,
        *(x if operand is None else operand for operand in (bias, residual)),  # what isn't there isn't read
        y,
        x.new_empty(0, dtype=torch.uint8) if mask is None else mask,
        x.new_empty(0, dtype=torch.int64) if seed is None else seed,
        *(() if slopes is None else (slopes.contiguous(),)),
        *matrix.extents,
        *_there(bias, residual, seed, mask),
        *_noise(p),
        activation.a,
        activation.b,
        *_counts(x, slopes, of_channels),
    )
    return y, mask


def bias_activation_dropout_backward(
    g: Tensor,
    saved: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    strides: Sequence[int],
    activation: Activated,
    p: float,
    dim: int,
    *,
    slopes: Tensor | None = None,
    of_channels: bool = False,
    sums: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """The gradient of the input, whose dense strides were ``strides``, and the bias's where ``sums`` are wanted.

    The latter is partial sums, of the shape of `sums_shape`: with ``slopes`` these of theirs, too.

    ``saved`` is the packed mask where the activation has one, and ``bias`` isn't needed; otherwise it is the input.
    Where the mask tells of dropout, too, ``seed`` isn't needed.
    """
    g = dense_like(g, strides)
    if activation.saves != "mask":
        saved = dense_like(saved, strides)
    dx = g.new_empty_strided(g.shape, strides)
    matrix = _matrix(g.shape, strides, dim)
    accumulator = ACCUMULATOR[g.dtype]
    shape = sums_shape(g.shape, strides, dim, slopes)
    partial = torch.empty(shape, dtype=accumulator, device=g.device) if sums else None
    if bias is not None:
        bias = bias.contiguous()
    launch(
        _configuration("backward", activation.row, g.dtype, matrix.by_row, matrix.width, of_channels),
        matrix.programs,
        g,
        saved,
        g if bias is None else bias,
        dx,
        g.new_empty(0, dtype=accumulator) if partial is None else partial,
        g.new_empty(0, dtype=torch.int64) if seed is None else seed,
        *(() if slopes is None else (slopes.contiguous(),)),
        *matrix.extents,
        *_there(bias, seed, partial),
        *_noise(p),
        activation.a,
        activation.b,
        *_counts(g, slopes, of_channels),
    )
    return dx, partial


def sums_shape(shape: Sequence[int], strides: Sequence[int], dim: int, slopes: Tensor | None) -> tuple[int, ...]:
    """That of the partial sums of the bias's gradient, (programs, channels, programs); with ``slopes`` two of these."""
    of_bias = _matrix(shape, strides, dim).grouped_shape
    return of_bias if slopes is None else (2, *of_bias)
