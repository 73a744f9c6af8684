"""Highway networks' gate in one pass each way: t * h + (1 - t) * x, where t is an activation of the gate.

Tensors are walked flat.  Kept are the gate, h and x; t is computed again.
"""

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from .base._triton import tl
from .base.launch import DTYPES, Configuration, kernel, ships
from .base.layout import dense, dense_like
from .base.tiles import configure_flat, flat_tile, launch_flat, load, store
from .functions.activation import ACTIVATIONS, Activated, Activation, gradient_from_input, value_of

__all__ = ["HIGHWAY_GATES", "highway_backward", "highway_forward"]

#: The activations of such gates, whose values are between 0 and 1.
HIGHWAY_GATES = ("hardsigmoid", "sigmoid")


@kernel
def highway_kernel(
    g_pointer,  # gradient of the output, flat, as all; or None in the forward pass, as the last three
    gate_pointer,
    h_pointer,  # what the layer computed
    x_pointer,  # what it was given
    y_pointer,  # output; or None in the backward pass
    dgate_pointer,
    dh_pointer,
    dx_pointer,
    numel: tl.int64,
    ACTIVATION: tl.constexpr,  # without parameters
    COMPUTE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    _tile_index, tile = flat_tile(numel, ROWS, COLUMNS)

    if g_pointer is not None:
        g = load(g_pointer, tile, COMPUTE)
    gate = load(gate_pointer, tile, COMPUTE)
    h = load(h_pointer, tile, COMPUTE)
    x = load(x_pointer, tile, COMPUTE)
    t = value_of(gate, 0.0, 0.0, ACTIVATION)
    if g_pointer is None:
        store(y_pointer, tile, t * h + (1 - t) * x)
    else:
        store(dgate_pointer, tile, gradient_from_input(g * (h - x), gate, 0.0, 0.0, ACTIVATION))
        store(dh_pointer, tile, g * t)
        store(dx_pointer, tile, g * (1 - t))


# --- Configurations and launchers -------------------------------------------------------------------------------------


_GRADIENTS = ("g_pointer", "dgate_pointer", "dh_pointer", "dx_pointer")


@cache
def _configuration(direction: str, row: Activation, dtype: torch.dtype) -> Configuration:
    forward = direction == "forward"
    return configure_flat(
        highway_kernel,
        f"highway {row.name} {direction}",
        dtype,
        {"ACTIVATION": row.for_results_of(dtype), **dict.fromkeys(_GRADIENTS if forward else ("y_pointer",))},
        loads=3 if forward else 4,
        stores=1 if forward else 3,
        rare=row.name != "sigmoid" or dtype not in (torch.bfloat16, torch.float32),
    )


@ships("gated")
def configurations() -> Iterator[Configuration]:
    for name in HIGHWAY_GATES:
        for dtype in DTYPES:
            for direction in ("forward", "backward"):
                yield _configuration(direction, ACTIVATIONS[name], dtype)


def highway_forward(gate: Tensor, h: Tensor, x: Tensor, activation: Activated) -> Tensor:
    """t * h + (1 - t) * x, where t = activation(gate), in the memory order of ``gate``."""
    gate = dense(gate)
    h, x = (dense_like(one, gate.stride()) for one in (h, x))
    y = torch.empty_like(gate)
    launch_flat(_configuration("forward", activation.row, gate.dtype), (gate, h, x, y))
    return y


def highway_backward(
    g: Tensor, gate: Tensor, h: Tensor, x: Tensor, activation: Activated
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the gate, h and x, in the memory order of ``gate``."""
    gate = dense(gate)
    g, h, x = (dense_like(one, gate.stride()) for one in (g, h, x))
    gradients = torch.empty_like(gate), torch.empty_like(gate), torch.empty_like(gate)
    launch_flat(_configuration("backward", activation.row, gate.dtype), (g, gate, h, x, *gradients))
    return gradients
