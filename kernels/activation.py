"""Activations by themselves: the two pointwise kernels that apply a row of `fusednn.kernels.functions.activation`."""

from collections.abc import Iterator, Sequence
from functools import cache

import torch
from torch import Tensor

from .base._triton import tl
from .base.launch import DTYPES, Configuration, kernel, launch, ships
from .base.layout import dense, dense_like
from .base.numerics import scalar
from .base.tiles import (
    configure_flat,
    flat_tile,
    known,
    load,
    load_bits,
    mask_bytes,
    programs_for,
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

# --- Kernels --------------------------------------------------------------------------------------------------------


@kernel
def activation_forward_kernel(
    x_pointer,  # input, flat
    y_pointer,  # output, flat; may be the input
    mask_pointer,  # packed bits of the activation's mask, or None where none are saved
    numel: tl.int64,
    a: tl.float64,
    b: tl.float64,
    ACTIVATION: tl.constexpr,
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
            y = value_of(x, a, b, ACTIVATION)
            store(y_pointer, part, y)
            if mask_pointer is not None:
                store_bits(mask_pointer, ACTIVATION.mask(x, a, b), tile_index, ROWS, COLUMNS)


@kernel
def activation_backward_kernel(
    g_pointer,  # gradient of the output, flat
    saved_pointer,  # packed bits, or the output or input, flat
    dx_pointer,  # gradient of the input, flat
    numel: tl.int64,
    a: tl.float64,
    b: tl.float64,
    ACTIVATION: tl.constexpr,
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
            g = load(g_pointer, part, COMPUTE)
            if ACTIVATION.saves == "mask":
                saved = load_bits(saved_pointer, tile_index, ROWS, COLUMNS)
            else:
                saved = load(saved_pointer, part, COMPUTE)
            dx = gradient_of(g, saved, a, b, ACTIVATION)
            store(dx_pointer, part, dx)


# --- Configurations and launchers -----------------------------------------------------------------------------------


@cache
def _forward(row: Activation, dtype: torch.dtype, masked: bool) -> Configuration:
    return configure_flat(
        activation_forward_kernel,
        f"{row.name} forward{' + mask' if masked else ''}",
        dtype,
        {**({} if masked else {"mask_pointer": None}), "ACTIVATION": row.for_results_of(dtype)},
        pointers={"mask": torch.uint8},
        loads=1,
        stores=1,
        keeps_subnormals=dtype is torch.float32,
    )


@cache
def _backward(row: Activation, dtype: torch.dtype) -> Configuration:
    masked = row.saves == "mask"
    return configure_flat(
        activation_backward_kernel,
        f"{row.name} backward",
        dtype,
        {"ACTIVATION": row.for_results_of(dtype)},
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


def _launch(configuration: Configuration, activation: Activated, *tensors: Tensor) -> None:
    """On flat tensors, the first of which has the elements that are walked over."""
    numel = tensors[0].numel()
    launch(configuration, programs_for(numel), *tensors, numel, activation.a, activation.b)


def activation_forward(x: Tensor, activation: Activated, *, inplace: bool = False) -> Tensor:
    """value(x), in the memory order of ``x``; with ``inplace`` written over the dense ``x``."""
    x = dense(x)
    y = x if inplace else torch.empty_like(x)
    _launch(_forward(activation.row, x.dtype, False), activation, x, y)
    return y


def activation_masked_forward(x: Tensor, activation: Activated, *, inplace: bool = False) -> tuple[Tensor, Tensor]:
    """The value, and the packed mask that the backward pass needs (in the memory order of the value)."""
    x = dense(x)
    y = x if inplace else torch.empty_like(x)
    mask = torch.empty(mask_bytes(x.numel()), dtype=torch.uint8, device=x.device)
    _launch(_forward(activation.row, x.dtype, True), activation, x, y, mask)
    return y, mask


def activation_backward(g: Tensor, saved: Tensor, activation: Activated) -> Tensor:
    """Gradient of the input from that of the output, and the saved output or input."""
    saved = dense(saved)
    g = dense_like(g, saved.stride())
    dx = torch.empty_like(saved)
    _launch(_backward(activation.row, g.dtype), activation, g, saved, dx)
    return dx


def activation_masked_backward(g: Tensor, mask: Tensor, strides: Sequence[int], activation: Activated) -> Tensor:
    """Gradient of the input from that of the output (whose strides were ``strides``) and the packed mask."""
    g = dense_like(g, strides)
    dx = g.new_empty_strided(g.shape, strides)
    _launch(_backward(activation.row, g.dtype), activation, g, mask, dx)
    return dx
