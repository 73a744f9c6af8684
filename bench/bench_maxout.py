"""Maxout: of square linear layers, 256 to 4096 features in large and small batches, of channels, of a convolution."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from fusednn_bench.families import counted
from fusednn_bench.replay import test_device_time  # noqa: F401 (pytest collects it here)
from torch import Tensor

from fusednn import autograd
from fusednn.benchmark.cases import Case, Inputs, Operation
from fusednn.benchmark.protocol import WrongResultError
from fusednn.benchmark.validity import LIMIT

FEATURES = (256, 512, 1024, 2048, 4096)
BATCHES = (8192, 128)
LINEAR_SIZES = {f"{batch}x{features}": (batch, features) for batch in BATCHES for features in FEATURES}
IMAGE_SIZES = {"maxout": {"large": (64, 64, 128, 128)}, "maxout_conv2d": {"56x56": (64, 64, 56, 56)}}
SIZES = {**LINEAR_SIZES, **IMAGE_SIZES["maxout"], **IMAGE_SIZES["maxout_conv2d"]}
# One tile of a linear layer, so that every operand is read once; whole tiles of channels.
COUNTED_SHAPES = {"maxout": (2, 16, 32, 16), "maxout_conv2d": (2, 8, 16, 32)}
COUNTED_LINEAR_SHAPE = (64, 32)
DTYPES = (torch.bfloat16, torch.float32)
PIECES = (2, 4)
QUICK = ("8192x256", "8192x1024", "8192x4096", "128x1024", "large", "56x56")

# --- Operands.  One piece is far above the others: near ties, rounding would choose the winners, and so the gradients.
#     The distance, 12, is more than eight standard deviations of the difference between two pieces.


def _winning(pieces: int, units: int, device: torch.device) -> Tensor:
    """12 for each unit's winner and 0 for other pieces, (pieces, units)."""
    winner = torch.arange(units, device=device) % pieces
    return torch.where(winner == torch.arange(pieces, device=device)[:, None], 12.0, 0.0)


def _weights(x: Tensor, *shape: int) -> Tensor:
    """Weights whose products with x have a deviation of 1."""
    generator = torch.Generator(x.device).manual_seed(shape[0])
    weight = torch.randn(shape, generator=generator, device=x.device)
    return weight.div_(2 * weight[0, 0].numel() ** 0.5).to(x.dtype).requires_grad_()


def _linear_operands(x: Tensor, pieces: int) -> tuple[Tensor, ...]:
    features = x.shape[1]
    bias = _winning(pieces, features, x.device).to(x.dtype)
    return x.requires_grad_(), _weights(x, pieces, features, features), bias.requires_grad_()


def _channel_operands(x: Tensor) -> tuple[Tensor, ...]:
    channels = x.shape[1]
    above = _winning(2, channels // 2, x.device).t().reshape(channels, 1, 1)
    return (x.mul_(0.5).add_(above).requires_grad_(),)


def _conv_operands(x: Tensor) -> tuple[Tensor, ...]:
    channels = x.shape[1]
    bias = _winning(2, channels, x.device).to(x.dtype)
    return x.requires_grad_(), _weights(x, 2, channels, channels, 3, 3), bias.requires_grad_()


# --- What eager PyTorch does ------------------------------------------------------------------------------------------


def _stock_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    products = F.linear(x, weight.flatten(0, 1), bias.flatten())
    return products.unflatten(-1, bias.shape).amax(-2)


def _stock_maximum(x: Tensor) -> Tensor:
    return x.unflatten(1, (-1, 2)).amax(2)


def _stock_conv2d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    products = F.conv2d(x, weight.flatten(0, 1), bias.flatten(), padding=1)
    return products.unflatten(1, bias.shape).amax(1)


def _check(case: Case, y: Tensor, gradients: Sequence[Tensor], inputs: Inputs) -> float:
    """As `validity.check`, but relative to a tensor's largest element: sums of many terms cancel in the small ones."""
    exact = inputs.upcast()
    reference = case.operation.stock(*exact.operands)
    references = (reference, *torch.autograd.grad(reference, exact.differentiable, exact.g))
    worst = 0.0
    for actual, expected in zip((y, *gradients), references, strict=True):
        error = float((actual.detach().double() - expected.detach()).abs().max() / (1 + expected.detach().abs().max()))
        worst = max(worst, error / torch.finfo(case.dtype).eps)
        if not worst <= LIMIT[case.dtype]:  # NaN fails too
            raise WrongResultError(f"{case.id}: a result is {worst:.3g} epsilons from eager PyTorch's")
    return worst


# --- Bytes: everything once, and what PyTorch's convolutions exchange with our passes ---------------------------------


def _linear_budget(pieces: int, shape: torch.Size, dtype: torch.dtype) -> tuple[float, float]:
    rows, features = shape
    e = dtype.itemsize
    data, weights, biases = rows * features * e, pieces * features**2 * e, pieces * features * e
    winners = rows * features
    return 2 * data + winners + weights + biases, 3 * data + winners + 2 * weights + biases


def _channel_budget(shape: torch.Size, dtype: torch.dtype) -> tuple[float, float]:
    features, maxima = shape.numel(), shape.numel() // 2
    once = features * dtype.itemsize + maxima * (dtype.itemsize + 1)
    return once, once


def _conv_budget(shape: torch.Size, dtype: torch.dtype) -> tuple[float, float]:
    maxima, e = shape.numel(), dtype.itemsize
    weights = 18 * shape[1] ** 2 * e
    data, products, once = maxima * e, 2 * maxima * e, maxima * (e + 1)
    return data + weights + 2 * products + once, 2 * data + 2 * weights + 2 * products + once


def _half_the_channels(shape: torch.Size) -> Sequence[int]:
    return shape[0], shape[1] // 2, *shape[2:]


OPERATIONS = {
    operation.name: operation
    for operation in (
        *(
            Operation(
                f"maxout_linear_{pieces}",
                "maxout",
                autograd.maxout_linear,
                _stock_linear,
                partial(_linear_budget, pieces),
                operands=partial(_linear_operands, pieces=pieces),
                check=_check,
            )
            for pieces in PIECES
        ),
        Operation(
            "maxout",
            "maxout",
            partial(autograd.maxout, pieces=2, dim=1),
            _stock_maximum,
            _channel_budget,
            operands=_channel_operands,
            output_shape=_half_the_channels,
        ),
        Operation(
            "maxout_conv2d",
            "maxout",
            partial(autograd.maxout_conv2d, padding=1),
            _stock_conv2d,
            _conv_budget,
            operands=_conv_operands,
            memory_format=torch.channels_last,
            check=_check,
        ),
    )
}


def timed_cases(full: bool) -> list[Case]:
    """The most important first: a time limit cuts the end."""
    return [
        Case(operation, dtype, size, shape)
        for dtype in DTYPES
        for operation in OPERATIONS.values()
        for size, shape in IMAGE_SIZES.get(operation.name, LINEAR_SIZES).items()
        if full or (size in QUICK and dtype is torch.bfloat16 and operation.name != "maxout_linear_4")
    ]


def counted_cases() -> list[Case]:
    return counted(OPERATIONS.values(), DTYPES, COUNTED_LINEAR_SHAPE, COUNTED_SHAPES)


def test_traffic(case: Case, counts: list[dict[str, Any]]) -> None:
    """Within the budget, 5 % over at most; backward beside the sums of biases, and the expansions of so few rows.

    Those of a linear layer are written once and read twice, those of a convolution are read once more than budgeted.
    """
    pieces = 4 if case.operation.name == "maxout_linear_4" else 2
    expansion = pieces * case.numel * case.dtype.itemsize
    times = {"maxout": 0, "maxout_conv2d": 1}.get(case.operation.name, 3)
    for record in counts:
        if record["contestant"] == "fusednn":
            beside = 0 if record["direction"] == "forward" else times * expansion
            assert record["bytes"] <= 1.05 * (record["budget_bytes"] + beside) + 16 * pieces * case.shape[1]
