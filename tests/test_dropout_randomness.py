"""Random numbers, dropout's masks above all: seeds, and their statistics."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.device import DEVICE, ON_GPU
from support.dropout import every_function, sample
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fusednn import autograd
from fusednn.autograd.batch_norm_chain import batch_norm_chain
from fusednn.kernels.base._triton import tl, triton
from fusednn.kernels.base.numerics import scalar
from fusednn.kernels.base.random import keep_threshold, random_tile
from fusednn.kernels.dropout import dropout_forward

pytestmark = pytest.mark.kernels


# --- Seeds ------------------------------------------------------------------------------------------------------------


@every_function
def test_seeding(name: str, device: str) -> None:
    x = sample(name, torch.float32, device)
    function = getattr(autograd, name)
    torch.manual_seed(3)
    first, second = function(x, training=True), function(x, training=True)
    torch.manual_seed(3)
    assert torch.equal(function(x, training=True), first)
    assert not torch.equal(first, second)


def test_evaluation_draws_nothing(device: str) -> None:
    state = torch.cuda.get_rng_state() if ON_GPU else torch.get_rng_state()
    autograd.dropout(torch.ones(5, device=device), training=False)
    assert torch.equal(torch.cuda.get_rng_state() if ON_GPU else torch.get_rng_state(), state)


@pytest.mark.parametrize("use_reentrant", [True, False])
@every_function
def test_checkpoint_draws_the_same_mask(name: str, use_reentrant: bool, device: str) -> None:
    x = sample(name, torch.float32, device).requires_grad_()
    gradients = []
    for wrapped in (True, False):
        torch.manual_seed(5)

        def function(x: Tensor) -> Tensor:
            y: Tensor = getattr(autograd, name)(x, training=True)
            return y.square()

        y = checkpoint(function, x, use_reentrant=use_reentrant) if wrapped else function(x)
        x.grad = None
        y.sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


@triton.jit
def random_bits_kernel(bits_pointer, seed_pointer, tile_index: tl.int64, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    bits = random_tile(tl.load(seed_pointer), scalar(tile_index, tl.int64), ROWS, COLUMNS)
    offsets = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(bits_pointer + offsets, bits.to(tl.int64))


def philox(seed: int, counter: int) -> list[int]:
    """Philox 4x32 with seven rounds, from the paper's definition, in Python's unbounded integers."""
    words = [counter & 0xFFFFFFFF, counter >> 32, 0, 0]
    key = [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF]
    for _ in range(7):
        high0, low0 = divmod(0xD2511F53 * words[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * words[2], 2**32)
        words = [high1 ^ words[1] ^ key[0], low1, high0 ^ words[3] ^ key[1], low0]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return words


@pytest.mark.parametrize("tile_index", [3, 2**23 - 1, 2**23, 2**40 + 7])
@pytest.mark.parametrize("rows", [2, 4])
def test_counters_have_64_bits(tile_index: int, rows: int, device: str) -> None:
    """Tiles far beyond 2^32 elements, without their memory: the counter is tile * 512 + call, of 64 bits."""
    columns = 2048 // rows
    seed = torch.tensor([-(2**60) + 12345], device=device)
    bits = torch.empty((rows, columns), dtype=torch.int64, device=device)
    random_bits_kernel[(1,)](bits, seed, tile_index, ROWS=rows, COLUMNS=columns)
    wide = 4 // rows
    for call in (0, 1, 511):
        mine = [bits[slot // wide, call * wide + slot % wide].item() for slot in range(4)]
        assert mine == philox(seed.item(), tile_index * 512 + call)


# --- Statistics -------------------------------------------------------------------------------------------------------
#
# Sums of n independent bits, n at least 2^13, are normal to within the accuracy of the thresholds: six deviations are
# passed by chance with probability 2e-9, so that the two hundred or so comparisons below raise fewer than one false
# alarm in 10^6 choices of the seeds, which are fixed besides.

DEVIATIONS = 6
COUNT = 2**16


def mask(p: float, dtype: torch.dtype, seed: int, shape: tuple[int, ...] = (COUNT,), leading: int = 0) -> Tensor:
    seeds = torch.tensor([seed], device=DEVICE)
    return (dropout_forward(torch.ones(shape, dtype=dtype, device=DEVICE), seeds, p, shared_dims=leading) != 0).double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9])
def test_keep_rate_and_independence(p: float, dtype: torch.dtype) -> None:
    # Standardised: mean 0 and deviation 1, so a mean of n products has deviation 1 / sqrt(n).
    first, second = ((mask(p, dtype, seed) - (1 - p)) / math.sqrt(p * (1 - p)) for seed in (123, 124))
    limit = DEVIATIONS / math.sqrt(COUNT)
    if p == 0.001:
        limit *= 2  # rare events are skewed: their counts are Poisson's, around 66, whose tail is heavier
        assert first.mean().abs() < limit
        return
    assert first.mean().abs() < limit
    for lag in (1, 2, 3, 4, 7, 8, 512, 1024, 2048, 4096):
        assert (first[lag:] * first[:-lag]).mean().abs() < limit, f"neighbours {lag} apart"
    assert (first * second).mean().abs() < limit, "successive calls"


def test_successive_calls_are_independent(device: str) -> None:
    torch.manual_seed(4)
    first, second = (2 * (autograd.dropout(torch.ones(COUNT, device=device)) != 0).double() - 1 for _ in range(2))
    assert (first * second).mean().abs() < DEVIATIONS / math.sqrt(COUNT)


def test_runs_of_eight(device: str) -> None:
    """The patterns of 8 neighbours, which one Philox call decides about in 16 bits, are all equally frequent."""
    for dtype in (torch.float32, torch.bfloat16):
        bits = mask(0.5, dtype, 77).view(-1, 8)
        patterns = (bits * 2.0 ** torch.arange(8, device=bits.device)).sum(1)
        counts = torch.bincount(patterns.long(), minlength=256).double()
        expected = bits.shape[0] / 256
        chi_squared = ((counts - expected).square() / expected).sum()
        # 255 degrees of freedom: mean 255, deviation sqrt(510); Laurent and Massart bound the upper tail
        # P(X > 255 + 2 sqrt(255 t) + 2 t) by exp(-t): t = 18 gives 1.5e-8.
        assert chi_squared < 255 + 2 * math.sqrt(255 * 18) + 2 * 18


def normed(x: Tensor, **options: Any) -> Tensor:
    return batch_norm_chain(x, None, None, None, torch.ones(64, device=x.device), True, 0.1, 1e-5, p=0.5, **options)


def maxout(x: Tensor) -> Tensor:
    return autograd.maxout_linear(x, torch.ones((2, 16, x.shape[1]), device=x.device), dropout=0.5)


#: What was drawn, not 0 for what is kept, of everything that draws, by images of 64 x 64 channels of 4 x 4.
DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": autograd.dropout,
    "dropout1d": lambda x: autograd.dropout1d(x.flatten(2))[..., 0],
    "dropout2d": lambda x: autograd.dropout2d(x)[..., 0, 0],
    "rrelu": lambda x: autograd.rrelu(-x, 1.0, 3.0, training=True) < -2,
    "standout": lambda x: autograd.standout(x, torch.zeros_like(x)),
    "drop_connect_linear": lambda x: autograd.drop_connect_linear(
        torch.eye(1024, device=x.device), x.view(64, 1024)
    ).t(),
    "bias_activation_dropout": autograd.bias_activation_dropout,
    "bias_activation_dropout, channels": lambda x: autograd.bias_activation_dropout(x, dim=1, of_channels=True)[
        ..., 0, 0
    ],
    "batch_norm_chain": normed,
    "batch_norm_chain, channels": lambda x: normed(x, of_channels=True)[..., 0, 0],
    "block_end": lambda x: autograd.block_end(x.view(4096, 16), p=0.5)[..., 0],
    "maxout_linear": lambda x: maxout(x.view(-1, 16)),
    "maxout_linear of an odd size": lambda x: maxout(x.view(-1)[:63000].view(-1, 9)),
}


@pytest.mark.parametrize("name", DRAWS)
def test_programs_draw_independently(name: str, device: str) -> None:
    """Whatever one program draws for: tiles, rows, channels and samples are a power of 2 apart, or of many such."""
    torch.manual_seed(6)
    draws = DRAWS[name](torch.ones((64, 64, 4, 4), device=device)).contiguous().flatten()
    z = 2 * (draws != 0).double() - 1
    assert z.numel() >= 4096
    for lag in (2**power for power in range(z.numel().bit_length() - 1)):
        assert (z[lag:] * z[:-lag]).mean().abs() < DEVIATIONS / math.sqrt(z.numel() - lag), f"{lag} apart"


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_channels_are_independent(memory_format: torch.memory_format, device: str) -> None:
    ones = torch.ones((64, 128, 1, 2), device=device).contiguous(memory_format=memory_format)
    keep = dropout_forward(ones, torch.tensor([5], device=device), 0.5, shared_dims=2)[:, :, 0, 0] != 0
    z = 2 * keep.double() - 1
    limit = DEVIATIONS / math.sqrt(z.numel() - 128)
    assert z.mean().abs() < limit
    assert (z[:, 1:] * z[:, :-1]).mean().abs() < limit
    assert (z[1:] * z[:-1]).mean().abs() < limit


@pytest.mark.parametrize("name", ["alpha_dropout", "feature_alpha_dropout"])
def test_alpha_dropout_keeps_mean_and_variance(name: str, device: str) -> None:
    """For inputs of mean 0 and variance 1; the mask and the input are both random."""
    torch.manual_seed(8)
    x = torch.randn((256, 256), device=device, dtype=torch.float64)
    y = getattr(autograd, name)(x, 0.2, training=True)
    # The fourth moment of the result is below 4, so the deviation of its square is below sqrt(3).
    limit = DEVIATIONS / math.sqrt(x.numel())
    assert y.mean().abs() < limit
    assert (y.square().mean() - 1).abs() < math.sqrt(3) * limit


def test_probabilities_are_met_to_32_bits() -> None:
    for p in (0.1, 0.5, 1 / 3, 1e-9, 1 - 1e-9):
        assert abs((keep_threshold(p) + 1) / 2**32 - (1 - p)) <= 2**-33
    assert keep_threshold(1e-12) == 2**32 - 1
    assert keep_threshold(1 - 1e-12) == 0


@pytest.mark.parametrize("p", [0.3, 2**-16, 0.25 + 2**-20])
def test_sixteen_bits_decide_with_thirty_two(p: float, device: str) -> None:
    """In 16-bit dtypes two neighbours share 32 bits: the second sees the halves exchanged."""
    seed = torch.tensor([99], device=device)
    keep = dropout_forward(torch.ones(2048, dtype=torch.bfloat16, device=device), seed, p) != 0
    bits = torch.empty((2, 512), dtype=torch.int64, device=device)
    random_bits_kernel[(1,)](bits, seed, 0, ROWS=2, COLUMNS=512)
    pairs = torch.stack((bits, (bits >> 16) | ((bits & 0xFFFF) << 16)), dim=2)
    assert torch.equal(keep, (pairs <= keep_threshold(p)).flatten())


@pytest.mark.gpu
def test_elements_2_to_the_32_apart_are_independent(device: str) -> None:
    count = 2**20
    numel = 2**32 + count
    if torch.cuda.mem_get_info()[0] < 5 * numel:
        pytest.skip("needs 20 GiB of GPU memory")
    y = torch.ones(numel, dtype=torch.float16, device=device)
    autograd.dropout(y, 0.5, inplace=True)
    first, last = (2 * (part != 0).double() - 1 for part in (y[:count], y[-count:]))
    limit = DEVIATIONS / math.sqrt(count)
    assert last.mean().abs() < limit
    assert (first * last).mean().abs() < limit
