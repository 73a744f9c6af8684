"""Maxout as PyTorch's operators compute it, and what holds ours to them."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fusednn.testing import check_against_stock, random_tensor, value_and_gradients


def stock_maxout(x: Tensor, pieces: int, dim: int = -1) -> Tensor:
    dim %= x.dim()
    return x.unflatten(dim, (-1, pieces)).max(dim + 1).values


def stock_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    products = F.linear(x, weight.flatten(0, 1), None if bias is None else bias.flatten())
    return products.unflatten(-1, weight.shape[:2]).max(-2).values


def stock_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, **options: object) -> Tensor:
    each = [F.conv2d(x, w, None if bias is None else bias[p], **options) for p, w in enumerate(weight)]
    return torch.stack(each).max(0).values


def linear_operands(
    rows: tuple[int, ...], units: int, features: int, pieces: int, dtype: torch.dtype, device: str
) -> list[Tensor]:
    x = random_tensor((*rows, features), dtype, device)
    weight = random_tensor((pieces, units, features), dtype, device, seed=1)
    return [x, weight, random_tensor((pieces, units), dtype, device, seed=2)]


def integers(operands: list[Tensor]) -> list[Tensor]:
    """Small enough for sums of products in 16 bits: no rounding makes another piece the winner, and ties are many."""
    return [operand.clamp(-1, 1).round() for operand in operands]


def check_exact(ours: Callable[..., Tensor], stock: Callable[..., Tensor], operands: list[Tensor]) -> None:
    """`check`, and the bits of stock: for `integers`."""
    gradient = torch.ones_like(stock(*operands))
    check(ours, stock, operands, gradient)
    (y, gradients), (y_stock, gradients_stock) = (value_and_gradients(f, operands, gradient) for f in (ours, stock))
    assert torch.equal(y, y_stock)
    for mine, theirs in zip(gradients, gradients_stock, strict=True):
        assert torch.equal(mine, theirs)


def check(
    ours: Callable[..., Tensor], stock: Callable[..., Tensor], tensors: list[Tensor], gradient: Tensor | None = None
) -> None:
    if gradient is None:
        like = stock(*tensors)
        gradient = random_tensor(tuple(like.shape), like.dtype, str(like.device), seed=9)
    check_against_stock(ours, stock, tensors, gradient)
