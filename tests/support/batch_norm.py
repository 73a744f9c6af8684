"""What tests of batch norm share."""

from collections.abc import Callable, Container, Iterable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusednn import autograd
from fusednn.testing import check_against_stock


def mostly_thorough(values: Iterable[Any], usual: Container[Any]) -> list[Any]:
    """All values as parameters of a test; those that aren't ``usual`` only where there is time."""
    return [
        value if value in usual else pytest.param(*_as_tuple(value), marks=pytest.mark.thorough) for value in values
    ]


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def vectors(channels: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Running mean and variance, weight and bias."""
    options = {"dtype": dtype, "device": device}
    return (
        torch.linspace(-1, 2, channels, **options),
        torch.linspace(0.5, 3, channels, **options),
        torch.linspace(-1.5, 2, channels, **options),
        torch.linspace(1, -1, channels, **options),
    )


def run(function: Callable[..., Tensor], training: bool, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A call with fresh running statistics, so that it can be repeated."""
    mean, variance, *_ = vectors(x.shape[1], weight.dtype, x.device.type)
    return function(x, mean, variance, weight, bias, training)


def check(x: Tensor, gradient: Tensor, training: bool) -> None:
    _, _, weight, bias = vectors(x.shape[1], x.dtype, x.device.type)
    ours, stock = (partial(run, function, training) for function in (autograd.batch_norm, F.batch_norm))
    check_against_stock(ours, stock, [x, weight, bias], gradient)
