"""Dropout of a linear layer's maxima."""

import pytest
import torch
from support.maxout import linear_operands
from torch import Tensor

from fusednn.autograd import maxout_linear
from fusednn.testing import leaf, random_tensor


@pytest.mark.kernels
@pytest.mark.parametrize("features", [16, 9], ids=["fused", "apart"])
@pytest.mark.parametrize("p", [0.25, 1.0])
def test_dropout(features: int, p: float, device: str) -> None:
    operands = [leaf(t) for t in linear_operands((300,), 40, features, 2, torch.float32, device)]
    whole = maxout_linear(*operands)
    torch.manual_seed(3)
    y = maxout_linear(*operands, dropout=p)
    torch.manual_seed(3)
    assert torch.equal(maxout_linear(*operands, dropout=p), y)
    if p < 1:
        assert not torch.equal(maxout_linear(*operands, dropout=p), y)
    kept = y != 0
    assert abs(kept.float().mean().item() - (1 - p)) < 6 * (p * (1 - p) / y.numel()) ** 0.5 + 1e-9
    scale = 1 / (1 - p) if p < 1 else 0.0
    torch.testing.assert_close(y, torch.where(kept, whole * scale, 0))
    gradient = random_tensor(tuple(y.shape), torch.float32, device, seed=5)
    ours = torch.autograd.grad(y, operands, gradient)
    expected = torch.autograd.grad(whole, operands, torch.where(kept, gradient * scale, 0))
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.kernels
@pytest.mark.parametrize("features", [16, 9], ids=["fused", "apart"])
def test_dropout_keeps_what_is_not_a_number(features: int, device: str) -> None:
    """As PyTorch, which multiplies by 0."""
    x, weight, bias = linear_operands((8,), 3, features, 2, torch.float32, device)
    bias[0, 0], bias[1, 1] = torch.nan, torch.inf
    y = maxout_linear(x, weight, bias, dropout=0.9)
    assert y[:, 0].isnan().all()
    assert (y[:, 1].isnan() | y[:, 1].isposinf()).all()
    assert y[:, 1].isnan().any()
    assert y[:, 2].isfinite().all()


@pytest.mark.kernels
@pytest.mark.parametrize("features", [16, 9], ids=["fused", "apart"])
def test_dropout_is_independent_of_its_neighbours(features: int, device: str) -> None:
    x, weight, bias = linear_operands((512,), 128, features, 2, torch.float32, device)
    kept = (maxout_linear(x, weight, bias, dropout=0.5) != 0).double() * 2 - 1
    limit = 6 / kept.numel() ** 0.5
    for rows, columns in ((0, 1), (0, 2), (0, 32), (1, 0), (32, 0), (64, 0)):
        shifted = kept[rows:, columns:] * kept[: len(kept) - rows, : kept.shape[1] - columns]
        assert shifted.mean().abs() < limit * 1.5, (rows, columns)


@pytest.mark.kernels
def test_second_derivatives_with_dropout(device: str) -> None:
    operands = [leaf(t) for t in linear_operands((2,), 2, 3, 2, torch.float64, device)]

    def function(*operands: Tensor) -> Tensor:
        torch.manual_seed(3)
        return maxout_linear(*operands, dropout=0.5)

    torch.autograd.gradcheck(function, operands)
    torch.autograd.gradgradcheck(function, operands)
