"""RReLU in training: leaky ReLU with a random slope for each element, regenerated in the backward pass.

Saves one bit an element (whether its slope is 1) and the seed, where PyTorch saves the input and a tensor of slopes.
"""

from collections.abc import Iterator, Sequence
from functools import cache

import torch
from torch import Tensor

from .base._triton import tl, triton
from .base.launch import DTYPES, Configuration, kernel, ships
from .base.layout import dense, dense_like
from .base.numerics import scalar
from .base.random import uniform_tile
from .base.tiles import configure_flat, flat_tile, launch_flat, load, load_bits, mask_bytes, store, store_bits

__all__ = ["rrelu_backward", "rrelu_forward"]


@triton.jit
def slope_tile(
    seed_pointer, lower, upper, tile_index, COMPUTE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """The random slopes of a tile, uniform in [lower, upper)."""
    lower = scalar(lower, COMPUTE)
    upper = scalar(upper, COMPUTE)
    return lower + uniform_tile(tl.load(seed_pointer), tile_index, ROWS, COLUMNS).to(COMPUTE) * (upper - lower)


@kernel
def rrelu_kernel(
    x_pointer,  # input, or gradient of the output, flat
    y_pointer,  # output, or gradient of the input, flat; may be the input
    mask_pointer,  # packed bits: not x <= 0
    seed_pointer,  # one int64
    numel: tl.int64,
    lower: tl.float64,
    upper: tl.float64,
    BACKWARD: tl.constexpr,
    COMPUTE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Backward as forward: each element times its slope where its bit is 0."""
    tile_index, tile = flat_tile(numel, ROWS, COLUMNS)

    x = load(x_pointer, tile, COMPUTE)
    slope = slope_tile(seed_pointer, lower, upper, tile_index, COMPUTE, ROWS, COLUMNS)
    if BACKWARD:
        keeps = load_bits(mask_pointer, tile_index, ROWS, COLUMNS)
    else:
        keeps = (x > 0) | (x != x)  # PyTorch draws a slope where x <= 0, unlike leaky ReLU not for NaN
    store(y_pointer, tile, tl.where(keeps, x, x * slope))
    if not BACKWARD:
        store_bits(mask_pointer, keeps, tile_index, ROWS, COLUMNS)


@cache
def _configuration(direction: str, dtype: torch.dtype) -> Configuration:
    constants = {"BACKWARD": direction == "backward"}
    pointers = {"mask": torch.uint8, "seed": torch.int64}
    return configure_flat(rrelu_kernel, f"rrelu {direction}", dtype, constants, pointers=pointers, loads=1, stores=1)


@ships("rrelu")
def configurations() -> Iterator[Configuration]:
    for dtype in DTYPES:
        yield _configuration("forward", dtype)
        yield _configuration("backward", dtype)


def rrelu_forward(
    x: Tensor, seed: Tensor, lower: float, upper: float, *, inplace: bool = False
) -> tuple[Tensor, Tensor]:
    """The value with slopes uniform in [lower, upper), and the packed mask of positive elements."""
    x = dense(x)
    y = x if inplace else torch.empty_like(x)
    mask = torch.empty(mask_bytes(x.numel()), dtype=torch.uint8, device=x.device)
    launch_flat(_configuration("forward", x.dtype), (x, y, mask, seed), lower, upper)
    return y, mask


def rrelu_backward(g: Tensor, mask: Tensor, seed: Tensor, strides: Sequence[int], lower: float, upper: float) -> Tensor:
    """Gradient of the input, with the slopes that the forward pass drew from ``seed``."""
    g = dense_like(g, strides)
    dx = g.new_empty_strided(g.shape, strides)
    launch_flat(_configuration("backward", g.dtype), (g, dx, mask, seed), lower, upper)
    return dx
