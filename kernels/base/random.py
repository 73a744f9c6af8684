"""Randomness that costs no memory: Philox numbers from a seed and an element's position.

A kernel draws the same numbers whenever it is given the same seed, so a backward pass regenerates what the forward
pass drew.  The seed itself follows from PyTorch's generator of the tensor's device and lies on that device: nothing
syncs, and ``torch.manual_seed``, checkpointing and CUDA-graph replay behave.

A GPU's generator is two numbers on the host, a seed and an offset, which its kernels advance by what they draw; so do
ours, on the host, without a launch.  What they are given is the number at the offset in a block of seeds, which is made
of the generator's seed and the block's place alone: one launch for many draws, and the same seed at the same offset
wherever the generator was in between.  While a graph is captured the offset is the replay's, and the device draws.

Source: Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011).
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ._triton import tl, triton
from .numerics import scalar

__all__ = [
    "channel_bits",
    "channels_kept",
    "counting_generator",
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
    generator = counting_generator(device)
    if generator is not None:
        offset = generator.get_offset()
        try:
            seed = _seed_at(device, generator.initial_seed(), offset)
            generator.set_offset(offset + _STEP)
            return compute(seed)
        except BaseException:
            generator.set_offset(offset)
            raise
    before = torch.get_rng_state() if device.type == "cpu" else None
    seed = draw_seed(device)
    try:
        return compute(seed)
    except BaseException:
        if before is not None:
            torch.set_rng_state(before)
        raise


def counting_generator(device: torch.device) -> Any:
    """The device's generator, where it is a seed and an offset on the host."""
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return None
    return torch.cuda.default_generators[device.index]


#: How far a draw advances a generator; PyTorch's offsets are multiples of it.
_STEP = 4
#: The seeds of a block, and the most blocks that are kept: a checkpoint goes back, and another stream has its own.
_BLOCK, _MOST_BLOCKS = 256, 16
_blocks: dict[tuple[torch.device, int, int, int], Sequence[Tensor]] = {}


def _seed_at(device: torch.device, seed: int, offset: int) -> Tensor:
    """The seed that a generator with this seed has at an offset, shape (1,), int64, drawn on the current stream."""
    block, place = divmod(offset, _STEP * _BLOCK)
    stream = torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0
    key = (device, stream, seed, block)
    found = _blocks.get(key)
    if found is None:
        if len(_blocks) >= _MOST_BLOCKS:
            _blocks.clear()
        with torch.inference_mode(False), torch.no_grad():  # others will save them for their backward pass
            found = _blocks[key] = _drawn(device, seed, block * _STEP * _BLOCK)
    return found[place // _STEP]


def _drawn(device: torch.device, seed: int, offset: int) -> Sequence[Tensor]:
    """The seeds of the block that begins at an offset, each aligned to 16 bytes as kernels like it."""
    generator = torch.Generator(device)
    generator.manual_seed(seed)
    generator.set_offset(offset)
    drawn = torch.randint(-(2**63), 2**63 - 1, (_BLOCK, 2), dtype=torch.int64, device=device, generator=generator)
    return drawn[:, :1].unbind()


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


@triton.jit
def channels_kept(
    seed_pointer,
    last,
    first_row,
    first_column,
    columns,
    spatial,
    BY_ROW: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Which elements of a tile are kept, (HEIGHT, WIDTH), where channel c of sample n has one number, that of n C + c.

    Rows are samples' channels (``BY_ROW``), or ``spatial`` of them are a sample, where channels are columns: then one
    sample after another, of which a tile sees few, since numbers for all elements take more registers than there are.
    """
    seed = tl.load(seed_pointer)
    largest = scalar(last, tl.uint32)
    row = tl.arange(0, HEIGHT)
    column = first_column + tl.arange(0, WIDTH)
    if BY_ROW:
        kept = (channel_bits(seed, first_row + row) <= largest)[:, None] & (column >= 0)[None, :]
    else:
        first_sample = first_row // spatial
        begun = (first_row - first_sample * spatial).to(tl.int32)
        sample_of_row = (begun + row) // spatial
        kept = tl.zeros((HEIGHT, WIDTH), tl.int1)
        for sample in range((begun + HEIGHT - 1) // spatial + 1):
            those = channel_bits(seed, (first_sample + sample) * columns + column) <= largest
            kept = kept | ((sample_of_row == sample)[:, None] & those[None, :])
    return kept
