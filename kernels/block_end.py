"""The end of a block in one pass each way: y = scale * x, dropped by sample, + residual; all but x may be missing.

A dense tensor is a matrix (see ``base/matrix.py``) in which an element of the scale belongs to a column, or to a run
of rows; without a scale a sample is a row.  A row lies in one sample, of which there are ``sample_rows``, and each
sample has one random number: its fate is the same in every memory format, and nothing is kept of it but the seed.

Backward one pass reads the gradient, and the input where the scale's gradient is wanted: that leaves as partial sums,
which PyTorch's ``sum`` adds in a fixed order.  The residual's gradient is the output's.  What there is (scale,
residual, seed) is decided at run time, by branches that a whole program takes alike.  Beside 16-bit inputs, scale and
residual may be float32, as where autocast computed the input; then so is the result.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from math import prod

import torch
from torch import Tensor

from .base._triton import tl, triton
from .base.launch import ACCUMULATOR, COMPUTE, DTYPES, TRITON_TYPE, Configuration, configure, kernel, launch, ships
from .base.layout import dense, dense_like
from .base.matrix import ChannelMatrix, channel_matrix, channel_values, place_of, store_sums, tile_of, tiling_of
from .base.numerics import scalar
from .base.random import channel_bits, keep_threshold
from .base.tiles import TILE, load, store, threads_for, tile_shape, width_for

__all__ = ["block_end_backward", "block_end_forward", "has_samples", "sums_shape"]


@triton.jit
def sample_noise(seed_pointer, last, kept, block_row, sample_rows, has_seed, HEIGHT: tl.constexpr):
    """What dropping multiplies the rows of a tile by, (HEIGHT, 1): ``kept`` or 0; 1 where nothing drops."""
    noise = tl.zeros((HEIGHT,), kept.dtype) + 1
    if has_seed:
        seed = tl.load(seed_pointer)
        first = block_row * HEIGHT
        sample = first // sample_rows
        if sample == (first + HEIGHT - 1) // sample_rows:  # most tiles lie in one, which costs one number
            keep = (channel_bits(seed, sample) <= scalar(last, tl.uint32)) & (tl.arange(0, HEIGHT) >= 0)
        else:
            keep = channel_bits(seed, (first + tl.arange(0, HEIGHT)) // sample_rows) <= scalar(last, tl.uint32)
        noise = tl.where(keep, kept, kept * 0)
    return noise[:, None]


@kernel
def block_end_forward_kernel(
    x_pointer,  # input, (rows, columns)
    residual_pointer,  # (rows, columns)
    scale_pointer,  # (channels,)
    y_pointer,  # output, (rows, columns)
    seed_pointer,  # one int64
    rows: tl.int64,
    columns,
    channels: tl.int32,
    row_blocks: tl.int64,
    steps: tl.int64,  # row blocks per program
    column_blocks: tl.int64,
    sample_rows: tl.int64,
    has_residual: tl.int32,
    has_scale: tl.int32,
    has_seed: tl.int32,
    last: tl.int64,  # the last random number that is kept
    kept: tl.float64,  # what samples that are kept are multiplied by
    TILING: tl.constexpr,
    COMPUTE: tl.constexpr,
    ALIGN: tl.constexpr,
):
    place = place_of(rows, columns, column_blocks, ALIGN)
    kept = scalar(kept, COMPUTE)
    for block_row in range(place.part * steps, tl.minimum(place.part * steps + steps, row_blocks)):
        tile = tile_of(block_row, place, TILING)

        y = load(x_pointer, tile, COMPUTE)
        if has_scale:
            y *= channel_values(scale_pointer, block_row, place, channels, COMPUTE, TILING)
        y *= sample_noise(seed_pointer, last, kept, block_row, sample_rows, has_seed, TILING.height)
        if has_residual:
            y += load(residual_pointer, tile, COMPUTE)
        store(y_pointer, tile, y)


@kernel
def block_end_backward_kernel(
    g_pointer,  # gradient of the output, (rows, columns)
    x_pointer,  # input, (rows, columns)
    scale_pointer,  # (channels,)
    dx_pointer,  # gradient of the input, (rows, columns)
    partial_pointer,  # partial sums of the scale's gradient, see `ChannelMatrix`
    seed_pointer,  # the forward pass's
    rows: tl.int64,
    columns,
    channels: tl.int32,
    row_blocks: tl.int64,
    steps: tl.int64,
    column_blocks: tl.int64,
    sample_rows: tl.int64,
    has_scale: tl.int32,
    has_seed: tl.int32,
    wants_sums: tl.int32,
    last: tl.int64,
    kept: tl.float64,
    TILING: tl.constexpr,
    COMPUTE: tl.constexpr,
    ALIGN: tl.constexpr,
):
    place = place_of(rows, columns, column_blocks, ALIGN)
    kept = scalar(kept, COMPUTE)
    totals = tl.full((TILING.height, TILING.width), 0.0, COMPUTE)
    for block_row in range(place.part * steps, tl.minimum(place.part * steps + steps, row_blocks)):
        tile = tile_of(block_row, place, TILING)

        g = load(g_pointer, tile, COMPUTE)
        g *= sample_noise(seed_pointer, last, kept, block_row, sample_rows, has_seed, TILING.height)
        dx = g
        if has_scale:
            dx *= channel_values(scale_pointer, block_row, place, channels, COMPUTE, TILING)
        store(dx_pointer, tile, dx)

        if wants_sums:
            products = g * load(x_pointer, tile, COMPUTE)
            if TILING.by_row:
                store_sums(partial_pointer, products, block_row, place, TILING)
            else:
                totals += products
    if not TILING.by_row:  # noqa: SIM102 (this condition is the compiler's, the next one the program's)
        if wants_sums:
            store_sums(partial_pointer, totals, place.part, place, TILING)


# --- Configurations and launchers -------------------------------------------------------------------------------------

_ROW_WIDTHS = (16, 256, TILE)
_COLUMN_WIDTHS = (16, 64, 256)


@cache
def _configuration(direction: str, dtype: torch.dtype, result: torch.dtype, by_row: bool, width: int) -> Configuration:
    """``dtype`` is the input's and its gradient's, ``result`` that of all else."""
    forward = direction == "forward"
    mixed = "" if result is dtype else f" to {TRITON_TYPE[result]}"
    wide = tile_shape(dtype)[0] if width > 16 else 0
    others = ("residual", "scale", "y") if forward else ("g", "scale")
    return configure(
        block_end_forward_kernel if forward else block_end_backward_kernel,
        f"block end {direction} {'rows' if by_row else 'columns'} x{width} {TRITON_TYPE[dtype]}{mixed}",
        dtype,
        {"TILING": tiling_of(dtype, by_row, width), "COMPUTE": COMPUTE[dtype]},
        pointers={
            **dict.fromkeys(others, result),
            **({} if forward else {"partial": ACCUMULATOR[dtype]}),
            "seed": torch.int64,
        },
        aligned=("columns",),
        threads=threads_for(dtype),
        wide_loads=2 * wide,
        wide_stores=wide,
        rare=bool(mixed) or dtype not in (torch.bfloat16, torch.float32),
    )


@ships("block_end")
def configurations() -> Iterator[Configuration]:
    pairs = [*((dtype, dtype) for dtype in DTYPES), (torch.bfloat16, torch.float32), (torch.float16, torch.float32)]
    for direction in ("forward", "backward"):
        for pair in pairs:
            for by_row, widths in ((True, _ROW_WIDTHS), (False, _COLUMN_WIDTHS)):
                for width in widths:
                    yield _configuration(direction, *pair, by_row, width)


def has_samples(x: Tensor) -> bool:
    """Whether the samples of a dense tensor, dimension 0, lie one after another."""
    return x.shape[0] == 1 or x.stride(0) == x[0].numel()


def _matrix(shape: Sequence[int], strides: Sequence[int], dim: int) -> ChannelMatrix:
    """Of a dense tensor that isn't empty; the scale lies along ``dim``, or where that is 0, there is none."""
    if dim == 0:
        columns = prod(shape[1:])
        width = width_for(columns, _ROW_WIDTHS)
        return ChannelMatrix(True, shape[0], columns, 1, TILE // width, width)
    return channel_matrix(shape, strides, dim, shape[dim], _ROW_WIDTHS, _COLUMN_WIDTHS)


def _noise(matrix: ChannelMatrix, samples: int, p: float) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """The kernels' ``sample_rows``, and ``last`` and ``kept``; of ``samples`` each is dropped by itself."""
    return (matrix.rows // samples,), (keep_threshold(p), 0.0 if p == 1 else 1 / (1 - p))


def block_end_forward(
    x: Tensor,
    residual: Tensor | None,
    scale: Tensor | None,
    seed: Tensor | None,
    p: float,
    dim: int,
    samples: int,
) -> Tensor:
    """scale * x, dropped, + residual, in the memory order of ``x``.

    The ``scale`` is (x.shape[dim],); without one ``dim`` is 0.  With a ``seed``, each of ``samples`` (those of
    dimension 0, see `has_samples`, or 1) is dropped with probability ``p``.
    """
    x = dense(x)
    result = next((one.dtype for one in (residual, scale) if one is not None), x.dtype)
    y = torch.empty_like(x, dtype=result)
    matrix = _matrix(x.shape, x.stride(), dim)
    rows, noise = _noise(matrix, samples, p)
    launch(
        _configuration("forward", x.dtype, result, matrix.by_row, matrix.width),
        matrix.programs,
        x,
        y if residual is None else dense_like(residual, x.stride()),  # what isn't there isn't read
        y if scale is None else scale.contiguous(),
        y,
        x.new_empty(0, dtype=torch.int64) if seed is None else seed,
        *matrix.extents,
        *rows,
        *(int(one is not None) for one in (residual, scale, seed)),
        *noise,
    )
    return y


def block_end_backward(
    g: Tensor,
    x: Tensor | None,
    scale: Tensor | None,
    seed: Tensor | None,
    strides: Sequence[int],
    dtype: torch.dtype,
    p: float,
    dim: int,
    samples: int,
) -> tuple[Tensor, Tensor | None]:
    """The gradient of the input, whose dense strides were ``strides``, in its ``dtype``; with ``x`` the scale's, too.

    The latter is partial sums, of the shape of `sums_shape`.
    """
    g = dense_like(g, strides)
    dx = g.new_empty_strided(g.shape, strides, dtype=dtype)
    matrix = _matrix(g.shape, strides, dim)
    partial = None
    if x is not None:
        x = dense_like(x, strides)
        partial = torch.empty(matrix.grouped_shape, dtype=ACCUMULATOR[dtype], device=g.device)
    rows, noise = _noise(matrix, samples, p)
    launch(
        _configuration("backward", dtype, g.dtype, matrix.by_row, matrix.width),
        matrix.programs,
        g,
        dx if x is None else x,
        g if scale is None else scale.contiguous(),
        dx,
        g.new_empty(0, dtype=ACCUMULATOR[dtype]) if partial is None else partial,
        g.new_empty(0, dtype=torch.int64) if seed is None else seed,
        *matrix.extents,
        *rows,
        *(int(one is not None) for one in (scale, seed, x)),
        *noise,
    )
    return dx, partial


def sums_shape(shape: Sequence[int], strides: Sequence[int], dim: int) -> tuple[int, ...]:
    """That of the partial sums of the scale's gradient, (programs, channels, programs)."""
    return _matrix(shape, strides, dim).grouped_shape
