"""Gates: activation(gate) * other in one pass each way, of two tensors, or of the halves of one.

Two tensors are walked flat.  The halves of one along a dimension are a matrix each, (rows, columns), whose rows lie one
``pitch`` apart, twice the columns: both are read where they lie, and their gradients written where they belong in one
tensor.  The gate and the other operand are all that is kept; the activation is computed again.
"""

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from .base._triton import tl, triton
from .base.launch import COMPUTE, DTYPES, TRITON_TYPE, Configuration, configure, kernel, launch, ships
from .base.layout import dense, dense_like
from .base.tiles import (
    TILE,
    Tile,
    cdiv,
    flat_tile,
    load,
    matrix_tile,
    programs_for,
    store,
    threads_for,
    tile_shape,
    width_for,
)
from .functions.activation import ACTIVATIONS, Activated, Activation, gradient_from_input, value_of

__all__ = [
    "GATES",
    "gated_backward",
    "gated_forward",
    "gated_halves_backward",
    "gated_halves_forward",
    "halved_strides",
]

#: The activations that gates have: of GLU, ReGLU, GEGLU (both forms of GELU) and SwiGLU, and the hard sigmoid.
GATES = ("gelu", "gelu_tanh", "hardsigmoid", "relu", "sigmoid", "silu")


@triton.jit
def gate_tile(rows, columns, pitch, column_blocks, FLAT: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """This program's tile of the result, and of each operand."""
    if FLAT:
        _, result = flat_tile(rows, HEIGHT, WIDTH)
        operand = result
    else:
        program = tl.program_id(0).to(tl.int64)
        block_row = program // column_blocks
        block_column = program % column_blocks
        result = matrix_tile(block_row, block_column, rows, columns, HEIGHT, WIDTH)
        offsets = tl.arange(0, HEIGHT)[:, None] * pitch + tl.arange(0, WIDTH)[None, :]
        operand = Tile(block_row * HEIGHT * pitch + block_column * WIDTH, offsets, result.inside, result.whole)
    return result, operand


@kernel
def gated_kernel(
    g_pointer,  # gradient of the output, (rows, columns); or None in the forward pass, as the last two
    gate_pointer,  # (rows, columns), a pitch from row to row
    other_pointer,  # likewise
    y_pointer,  # output, (rows, columns); or None in the backward pass
    dgate_pointer,  # gradient of the gate, which lies as it does
    dother_pointer,  # gradient of the other operand, likewise
    rows: tl.int64,  # of flat tensors the number of elements
    columns,
    pitch,
    column_blocks: tl.int64,
    ACTIVATION: tl.constexpr,  # without parameters
    FLAT: tl.constexpr,
    COMPUTE: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    result, operand = gate_tile(rows, columns, pitch, column_blocks, FLAT, HEIGHT, WIDTH)

    if g_pointer is not None:
        g = load(g_pointer, result, COMPUTE)
    gate = load(gate_pointer, operand, COMPUTE)
    other = load(other_pointer, operand, COMPUTE)
    if g_pointer is None:
        store(y_pointer, result, value_of(gate, 0.0, 0.0, ACTIVATION) * other)
    else:
        store(dgate_pointer, operand, gradient_from_input(g * other, gate, 0.0, 0.0, ACTIVATION))
        store(dother_pointer, operand, g * value_of(gate, 0.0, 0.0, ACTIVATION))


# --- Configurations and launchers -----------------------------------------------------------------------------------

_WIDTHS = (32, 256)
_GRADIENTS = ("g_pointer", "dgate_pointer", "dother_pointer")


@cache
def _configuration(direction: str, row: Activation, dtype: torch.dtype, width: int | None) -> Configuration:
    """``width`` of a matrix's tiles; None for flat tensors."""
    forward = direction == "forward"
    rows, columns = tile_shape(dtype)
    wide = rows if width is None or width > 32 else 0
    return configure(
        gated_kernel,
        f"gated {row.name} {direction}{'' if width is None else f' halves x{width}'} {TRITON_TYPE[dtype]}",
        dtype,
        {
            **dict.fromkeys(_GRADIENTS if forward else ("y_pointer",)),
            "ACTIVATION": row.for_results_of(dtype),
            "FLAT": width is None,
            "COMPUTE": COMPUTE[dtype],
            "HEIGHT": rows if width is None else TILE // width,
            "WIDTH": columns if width is None else width,
        },
        threads=threads_for(dtype),
        divisible=() if width is None else None,
        wide_loads=(2 if forward else 3) * wide,
        wide_stores=(1 if forward else 2) * wide,
        rare=row.name != "silu" or dtype not in (torch.bfloat16, torch.float32),
    )


@ships("gated")
def configurations() -> Iterator[Configuration]:
    for name in GATES:
        for dtype in DTYPES:
            for width in (None, *_WIDTHS):
                yield _configuration("forward", ACTIVATIONS[name], dtype, width)
                yield _configuration("backward", ACTIVATIONS[name], dtype, width)


def _launch(direction: str, activation: Activated, columns: int | None, *tensors: Tensor) -> None:
    """The first operand has as many elements as a tensor that is walked over, but is a half where there are columns."""
    operand = tensors[0] if direction == "forward" else tensors[1]
    numel = operand.numel()
    if columns is None:
        configuration = _configuration(direction, activation.row, operand.dtype, None)
        extents, programs = (numel, 1, 1, 1), programs_for(numel)
    else:
        width = width_for(columns, _WIDTHS)
        configuration = _configuration(direction, activation.row, operand.dtype, width)
        rows, column_blocks = numel // columns, cdiv(columns, width)
        extents = (rows, columns, 2 * columns, column_blocks)
        programs = cdiv(rows, TILE // width) * column_blocks
    launch(configuration, programs, *tensors, *extents)


def gated_forward(gate: Tensor, other: Tensor, activation: Activated) -> Tensor:
    """activation(gate) * other, in the memory order of ``gate``."""
    gate = dense(gate)
    other = dense_like(other, gate.stride())
    y = torch.empty_like(gate)
    _launch("forward", activation, None, gate, other, y)
    return y


def gated_backward(g: Tensor, gate: Tensor, other: Tensor, activation: Activated) -> tuple[Tensor, Tensor]:
    """Gradients of the gate and of the other operand, in the memory order of ``gate``."""
    gate = dense(gate)
    other, g = dense_like(other, gate.stride()), dense_like(g, gate.stride())
    dgate, dother = torch.empty_like(gate), torch.empty_like(gate)
    _launch("backward", activation, None, g, gate, other, dgate, dother)
    return dgate, dother


def halved_strides(x: Tensor, dim: int) -> list[int]:
    """The strides of half of a dense tensor, of which the other half is left out in memory, too."""
    inner = x.stride(dim)
    return [stride // 2 if stride > inner else stride for stride in x.stride()]


def _halves(x: Tensor, dim: int, gate_first: bool) -> tuple[Tensor, Tensor]:
    """The gate, and the other half."""
    first, second = x.chunk(2, dim)
    return (first, second) if gate_first else (second, first)


def _columns(x: Tensor, dim: int) -> int:
    """The elements of a half of dense memory that lie together: those of the dimension and all inside it."""
    return x.shape[dim] // 2 * x.stride(dim)


def gated_halves_forward(x: Tensor, dim: int, activation: Activated, gate_first: bool) -> Tensor:
    """activation(gate) * other for the halves of ``x`` along ``dim``, in its memory order."""
    x = dense(x)
    shape = [size // 2 if i == dim else size for i, size in enumerate(x.shape)]
    y = x.new_empty_strided(shape, halved_strides(x, dim))
    _launch("forward", activation, _columns(x, dim), *_halves(x, dim, gate_first), y)
    return y


def gated_halves_backward(g: Tensor, x: Tensor, dim: int, activation: Activated, gate_first: bool) -> Tensor:
    """Gradient of the input, both halves in one tensor."""
    x = dense(x)
    g = dense_like(g, halved_strides(x, dim))
    dx = torch.empty_like(x)
    operands = (*_halves(x, dim, gate_first), *_halves(dx, dim, gate_first))
    _launch("backward", activation, _columns(x, dim), g, *operands)
    return dx
