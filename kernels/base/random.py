"""Randomness that costs no memory: Philox numbers from a seed and an element's position.

A kernel draws the same numbers whenever it is given the same seed, so a backward pass regenerates what the forward
pass drew.  The seed itself comes from PyTorch's generator of the tensor's device and stays on that device: nothing
syncs, and ``torch.manual_seed``, checkpointing and CUDA-graph replay behave.

Source: Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011).
"""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from ._triton import tl, triton

__all__ = [
    "channel_bits",
    "draw_seed",
    "keep_threshold",
    "keep_tile",
    "random_tile",
    "serves_eight",
    "uniform_tile",
    "with_seed",
]

_Result = TypeVar("_Result")

# Seven rounds pass BigCrush (table 2 of the paper); PyTorch's ten would double the instructions for nothing.
PHILOX_ROUNDS = tl.constexpr(7)


def draw_seed(device: torch.device) -> Tensor:
    """A 64-bit seed, shape (1,), int64, drawn on ``device`` from PyTorch's generator."""
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)


def with_seed(device: torch.device, compute: Callable[[Tensor], _Result]) -> _Result:
    """``compute`` of a new seed.  Where it raises, for want of memory say, the generator is as if none were drawn."""
    if torch.compiler.is_compiling():
        return compute(draw_seed(device))
    before = torch.get_rng_state() if device.type == "cpu" else None
    seed = draw_seed(device)
    try:
        return compute(seed)
    except BaseException:
        if before is not None:
            torch.set_rng_state(before)
        elif not torch.cuda.is_current_stream_capturing():
            _take_back(torch.cuda.default_generators[seed.device.index], seed.device)
        raise


def _take_back(generator: torch.Generator, device: torch.device) -> None:
    """Undo the last draw of a seed: another one tells how far each moves the generator."""
    after = generator.get_offset()
    draw_seed(device)
    generator.set_offset(2 * after - generator.get_offset())


def keep_threshold(p: float) -> int:
    """The largest 32-bit random number whose element dropout with probability ``p`` keeps.

    1 - p is met to half of 2^-32; as long as p < 1, one number in 2^32 at least is kept.
    """
    return max(round((1 - p) * 2**32) - 1, 0)


def serves_eight(dtype: torch.dtype) -> bool:
    """Whether one Philox call decides about eight elements of ``dtype`` in `keep_tile`, rather than about four."""
    return dtype.itemsize == 2


@triton.jit
def random_tile(seed, tile_index, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """32 random bits for each element of flat tile ``tile_index``, (ROWS, COLUMNS): one Philox call serves 4."""
    # The tile as (rows, calls, neighbouring columns): the four numbers of a call go to elements that one thread holds.
    wide: tl.constexpr = 4 // ROWS
    calls: tl.constexpr = COLUMNS // wide
    counter = tile_index * calls + tl.arange(0, calls)[None, :, None]
    low = counter.to(tl.uint32)
    high = (counter >> 32).to(tl.uint32)
    zero = low * 0
    r0, r1, r2, r3 = tl.philox(seed, low, high, zero, zero, PHILOX_ROUNDS)
    slot = tl.arange(0, ROWS)[:, None, None] * wide + tl.arange(0, wide)[None, None, :]
    bits = tl.where(slot < 2, tl.where(slot == 0, r0, r1), tl.where(slot == 2, r2, r3))
    return tl.reshape(bits, (ROWS, COLUMNS))


@triton.jit
def uniform_tile(seed, tile_index, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Uniform float32 numbers in [0, 1) for each element of flat tile ``tile_index``, (ROWS, COLUMNS)."""
    # 24 bits fill a float32's significand exactly, so the product is exact and below 1.
    bits = random_tile(seed, tile_index, ROWS, COLUMNS)
    return (bits >> 8).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def keep_tile(seed, tile_index, last, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SERVES_EIGHT: tl.constexpr):
    """Which elements of flat tile ``tile_index`` are kept, (ROWS, COLUMNS): those whose 32 random bits are <= ``last``.

    With ``SERVES_EIGHT`` two neighbours share 32 bits, of which the second sees its halves exchanged.  So each is kept
    with exactly the right probability, decided by a half of its own, unless that half alone can't tell (one time in
    2^16).  Only then do they see each other.  With ``last`` seen as halves t and u, each a part of 2^16, the covariance
    is 2^-15 (min(t, u) - t u), up to terms of 2^-32: at most 2^-17, where both are 1/2.  So their correlation is below
    2^-17 / (p (1 - p)).
    """
    if SERVES_EIGHT:
        bits = random_tile(seed, tile_index, ROWS, COLUMNS // 2)
        exchanged = (bits >> 16) | (bits << 16)
        return tl.reshape(tl.join(bits <= last, exchanged <= last), (ROWS, COLUMNS))
    return random_tile(seed, tile_index, ROWS, COLUMNS) <= last


@triton.jit
def channel_bits(seed, index):
    """32 random bits for each of these channels, by their 64-bit index: all elements of a channel share them."""
    low = index.to(tl.uint32)
    high = (index >> 32).to(tl.uint32)
    zero = low * 0
    bits, _, _, _ = tl.philox(seed, low, high, zero, zero, PHILOX_ROUNDS)
    return bits
