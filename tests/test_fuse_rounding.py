"""Fused neighbours in 16 bits round no more than PyTorch's layers do, and have all derivatives."""

import copy
from collections.abc import Callable

import pytest
import torch
from support.fusion import ROWS, batch, make
from torch import Tensor, nn
from torch.nn import functional as F

import fusednn

needs_kernels = pytest.mark.kernels
HEADS = {
    "relu": lambda: nn.Sequential(nn.Linear(64, 64), nn.ReLU()),
    "gelu": lambda: nn.Sequential(nn.Linear(64, 64), nn.GELU()),
    "maxout": lambda: nn.Sequential(nn.Linear(64, 64), nn.MaxPool1d(2)),
    "wide maxout": lambda: nn.Sequential(nn.Linear(4096, 8), nn.MaxPool1d(2)),
}


def mean_error(function: Callable[[Tensor], Tensor], x: Tensor, exact: Tensor) -> float:
    with torch.no_grad():
        return (function(x).double() - exact).abs().mean().item()


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", HEADS)
def test_a_linear_layer_rounds_as_stock_does(name: str, dtype: torch.dtype, device: str) -> None:
    torch.manual_seed(0)
    stock = HEADS[name]().to(device, dtype)
    nn.init.normal_(stock[0].bias)
    model = copy.deepcopy(stock)
    fusednn.replace_layers(model, fuse=True)
    x = torch.randn(128, stock[0].in_features, device=device).to(dtype)
    exact = copy.deepcopy(stock).double()(x.double()).detach()
    assert mean_error(model, x, exact) <= 1.1 * mean_error(stock, x, exact)


@needs_kernels
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_a_convolution_rounds_as_cudnn_and_the_bias_behind_it_do(activation: str, device: str) -> None:
    """On a GPU stock's convolution rounds its product, and then its sum with the bias; on a CPU it rounds once."""
    torch.manual_seed(0)
    conv = nn.Conv2d(64, 32, 3).to(device)
    nn.init.normal_(conv.bias)
    conv.to(torch.bfloat16)
    act: nn.Module = {"relu": nn.ReLU(), "gelu": nn.GELU()}[activation]
    model = nn.Sequential(copy.deepcopy(conv), act)
    fusednn.replace_layers(model, fuse=True)
    x = torch.randn(2, 64, 8, 8, device=device).to(torch.bfloat16)
    exact = act(copy.deepcopy(conv).double()(x.double())).detach()

    def stock(x: Tensor) -> Tensor:
        return act(F.conv2d(x, conv.weight) + conv.bias.view(-1, 1, 1))

    assert mean_error(model, x, exact) <= 1.1 * mean_error(stock, x, exact)


@pytest.mark.parametrize("frozen", [(), ("weight",), ("bias",)])
@pytest.mark.parametrize("activation", [nn.GELU(), nn.LeakyReLU(0.1), nn.ReLU()])
def test_first_and_second_derivatives_behind_a_linear_layer(
    activation: nn.Module, frozen: tuple[str, ...], device: str
) -> None:
    """Of the bias, too, which is added by the product."""
    stock = make(nn.Sequential(nn.Linear(6, 4), activation), device)
    for name in frozen:
        getattr(stock[0], name).requires_grad_(False)
    model = copy.deepcopy(stock)
    fusednn.replace_layers(model, fuse=True)
    found = []
    for one in (stock, model):
        x = batch(*ROWS, device=device).requires_grad_()
        operands = [x, *(parameter for parameter in one.parameters() if parameter.requires_grad)]
        first = torch.autograd.grad(one(x).pow(3).sum(), operands, create_graph=True)
        second = torch.autograd.grad(sum(gradient.square().sum() for gradient in first), operands, allow_unused=True)
        found.append((first, second, torch.autograd.grad(one(x).pow(3).sum(), operands)))
    torch.testing.assert_close(found[1], found[0])
