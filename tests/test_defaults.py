"""Under another default device or dtype, which calls that name theirs must not notice: layers, functions, optimizers.

The samples are those of the self-test, which has one for every class and function.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from support.optimizers import every_name, parameters, set_gradients
from torch import Tensor, nn

import fusednn
from fusednn import autograd, optim
from fusednn.autograd.dispatch import observe_choices
from fusednn.commands.self_test import FUNCTIONS, function_sample, layer_sample
from fusednn.layers.twin import TWINS
from fusednn.testing import leaf


@contextmanager
def other_defaults() -> Iterator[None]:
    """Float64, and the other device that every machine has: what is made there by mistake has no values."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(before)


every_layer = pytest.mark.parametrize("stock_class", TWINS, ids=lambda cls: cls.__name__)
every_function = pytest.mark.parametrize("name", FUNCTIONS)


def outcome(function: Callable[..., Any], operands: list[Tensor]) -> tuple[list[Tensor], list[Any]]:
    """Results, gradients and buffers of a call, and the paths that it took."""
    choices: list[Any] = []
    leaves = [leaf(operand) for operand in operands]
    module = function if isinstance(function, nn.Module) else nn.Module()
    torch.manual_seed(0)
    with observe_choices(choices.append):
        y = function(*leaves)
    results = list(y) if isinstance(y, tuple) else [y]
    wanted = [tensor for tensor in (*leaves, *module.parameters()) if tensor.requires_grad]
    if results[0].requires_grad:
        gradients = torch.autograd.grad(results[0].sum(), wanted, allow_unused=True)
        results += [gradient for gradient in gradients if gradient is not None]
    return [tensor.detach().clone() for tensor in (*results, *module.buffers())], choices


def assert_unnoticed(make: Callable[[], Any], device: str) -> None:
    """The same bits, dtypes and paths as without."""
    outcomes = []
    for defaults in (nullcontext(), other_defaults()):
        sample = make()
        function = sample.ours.to(device) if isinstance(sample.ours, nn.Module) else sample.ours
        operands = [x.to(device, torch.float32) if x.is_floating_point() else x.to(device) for x in sample.operands]
        with defaults:
            outcomes.append(outcome(function, operands))
    (expected, expected_choices), (results, choices) = outcomes
    torch.testing.assert_close(results, expected, rtol=0, atol=0, equal_nan=True)
    assert choices == expected_choices


@every_layer
@pytest.mark.filterwarnings("ignore:reduction")  # of KLDivLoss
def test_layers(stock_class: type[nn.Module], device: str) -> None:
    assert_unnoticed(lambda: layer_sample(stock_class), device)


@every_function
def test_functions(name: str, device: str) -> None:
    assert name in autograd.__all__
    assert_unnoticed(lambda: function_sample(FUNCTIONS[name]), device)


# Stock makes its counters on the default device, and then can't use them.
@pytest.mark.parametrize("first", [pytest.param(0, marks=pytest.mark.kernels), 1], ids=["new", "begun"])
@every_name
def test_optimizers(name: str, first: int, device: str) -> None:
    results = []
    for defaults in (nullcontext, other_defaults):
        weights = parameters([(3, 2), (2,)], torch.float32, device)
        ours = getattr(optim, name)(weights, clip_norm=1.0, clip_value=0.5, averaging=0.5, l1=0.1)
        for step in range(first + 2):
            set_gradients(step, weights)
            with defaults() if step >= first else nullcontext():
                ours.step()
        results.append([*weights, *(value for p in weights for value in ours.state[p].values())])
    for mine, expected in zip(*reversed(results), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-6, atol=0, check_dtype=expected.dim() > 0)


def test_folding(device: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4)).to(device).eval()
    x = torch.randn(5, 3, device=device)
    expected = model(x)
    with other_defaults():
        assert fusednn.layers.fold_batch_norm(model).replaced
    torch.testing.assert_close(model(x), expected)
