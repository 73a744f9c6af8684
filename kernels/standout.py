"""Standout: dropout whose keep probability is a sigmoid of each unit's belief, sampled in the same pass.

Saves one bit an element.  The backward pass is that of any other gate of bits: ReLU's, in `activation`.
"""

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from .base._triton import tl
from .base.launch import DTYPES, Configuration, kernel, ships
from .base.layout import dense, dense_like
from .base.numerics import scalar, sigmoid, widen
from .base.random import uniform_tile
from .base.tiles import configure_flat, flat_tile, launch_flat, load, mask_bytes, store, store_bits

__all__ = ["standout_forward"]


@kernel
def standout_kernel(
    x_pointer,  # input, flat
    belief_pointer,  # the belief network's pre-activations, flat
    y_pointer,  # output, flat
    mask_pointer,  # packed bits: kept
    seed_pointer,  # one int64
    numel: tl.int64,
    alpha: tl.float64,
    beta: tl.float64,
    COMPUTE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    tile_index, tile = flat_tile(numel, ROWS, COLUMNS)

    x = load(x_pointer, tile, x_pointer.dtype.element_ty)  # widened late: the random numbers take registers
    belief = load(belief_pointer, tile, COMPUTE)
    probability = sigmoid(scalar(alpha, COMPUTE) * belief + scalar(beta, COMPUTE))
    keep = uniform_tile(tl.load(seed_pointer), tile_index, ROWS, COLUMNS).to(COMPUTE) < probability
    store(y_pointer, tile, widen(x, COMPUTE) * keep.to(COMPUTE))
    store_bits(mask_pointer, keep, tile_index, ROWS, COLUMNS)


@cache
def _configuration(dtype: torch.dtype) -> Configuration:
    pointers = {"mask": torch.uint8, "seed": torch.int64}
    return configure_flat(standout_kernel, "standout", dtype, {}, pointers=pointers, loads=2, stores=1)


@ships("standout")
def configurations() -> Iterator[Configuration]:
    for dtype in DTYPES:
        yield _configuration(dtype)


def standout_forward(x: Tensor, belief: Tensor, seed: Tensor, alpha: float, beta: float) -> tuple[Tensor, Tensor]:
    """``x`` where a unit is kept, with probability sigmoid(alpha belief + beta), else 0; and the packed mask."""
    x = dense(x)
    belief = dense_like(belief, x.stride())
    y = torch.empty_like(x)
    mask = torch.empty(mask_bytes(x.numel()), dtype=torch.uint8, device=x.device)
    launch_flat(_configuration(x.dtype), (x, belief, y, mask, seed), float(alpha), float(beta))
    return y, mask
