"""Activations by themselves: the pointwise kernel that applies a row of `fusednn.kernels.functions.activation`."""

from collections.abc import Iterator, Sequence
from functools import cache

import torch
from torch import Tensor

from .base._triton import tl
from .base.launch import DTYPES, Configuration, kernel, ships
from .base.layout import dense, dense_like
from .base.numerics import scalar
from .base.tiles import (
    configure_flat,
    flat_tile,
    known,
    launch_flat,
    load,
    load_bits,
    mask_bytes,
    store,
    store_bits,
)
from .functions.activation import ACTIVATIONS, OVERWRITING, Activated, Activation, gradient_of, value_of

__all__ = [
    "activation_backward",
    "activation_forward",
    "activation_masked_backward",
    "activation_masked_forward",
]

# --- Kernel ---------------------------------------------------------------------------------------------------------


@kernel
def activation_kernel(
    x_pointer,  # input, or gradient of the output, flat
    saved_pointer,  # packed bits, written forward and read backward, or the output or input, flat; or None
    y_pointer,  # output, or gradient of the input, flat; may be the input
    numel: tl.int64,
    a: tl.float64,
    b: tl.float64,
    ACTIVATION: tl.constexpr,
    BACKWARD: tl.constexpr,
    COMPUTE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    tile_index, tile = flat_tile(numel, ROWS, COLUMNS)
    a = scalar(a, COMPUTE)
    b = scalar(b, COMPUTE)

    for whole in tl.static_range(2):
        if tile.whole == whole:
            part = known(tile, whole)
            x = load(x_pointer, part, COMPUTE)
            if BACKWARD:
                if ACTIVATION.saves == "mask":
                    saved = load_bits(saved_pointer, tile_index, ROWS, COLUMNS)
                else:
                    saved = load(saved_pointer, part, COMPUTE)
                y = gradient_of(x, saved, a, b, ACTIVATION)
            else:
                y = value_of(x, a, b, ACTIVATION)
            store(y_pointer, part, y)
            if not BACKWARD and saved_pointer is not None:
                store_bits(saved_pointer, ACTIVATION.mask(x, a, b), tile_index, ROWS, COLUMNS)


# --- Configurations and launchers -----------------------------------------------------------------------------------


@cache
def _forward(row: Activation, dtype: torch.dtype, masked: bool) -> Configuration:
    return configure_flat(
        activation_kernel,
        f"{row.name} forward{' + mask' if masked else ''}",
        dtype,
        {**({} if masked else {"saved_pointer": None}), "ACTIVATION": row.for_results_of(dtype), "BACKWARD": False},
        pointers={"saved": torch.uint8},
        loads=1,
        stores=1,
        keeps_subnormals=dtype is torch.float32,
    )


@cache
def _backward(row: Activation, dtype: torch.dtype) -> Configuration:
    masked = row.saves == "mask"
    return configure_flat(
        activation_kernel,
        f"{row.name} backward",
        dtype,
        {"ACTIVATION": row.for_results_of(dtype), "BACKWARD": True},
        pointers={"saved": torch.uint8} if masked else None,
        loads=1 if masked else 2,
        stores=1,
        keeps_subnormals=dtype is torch.float32,
    )


@ships("activation")
def configurations() -> Iterator[Configuration]:
    for row in (*ACTIVATIONS.values(), *OVERWRITING.values()):
        for dtype in DTYPES:
            if row.name in OVERWRITING and dtype.itemsize == 2:
                continue  # see `Activated.overwriting`
            yield _forward(row, dtype, False)
            if row.saves == "mask":
                yield _forward(row, dtype, True)
            yield _backward(row, dtype)


def activation_forward(x: Tensor, activation: Activated, *, inplace: bool = False) -> Tensor:
    """value(x), in the memory order of ``x``; with ``inplace`` written over the dense ``x``."""
    x = dense(x)
    y = x if inplace else torch.empty_like(x)
    launch_flat(_forward(activation.row, x.dtype, False), (x, y), activation.a, activation.b)
    return y


def activation_masked_forward(x: Tensor, activation: Activated, *, inplace: bool = False) -> tuple[Tensor, Tensor]:
    """The value, and the packed mask that the backward pass needs (in the memory order of the value)."""
    x = dense(x)
    y = x if inplace else torch.empty_like(x)
    mask = torch.empty(mask_bytes(x.numel()), dtype=torch.uint8, device=x.device)
    launch_flat(_forward(activation.row, x.dtype, True), (x, mask, y), activation.a, activation.b)
    return y, mask


def activation_backward(g: Tensor, saved: Tensor, activation: Activated) -> Tensor:
    """Gradient of the input from that of the output, and the saved output or input."""
    saved = dense(saved)
    g = dense_like(g, saved.stride())
    dx = torch.empty_like(saved)
    launch_flat(_backward(activation.row, g.dtype), (g, saved, dx), activation.a, activation.b)
    return dx


def activation_masked_backward(g: Tensor, mask: Tensor, strides: Sequence[int], activation: Activated) -> Tensor:
    """Gradient of the input from that of the output (whose strides were ``strides``) and the packed mask."""
    g = dense_like(g, strides)
    dx = g.new_empty_strided(g.shape, strides)
    launch_flat(_backward(activation.row, g.dtype), (g, mask, dx), activation.a, activation.b)
    return dx
