"""Channels that are scaled by a gate of their own, x * activation(gate): a squeeze-and-excitation block's last step.

Of (samples, channels, places) the places of a channel are a line (see ``base/lines.py``), contiguous or, channels last,
side by side with those of its neighbours; each line has one gate.  A program walks ``tiles`` tiles of a block of lines.
Backward it reads input and gradient once, for the input's gradient and, line by line, for a partial sum of the gate's;
PyTorch's ``sum`` adds the partial sums in a fixed order.
"""

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from .base._triton import tl
from .base.launch import ACCUMULATOR, COMPUTE, DTYPES, TRITON_TYPE, Configuration, configure, kernel, launch, ships
from .base.layout import dense_like
from .base.lines import ACROSS, ALONG, Lines, LineTiling, contiguous_extent, line_tile, line_tiling, part_of_lines
from .base.numerics import widen
from .base.tiles import cdiv, load, store, threads_for, tile_shape, width_for
from .functions.activation import ACTIVATIONS, Activated, Activation, gradient_from_input

__all__ = ["CHANNEL_GATES", "gated_channels_backward", "gated_channels_forward", "lines_of_channels"]

#: The activations of channels' gates.
CHANNEL_GATES = ("hardsigmoid", "sigmoid")


@kernel
def gated_channels_kernel(
    g_pointer,  # gradient of the output; or None in the forward pass
    x_pointer,  # input
    gate_pointer,  # (lines,)
    y_pointer,  # output, or gradient of the input, in the memory order of the input
    partial_pointer,  # partial sums of the gate's gradient, (splits, lines); or None in the forward pass
    count: tl.int64,
    dim_size,
    inner_size,
    splits: tl.int32,
    tiles: tl.int32,
    ACTIVATION: tl.constexpr,  # without parameters
    AXIS: tl.constexpr,
    COMPUTE: tl.constexpr,
    LINES: tl.constexpr,
    WIDTH: tl.constexpr,
    ALIGN: tl.constexpr,
):
    lines, split = part_of_lines(count, dim_size, inner_size, splits, AXIS, LINES, ALIGN)
    start = split.to(tl.int32) * tiles * WIDTH

    gate = widen(tl.load(gate_pointer + lines.line, mask=lines.exists, other=0), COMPUTE)
    scale = tl.expand_dims(ACTIVATION.forward(gate, 0.0, 0.0), AXIS)
    if g_pointer is not None:
        # Element by element: one reduction between threads, not one a tile.
        products = tl.zeros((LINES, WIDTH) if AXIS == 1 else (WIDTH, LINES), COMPUTE)
    for first in range(start, start + tiles * WIDTH, WIDTH):
        tile, _place = line_tile(lines, first, AXIS, WIDTH)
        if g_pointer is None:
            store(y_pointer, tile, load(x_pointer, tile, COMPUTE) * scale)
        else:
            g = load(g_pointer, tile, COMPUTE)
            x = load(x_pointer, tile, COMPUTE)
            store(y_pointer, tile, g * scale)
            products += g * x
    if g_pointer is not None:
        dgate = gradient_from_input(tl.sum(products, AXIS), gate, 0.0, 0.0, ACTIVATION)
        tl.store(partial_pointer + split * count + lines.line, dgate, mask=lines.exists)


# --- Configurations and launchers -------------------------------------------------------------------------------------

_WIDTHS = {ALONG: (16, 64, 256, 2048), ACROSS: (32,)}
_LINES_ACROSS = 64
#: Programs that lines are split into, where they have tiles for as many.  A constant, as of ``base/channels.py``.
_PROGRAMS = 1024


@cache
def _configuration(direction: str, row: Activation, dtype: torch.dtype, axis: int, width: int) -> Configuration:
    forward = direction == "forward"
    wide = tile_shape(dtype)[0] if axis == ACROSS or width >= 64 else 0
    return configure(
        gated_channels_kernel,
        f"channels gated by {row.name} {direction} {'along' if axis == ALONG else 'across'} x{width} "
        f"{TRITON_TYPE[dtype]}",
        dtype,
        {
            **dict.fromkeys(("g_pointer", "partial_pointer") if forward else ()),
            "ACTIVATION": row,
            "COMPUTE": COMPUTE[dtype],
            **_tiling(axis, width).constants,
        },
        pointers={"partial": ACCUMULATOR[dtype]},
        aligned=(contiguous_extent(axis),),
        threads=threads_for(dtype),
        wide_loads=(1 if forward else 2) * wide,
        wide_stores=wide,
        rare=row.name != "sigmoid" or dtype not in (torch.bfloat16, torch.float32),
    )


def _tiling(axis: int, width: int) -> LineTiling:
    return line_tiling(axis, width, _LINES_ACROSS)


@ships("gated")
def configurations() -> Iterator[Configuration]:
    for name in CHANNEL_GATES:
        for dtype in DTYPES:
            for axis, widths in _WIDTHS.items():
                for width in widths:
                    yield _configuration("forward", ACTIVATIONS[name], dtype, axis, width)
                    yield _configuration("backward", ACTIVATIONS[name], dtype, axis, width)


def lines_of_channels(x: Tensor) -> Lines | None:
    """The lines of (N, C, ...), one for each sample's channel, as they lie in memory; None of another memory order."""
    count, inner = x.shape[0] * x.shape[1], x.shape[1]
    if x.is_contiguous():
        inner = 1
    elif not x.movedim(1, -1).is_contiguous():
        return None
    return Lines(count, x.numel() // count, inner)


def _shares(lines: Lines) -> tuple[int, int, int]:
    """The width of tiles, the splits of a block of lines, and the tiles of each."""
    width = width_for(lines.dim_size, _WIDTHS[lines.axis])
    tiles = cdiv(lines.dim_size, width)
    splits = min(tiles, max(1, _PROGRAMS // lines.blocks(_tiling(lines.axis, width).lines)))
    tiles_per_split = cdiv(tiles, splits)
    return width, cdiv(tiles, tiles_per_split), tiles_per_split


def _launch(direction: str, activation: Activated, lines: Lines, *tensors: Tensor) -> None:
    width, splits, tiles = _shares(lines)
    configuration = _configuration(direction, activation.row, tensors[0].dtype, lines.axis, width)
    programs = lines.blocks(_tiling(lines.axis, width).lines) * splits
    launch(configuration, programs, *tensors, *lines.extents, splits, tiles)


def gated_channels_forward(x: Tensor, gate: Tensor, activation: Activated) -> Tensor:
    """x * activation(gate) for (N, C, ...), contiguous or channels last, and a gate of (N, C, 1, ...)."""
    y = torch.empty_like(x)
    lines = lines_of_channels(x)
    assert lines is not None
    _launch("forward", activation, lines, x, gate.contiguous(), y)
    return y


def gated_channels_backward(g: Tensor, x: Tensor, gate: Tensor, activation: Activated) -> tuple[Tensor, Tensor]:
    """Gradients of the input and of the gate."""
    g = dense_like(g, x.stride())
    dx = torch.empty_like(x)
    lines = lines_of_channels(x)
    assert lines is not None
    _, splits, _ = _shares(lines)
    partial = torch.empty((splits, lines.count), dtype=ACCUMULATOR[x.dtype], device=x.device)
    _launch("backward", activation, lines, g, x, gate.contiguous(), dx, partial)
    return dx, partial.sum(0).to(gate.dtype).view(gate.shape)
