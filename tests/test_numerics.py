"""Elementary functions in the interpreter: the same on every processor."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.device import KERNELS_RUN

from fusednn import autograd
from fusednn.kernels import INTERPRETING
from fusednn.kernels.base import numerics
from fusednn.kernels.base._triton import tl, triton
from fusednn.kernels.functions.activation import ACTIVATIONS, Activation, gradient_from_input, value_of


@triton.jit
def function_kernel(x_pointer, y_pointer, FUNCTION: tl.constexpr, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    tl.store(y_pointer + place, FUNCTION(tl.load(x_pointer + place)))


@pytest.mark.kernels
@pytest.mark.skipif(KERNELS_RUN and not INTERPRETING, reason="a GPU's device library is accurate to two units")
@pytest.mark.parametrize("name", ["exp", "fast_exp", "log", "expm1", "log1p", "tanh"])
def test_float32_is_float64_rounded(name: str, device: str) -> None:
    """NumPy's single precision is right to a unit or two, and which one depends on the processor."""
    x = torch.linspace(0.01, 20, 4096, device=device)
    y = torch.empty_like(x)
    function_kernel[(1,)](x, y, getattr(numerics, name), 4096)
    expected = getattr(torch, name.removeprefix("fast_"))(x.double()).float()
    assert (y != expected).sum() <= 2, "but for double rounding"


@triton.jit
def coarse_kernel(x_pointer, y_pointer, FUNCTION: tl.constexpr, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    tl.store(y_pointer + place, FUNCTION(tl.load(x_pointer + place), True))


@pytest.mark.kernels
@pytest.mark.parametrize("name", ["exp", "expm1", "log1p", "sigmoid"])
def test_coarse_functions_are_off_by_less_than_16_bits_see(name: str, device: str) -> None:
    x = torch.cat([torch.linspace(0, 1, 2048), torch.logspace(-9, 0, 2048)]).to(device)
    if name != "log1p":
        x[1::2] *= -1
    y = torch.empty_like(x)
    coarse_kernel[(1,)](x, y, getattr(numerics, name), 4096)
    expected = getattr(torch, name)(x.double())
    assert ((y - expected).abs() <= 2.0**-17 * expected.abs()).all()
    assert torch.equal(y[x == 0].signbit(), expected[x == 0].signbit())


def has_coarse(row: Activation) -> bool:
    coarse = row.for_results_of(torch.float16)
    return coarse.coarse_forward or coarse.coarse_gradient


@triton.jit
def activation_kernel(x_pointer, y_pointer, dx_pointer, ROW: tl.constexpr, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    x = tl.load(x_pointer + place)
    tl.store(y_pointer + place, value_of(x, 1.0, 1.0, ROW))
    tl.store(dx_pointer + place, gradient_from_input(x * 0 + 1, x, 1.0, 1.0, ROW))


@pytest.mark.whole
@pytest.mark.kernels
@pytest.mark.parametrize("name", [name for name, row in ACTIVATIONS.items() if has_coarse(row)])
def test_coarse_activations_are_off_by_little(name: str, device: str) -> None:
    """Whichever of the types of 16 bits tests of an activation take."""
    row = ACTIVATIONS[name]
    x = torch.linspace(-8, 8, 1024, device=device)
    results = []
    for each in (row, row.for_results_of(torch.float16)):
        y, dx = torch.empty_like(x), torch.empty_like(x)
        activation_kernel[(1,)](x, y, dx, each, 1024)
        results.append((y, dx))
    for fine, coarse in zip(*results, strict=True):
        torch.testing.assert_close(coarse, fine, rtol=2.0**-8, atol=1e-6)


@pytest.mark.kernels
def test_negative_keeps_the_sign_of_zero(device: str) -> None:
    x = torch.tensor([0.0, -0.0, 1.5, -float("inf")], device=device)
    y = torch.empty_like(x)
    function_kernel[(1,)](x, y, numerics.negative, 4)
    assert y.tolist() == (-x).tolist()
    assert torch.equal(y.signbit(), (-x).signbit())


_LOGITS = [[1000.0, -1.0, -2.0], [-1.0, 1000.0, -3.0], [0.0, 0.0, 0.0]]
#: Operands whose results or gradients are zeros, of functions that PyTorch computes with a minus somewhere.
NEGATED: dict[str, tuple[Callable[..., Any], list[Any]]] = {
    "softmin": (lambda f, x: f.softmin(x, 1).sum() * 0, [_LOGITS]),
    "l1_loss": (lambda f, x, t: f.l1_loss(x, t, reduction="none"), [[0.0, -0.0, 1.0], [0.0, 0.0, 1.0]]),
    "huber_loss": (lambda f, x, t: f.huber_loss(x, t, reduction="none"), [[0.0, -0.0, 1.0], [0.0, 0.0, 1.0]]),
    "kl_div": (lambda f, x, t: f.kl_div(x, t, reduction="none"), [[0.0, -1.0, 1.0], [0.0, 0.5, 0.0]]),
    "with_logits": (lambda f, x, t: f.binary_cross_entropy_with_logits(x, t), [[0.0, -0.0, 1.0], [0.5, 0.0, 1.0]]),
    "nll_loss": (
        lambda f, x: f.nll_loss(x, torch.arange(3, device=x.device), torch.arange(3.0, device=x.device)),
        [[[-1.0, 0.0, -1.0], [-1.0, 0.0, -1.0], [-1.0, -1.0, 0.0]]],
    ),
    "cross_entropy": (lambda f, x, t: f.cross_entropy(x, t, reduction="none"), [_LOGITS, torch.eye(3).tolist()]),
}


@pytest.mark.kernels
@pytest.mark.parametrize("name", NEGATED)
def test_zeros_have_the_sign_of_stocks(name: str, device: str) -> None:
    compute, operands = NEGATED[name]
    results = []
    for functions in (autograd, F):
        leaves = [torch.tensor(operand, device=device, requires_grad=True) for operand in operands]
        y = compute(functions, *leaves)
        results.append([y, *torch.autograd.grad(y, leaves, torch.ones_like(y))])
    zeros = 0
    for ours, stock in zip(*results, strict=True):
        zero = stock == 0
        zeros += int(zero.sum())
        assert torch.equal(ours[zero].signbit(), stock[zero].signbit())
    assert zeros
