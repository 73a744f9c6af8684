"""Max pooling, and in the same pass the bias and the activation of the convolution before it.

`pool_window` has the windows, how images lie in tiles, and the code of a window, which is all that the backward pass
needs besides the gradient.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from itertools import product
from math import prod
from typing import Any

import torch
from torch import Tensor

from .base.launch import ACCUMULATOR, COMPUTE, DTYPES, TRITON_TYPE, Configuration, configure, launch, ships
from .base.layout import dense_like
from .base.matrix import ChannelMatrix
from .base.tiles import cdiv, width_for
from .batch_norm_operands import Norm
from .functions.activation import ACTIVATIONS, IDENTITY, Activated, Activation
from .pool_backward import pool_backward_cells_kernel, pool_backward_kernel
from .pool_forward import pool_forward_kernel
from .pool_window import (
    ANY,
    FIXED_WINDOWS,
    POINT,
    Fixed,
    Pooled,
    Window,
    code_bits,
    image_matrix,
    images,
    kept_beside_code,
    memory_format,
    pooled_like,
)

__all__ = ["pool_backward", "pool_forward"]

_TILE = 1024
_WIDTHS = (8, 16, 32)  # the smaller ones for short lines
_WIDTH = _WIDTHS[-1]
_THREADS = 128

# --- Configurations ---------------------------------------------------------------------------------------------------

#: What kernels are told of volumes alone.
_OF_VOLUMES = (
    *("depth", "pooled_depth", "cells_depth"),
    *("kernel_depth", "stride_depth", "padding_depth", "dilation_depth"),
)


@cache
def _configuration(
    direction: str,
    dtype: torch.dtype,
    row: Activation,
    fixed: Fixed,
    channels_last: bool,
    biased: bool,
    keeps_pre_activation: bool,
    normalises: bool = False,
    residual: bool = False,
    volumes: bool = False,
    covered: bool = False,
    width: int = _WIDTH,
) -> Configuration:
    """``biased``: a bias is added (where it ``normalises``, by a weight multiplied), or its gradient is summed.
    ``covered``: see `_is_covered`.
    """
    kept = kept_beside_code(row, fixed)
    kernel, stride, directions = fixed
    statistic = ACCUMULATOR[dtype]
    # Along a line, larger windows are met in strides.
    contiguous = channels_last or covered or kernel in (1, 2, 4)
    # Where the columns of a volume are odd, and along short lines of windows that overlap, fewer threads run out of
    # registers.
    crowded = (volumes and biased and not channels_last) or (covered and kernel != stride and width == _WIDTHS[0])
    threads = 2 * _THREADS if direction == "backward" and crowded else _THREADS
    wide = _TILE * dtype.itemsize // 16 // threads
    constants: dict[str, Any] = {"ACTIVATION": row}
    if direction == "forward":
        function = pool_forward_kernel
        wide_loads, wide_stores = fixed.positions if contiguous else 0, 1
        constants |= {"KERNEL": kernel, "DIRECTIONS": directions}
        present = {"residual": residual, "mean": normalises, "variance": normalises}
        present |= {"weight": normalises and biased, "bias": biased}
        present |= {"pre_activation": keeps_pre_activation}
    else:
        constants |= {"KEPT": kept}
        present = {"saved": kept in ("output", "input"), "partial": biased}
        if kernel:
            function = pool_backward_cells_kernel
            loads, stores = cdiv(kernel, stride) ** (directions - covered), stride**directions
            wide_loads, wide_stores = (loads, stores) if contiguous else (0, 0)
            constants |= {"KERNEL": kernel, "STRIDE": stride, "DIRECTIONS": directions}
        else:
            function = pool_backward_kernel
            wide_loads, wide_stores = 1 if contiguous else 0, 1
    parts = (
        f"pool {direction}",
        str(fixed),
        volumes and "volumes",
        "channels last" if channels_last else "contiguous",
        biased and "+ bias",
        normalises and "normalised",
        residual and "+ residual",
        covered and "covered",
        width != _WIDTH and f"x{width}",
        row.label,
        TRITON_TYPE[dtype],
    )
    if function is not pool_backward_kernel:
        constants["COVERED"] = covered
    planar = () if volumes else [name for name in _OF_VOLUMES if name in function.arg_names]
    return configure(
        function,
        " ".join(part for part in parts if part),
        dtype,
        {
            **dict.fromkeys(planar),
            **{f"{name}_pointer": None for name, there in present.items() if not there},
            **constants,
            "BITS": code_bits(fixed, kept == "mask"),
            "CHANNELS_LAST": channels_last,
            "COMPUTE": COMPUTE[dtype],
            "HEIGHT": _TILE // width,
            "WIDTH": width,
        },
        pointers={
            "code": torch.uint8,
            "index": torch.int64,
            "partial": statistic,
            "mean": statistic,
            "variance": statistic,
            "weight": statistic,
            "bias": statistic if normalises else dtype,
        },
        threads=threads,
        aligned=("columns",) if channels_last else ("columns", "width", "pooled_width"),
        least_aligned=_least_aligned(fixed) if covered else 1,
        wide_loads=wide * wide_loads,
        wide_stores=wide * wide_stores,
    )


# The types that are compiled where kernels differ in nothing else, and the activations that stand for the others:
# device functions know nothing of the window around them.
_COMMON_DTYPES = (torch.bfloat16, torch.float32)
_COMMON_ACTIVATIONS = ("relu", "leaky_relu", "tanh", "gelu")


@ships("pool")
def configurations() -> Iterator[Configuration]:
    relu, identity = ACTIVATIONS["relu"], IDENTITY.row
    two, three = Fixed(2, 2), Fixed(3, 2)
    for direction, channels_last in product(("forward", "backward"), (True, False)):
        for fixed, dtype in product((two, three), DTYPES):
            pooling = _configuration(direction, dtype, identity, fixed, channels_last, False, False)
            yield replace(pooling, rare=dtype is torch.float16)
        for dtype in _COMMON_DTYPES:
            yield _configuration(direction, dtype, identity, ANY, channels_last, False, False)
        # Behind a convolution.
        for fixed, dtype in zip((POINT.fixed, two, three, ANY), (*_COMMON_DTYPES, *_COMMON_DTYPES), strict=True):
            yield _configuration(direction, dtype, relu, fixed, channels_last, True, False)
        # Images of whole cells, their lines long and short; the forward pass gains nothing where windows overlap.
        fixed_windows = (two,) if direction == "forward" else (two, three)
        for fixed, width, dtype in product(() if channels_last else fixed_windows, _WIDTHS, _COMMON_DTYPES):
            configuration = _configuration(
                *(direction, dtype, relu, fixed, False, True, False), covered=True, width=width
            )
            yield replace(configuration, rare=dtype is not torch.bfloat16)
        # Of lines, and of volumes: alone and behind a convolution.
        for volumes, fixed in _OTHERS:
            format_ = (fixed, channels_last)
            yield _configuration(*(direction, torch.bfloat16, relu, *format_, True, False), volumes=volumes)
            alone = _configuration(*(direction, torch.float32, identity, *format_, False, False), volumes=volumes)
            yield replace(alone, rare=True)
    for direction, row in product(("forward", "backward"), ACTIVATIONS.values()):
        if row is not relu:
            keeps_pre_activation = direction == "forward" and kept_beside_code(row, two) == "input"
            pass_ = _configuration(direction, torch.float32, row, two, True, True, keeps_pre_activation)
            yield replace(pass_, rare=row.name not in _COMMON_ACTIVATIONS)
    # Behind a batch norm.
    for (fixed, dtype), residual in product(zip((two, three), _COMMON_DTYPES, strict=True), (False, True)):
        yield _configuration("forward", dtype, relu, fixed, True, True, False, True, residual)


#: Whether volumes are pooled, and by which windows.
_OTHERS = (
    *((False, fixed) for fixed in FIXED_WINDOWS if fixed.directions == 1),
    *((True, fixed) for fixed in (*(fixed for fixed in FIXED_WINDOWS if fixed.directions > 1), ANY)),
)


# --- Launchers --------------------------------------------------------------------------------------------------------


def _matrix(shape: tuple[int, ...], channels_last: bool) -> ChannelMatrix:
    """Of images of this shape, which aren't empty."""
    rows, columns = image_matrix(shape, channels_last)
    width = _WIDTH if channels_last else width_for(columns, _WIDTHS)
    return ChannelMatrix(
        *(not channels_last, rows, columns, shape[1], _TILE // width, width),
        run=1 if channels_last else prod(shape[2:-1]),
    )


def _is_covered(size: Sequence[int], pooled: Sequence[int], window: Window, channels_last: bool) -> bool:
    """Whether contiguous images are cells of whole windows side by side, as of `pool_window`."""
    kernel, stride, directions = window.fixed
    if channels_last or len(size) > 2 or kernel < 2 or set(window.padding[2 - directions :]) != {kernel - stride}:
        return False
    if pooled[1] % _least_aligned(window.fixed):
        return False
    height = pooled[0] * (stride if directions > 1 else 1)
    return size[0] == height and size[1] == stride * pooled[1]


def _least_aligned(fixed: Fixed) -> int:
    """Of lines of cells: where windows overlap, a thread of single elements runs out of registers."""
    return 1 if fixed.kernel == fixed.stride else 2


def pool_forward(
    x: Tensor,
    bias: Tensor | None,
    window: Window,
    activation: Activated = IDENTITY,
    *,
    keeps: bool,
    emits_indices: bool = False,
    inplace: bool = False,
    mean: Tensor | None = None,
    variance: Tensor | None = None,
    weight: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
) -> Pooled:
    """max over windows of activation(x + bias + residual), and what was asked for besides.

    With ``mean`` and ``variance``, (x - mean) / sqrt(variance + eps) * weight takes the place of x.

    ``keeps``: what the backward pass needs.  ``inplace``, for windows of one position: write over the images ``x``,
    which must be in one of the memory formats.
    """
    x, channels_last = images(x)
    if residual is not None:
        residual = dense_like(residual, x.stride())
    if mean is not None and variance is not None:
        norm = Norm(mean, variance, weight, bias, eps)
        mean, variance, weight, bias = norm.vectors(x.dtype, ACCUMULATOR[x.dtype]).values()
    elif bias is not None:
        bias = bias.contiguous()
    results = pooled_like(
        *(x, x.shape, channels_last, window, activation),
        keeps=keeps,
        emits_indices=emits_indices,
        y=x if inplace else None,
    )
    matrix = _matrix(results.y.shape, channels_last)
    (size, pooled), window = _flat((x.shape[2:], results.y.shape[2:]), window)
    keeps_pre_activation = keeps and kept_beside_code(activation.row, window.fixed) == "input"
    launch(
        _configuration(
            *("forward", x.dtype, activation.row, window.fixed, channels_last, bias is not None, keeps_pre_activation),
            normalises=mean is not None,
            residual=residual is not None,
            volumes=len(size) == 3,
            covered=window.fixed.kernel != 3 and _is_covered(size, pooled, window, channels_last),
            width=matrix.width,
        ),
        matrix.programs,
        *(
            tensor
            for tensor in (x, residual, mean, variance, weight, bias, results.y, results.code)
            if tensor is not None
        ),
        *((results.pre_activation,) if keeps_pre_activation else ()),
        *(results.indices, matrix.rows, matrix.columns, x.shape[1], *size, *pooled, *window.arguments),
        *(int(keeps), int(emits_indices), eps, activation.a, activation.b),
    )
    return results


def _flat(sizes: tuple[Sequence[int], ...], window: Window) -> tuple[tuple[Sequence[int], ...], Window]:
    """Volumes without pooling are images: their levels are lines below each other."""
    if len(window.kernel) == 3 and window.is_point:
        return tuple((size[0] * size[1], size[2]) for size in sizes), POINT
    return sizes, window


def pool_backward(
    g: Tensor,
    code: Tensor,
    saved: Tensor | None,
    size: tuple[int, ...],
    channels_last: bool,
    window: Window,
    activation: Activated = IDENTITY,
    *,
    sums_bias: bool = False,
) -> tuple[Tensor, Tensor]:
    """Gradient of images of this ``size``, and that of the bias, not rounded: empty unless asked for.

    ``saved`` is what `kept_beside_code` names: the pooled images, the maxima before the activation, or None.
    """
    order = memory_format(len(size), channels_last)
    g = g.contiguous(memory_format=order)
    images_of = g.shape[:2]
    dx = torch.empty((*images_of, *size), dtype=g.dtype, device=g.device, memory_format=order)
    (extents, pooled), window = _flat((size, g.shape[2:]), window)
    covered = _is_covered(extents, pooled, window, channels_last)
    if window.fixed == ANY:
        matrix = _matrix(dx.shape, channels_last)
        arguments = (*extents, *pooled, *window.arguments)
    else:
        # Unless windows are cells, cells cover the padding before the image, and all of the image.
        strides = zip(extents, window.padding, window.stride, strict=True)
        cells = pooled if covered else [cdiv(extent + padding, stride) for extent, padding, stride in strides]
        matrix = _matrix((*images_of, *cells), channels_last)
        arguments = (*extents, *cells, *pooled, *window.padding)
    partial = torch.empty(matrix.partial_shape, dtype=ACCUMULATOR[g.dtype], device=g.device) if sums_bias else None
    launch(
        _configuration(
            *("backward", g.dtype, activation.row, window.fixed, channels_last, sums_bias, False),
            volumes=len(extents) == 3,
            covered=covered,
            width=matrix.width,
        ),
        matrix.programs,
        *(tensor for tensor in (g, code, saved, dx, partial) if tensor is not None),
        *(matrix.rows, matrix.columns, *arguments, activation.a, activation.b),
    )
    return dx, g.new_empty(0) if partial is None else matrix.totals(partial)
