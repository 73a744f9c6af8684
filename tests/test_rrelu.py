"""RReLU in training: its slopes are uniform, obey PyTorch's generator, and come back in the backward pass."""

import math

import pytest
import torch
from support.device import FLOAT_DTYPES
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fusednn import autograd, layers
from fusednn.testing import LAYOUTS

pytestmark = pytest.mark.kernels

LOWER, UPPER = 0.125, 0.5


def slopes(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """The slopes that forward and backward used, read off an input of -1."""
    x = torch.full(shape, -1.0, dtype=dtype, device=device, requires_grad=True)
    y = autograd.rrelu(x, LOWER, UPPER, training=True)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    return -y.detach(), gradient


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_backward_regenerates_the_slopes(dtype: torch.dtype, device: str) -> None:
    forward, backward = slopes((3, 1000), dtype, device)
    assert torch.equal(forward, backward)
    assert (forward >= LOWER).all()
    assert (forward <= UPPER).all()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "strided"])
@pytest.mark.parametrize("gradient_layout", LAYOUTS)
def test_layouts(layout: str, gradient_layout: str, device: str) -> None:
    x = LAYOUTS[layout](torch.randn(2, 3, 4, 5, device=device)).detach().requires_grad_()
    g = LAYOUTS[gradient_layout](torch.randn(2, 3, 4, 5, device=device))
    y = autograd.rrelu(x, LOWER, UPPER, training=True)
    (gradient,) = torch.autograd.grad(y, x, g)
    assert torch.equal(y[x > 0], x[x > 0])
    torch.testing.assert_close(gradient, g * (y / x).detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_slopes_are_uniform_and_independent(dtype: torch.dtype, device: str) -> None:
    """Thresholds of six deviations: a false alarm in fewer than one of 10^8 such checks."""
    torch.manual_seed(7)
    count = 2**16
    first, second = (
        (slopes((count,), dtype, device)[0].double() - LOWER) / (UPPER - LOWER) * math.sqrt(12) - math.sqrt(3)
        for _ in range(2)
    )  # standardised: mean 0, deviation 1
    limit = 6 / math.sqrt(count)
    assert first.mean().abs() < limit
    assert (first.square().mean() - 1).abs() < limit  # the square's deviation is 0.9
    histogram = torch.histc(first, bins=16, min=-math.sqrt(3), max=math.sqrt(3))
    chi_squared = ((histogram - count / 16).square() / (count / 16)).sum()
    assert chi_squared < 15 + 8 * math.sqrt(30), "16 bins"  # the tail of 15 degrees of freedom, generously
    for lag in (1, 2, 4, 512, 1024, 2048):
        assert (first[lag:] * first[:-lag]).mean().abs() < limit, f"neighbours {lag} apart"
    assert (first * second).mean().abs() < limit, "successive calls"


def test_seeding(device: str) -> None:
    x = torch.randn(5000, device=device)
    layer = layers.RReLU()
    torch.manual_seed(3)
    first, second = layer(x), layer(x)
    torch.manual_seed(3)
    assert torch.equal(layer(x), first)
    assert not torch.equal(first, second)
    layer.eval()
    torch.testing.assert_close(layer(x), torch.nn.RReLU().eval()(x))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint_draws_the_same_slopes(use_reentrant: bool, device: str) -> None:
    x = torch.randn(3000, device=device, requires_grad=True)

    def gradient(wrap: bool) -> Tensor:
        torch.manual_seed(5)
        y = checkpoint(layers.RReLU(), x, use_reentrant=use_reentrant) if wrap else layers.RReLU()(x)
        return torch.autograd.grad(y.square().sum(), x)[0] if not use_reentrant else _accumulated(y, x)

    assert torch.equal(gradient(True), gradient(False))


def _accumulated(y: Tensor, x: Tensor) -> Tensor:
    """Reentrant checkpointing doesn't work with ``autograd.grad``."""
    x.grad = None
    y.square().sum().backward()
    return x.grad


@pytest.mark.parametrize("view", [False, True])
def test_inplace(view: bool, device: str) -> None:
    x = torch.randn(64, 50, device=device, requires_grad=True)
    base = x * 1
    target = base[:, 5:] if view else base
    y = autograd.rrelu(target, LOWER, UPPER, training=True, inplace=True)
    assert y is target
    slope = (y / (x[:, 5:] if view else x)).detach()
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient[:, 5:] if view else gradient, slope)
