"""PReLU's kernels: every way a channel can lie in memory, and the reduction of the slopes' gradient."""

import pytest
import torch
import torch.nn.functional as F
from support.device import FLOAT_DTYPES

from fusednn import autograd
from fusednn.testing import LAYOUTS, check_against_stock, random_tensor

pytestmark = pytest.mark.kernels

SHAPES = [
    (2, 3),  # channels are columns
    (5000, 7),
    (40, 300),
    (3, 16, 5),  # rows narrower than a tile
    (2, 3, 7, 7),
    (2, 4, 70),
    (1, 2, 4500),  # rows wider than a tile
    (3, 1, 5, 5),  # one channel
    (2, 5, 3, 4, 2),
    (1, 6, 1, 1),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_slopes_per_channel(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    x, gradient = (random_tensor(shape, dtype, device, seed) for seed in (0, 1))
    weight = torch.linspace(-0.5, 0.9, shape[1], dtype=dtype, device=device)
    check_against_stock(autograd.prelu, F.prelu, [x, weight], gradient)


@pytest.mark.parametrize("shape", [(), (1,), (5000,), (3, 5, 700)], ids=str)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_one_slope(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    x, gradient = (random_tensor(shape, dtype, device, seed) for seed in (0, 1))
    check_against_stock(autograd.prelu, F.prelu, [x, torch.tensor([0.25], dtype=dtype, device=device)], gradient)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("slopes", [1, 6])
def test_layouts(layout: str, slopes: int, device: str) -> None:
    x = LAYOUTS[layout](random_tensor((3, 6, 5, 4), torch.float32, device))
    gradient = LAYOUTS[layout](random_tensor((3, 6, 5, 4), torch.float32, device, seed=1))
    weight = torch.linspace(-0.5, 0.9, slopes, device=device)
    check_against_stock(autograd.prelu, F.prelu, [x, weight], gradient)


def test_channels_in_the_middle_of_permuted_memory(device: str) -> None:
    x = random_tensor((2, 3, 4, 5), torch.float32, device).permute(3, 1, 0, 2)
    check_against_stock(autograd.prelu, F.prelu, [x, torch.tensor([0.1, -0.2, 0.3], device=device)], torch.ones_like(x))


def test_strided_and_zero_dimensional_slopes(device: str) -> None:
    x = random_tensor((2, 3, 4), torch.float32, device)
    for weight in (torch.rand(6, device=device)[::2], torch.tensor([0.2], device=device).expand(3)):
        check_against_stock(autograd.prelu, F.prelu, [x, weight], torch.ones_like(x))
    check_against_stock(autograd.prelu, F.prelu, [x, torch.tensor(0.3, device=device)], torch.ones_like(x))


@pytest.mark.parametrize("needed", [(True, False), (False, True)])
def test_gradients_only_where_required(needed: tuple[bool, bool], device: str) -> None:
    results = []
    for function in (autograd.prelu, F.prelu):
        x = random_tensor((4, 3, 5), torch.float32, device).requires_grad_(needed[0])
        weight = torch.full((3,), 0.25, device=device, requires_grad=needed[1])
        function(x, weight).sum().backward()
        assert (x.grad is not None, weight.grad is not None) == needed
        results.append(x.grad if needed[0] else weight.grad)
    torch.testing.assert_close(*results)


def test_slope_gradient_is_accumulated_in_float32(device: str) -> None:
    # 2^18 addends of 2^-8: in float16 a running sum would stop at 2^3.
    x = torch.full((2**18,), -(2.0**-8), dtype=torch.float16, device=device)
    weight = torch.tensor([0.25], dtype=torch.float16, device=device, requires_grad=True)
    autograd.prelu(x, weight).sum().backward()
    assert weight.grad.item() == -1024


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_stocks(dtype: torch.dtype, device: str) -> None:
    results = []
    for function in (autograd.prelu, F.prelu):
        x = random_tensor((4, 3, 5), torch.float32, device).requires_grad_()
        weight = torch.full((3,), 0.25, device=device, requires_grad=True)
        with torch.autocast(device, dtype=dtype):
            y = function(x, weight)
        assert y.dtype == dtype
        y.float().sum().backward()
        results.append((y, x.grad, weight.grad))
    for ours, stock in zip(*results, strict=True):
        torch.testing.assert_close(ours, stock)
