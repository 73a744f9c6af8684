"""The activation family: every activation of the table, PReLU in its layouts, and RReLU in training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from fusednn_bench.families import counted, each_size
from fusednn_bench.peers import activation_peers
from fusednn_bench.replay import test_device_time  # noqa: F401 (pytest collects it here)
from torch import Tensor

from fusednn import autograd
from fusednn.benchmark.cases import Case, Inputs, Operation
from fusednn.benchmark.protocol import WrongResultError
from fusednn.benchmark.validity import LIMIT
from fusednn.catalogue import row_of
from fusednn.kernels.functions.activation import ACTIVATIONS

SIZES = {"large": (64, 64, 128, 128), "cifar": (128, 64, 16, 16), "lenet": (64, 6, 28, 28)}
COUNTED_SHAPE = (2, 16, 32, 16)  # whole tiles; the interpreter is slow
DTYPES = (torch.bfloat16, torch.float32, torch.float16)
RRELU_BOUNDS = (1 / 8, 1 / 3)

# One of each kind (a saved bit, input, output; slopes) stands for the rest where a quick run can't have all.
QUICK_FLOAT32 = ("relu", "gelu", "elu", "prelu")
QUICK_SMALL = ("relu", "gelu", "prelu")

# Rows of the table that are another function's option, or that need arguments.
_FUNCTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "gelu_tanh": ("gelu", {"approximate": "tanh"}),
    "threshold": ("threshold", {"threshold": 0.0, "value": 0.0}),
}


def _activations() -> Iterator[Operation]:
    for name in ACTIVATIONS:
        function, arguments = _FUNCTIONS.get(name, (name, {}))
        yield _activation(name, function, arguments)


def _activation(name: str, function: str, arguments: dict[str, Any]) -> Operation:
    row = row_of(function)
    ours = partial(getattr(autograd, function), **arguments)
    stock = partial(getattr(F, function, row.in_stock), **arguments)
    return Operation(name, "activation", ours, stock, row.budget, peers=partial(activation_peers, name))


def _with_slopes(x: Tensor, count: int | None) -> tuple[Tensor, ...]:
    """x, and ``count`` slopes, or one for each channel."""
    slopes = torch.linspace(0.1, 0.4, count or x.shape[1], device=x.device, dtype=x.dtype)
    return x.requires_grad_(), slopes.requires_grad_()


def _prelu(name: str, count: int | None, memory_format: torch.memory_format) -> Operation:
    operands: Callable[[Tensor], tuple[Tensor, ...]] = partial(_with_slopes, count=count)
    return Operation(
        name, "prelu", autograd.prelu, F.prelu, row_of("prelu").budget, operands=operands, memory_format=memory_format
    )


def _rrelu() -> Operation:
    ours, stock = (partial(module.rrelu, training=True) for module in (autograd, F))
    return Operation("rrelu", "rrelu", ours, stock, row_of("rrelu").budget, check=_check_rrelu)


def _check_rrelu(case: Case, y: Tensor, gradients: Sequence[Tensor], inputs: Inputs) -> float:
    """Random slopes: 1 for positive elements, within the bounds elsewhere, and the same in both directions."""
    x, y, dx, g = (tensor.detach().double() for tensor in (*inputs.operands, y, *gradients, inputs.g))
    epsilon = torch.finfo(case.dtype).eps
    low, high = RRELU_BOUNDS
    outside = torch.where(x > 0, (y - x).abs(), torch.maximum(y - low * x, high * x - y).clamp(min=0))
    disagreement = (dx * x - y * g).abs()
    error = float(torch.maximum(outside, disagreement).div_(1 + x.abs()).max()) / epsilon
    if not error <= LIMIT[case.dtype]:
        raise WrongResultError(f"{case.id}: slopes are {error:.3g} epsilons outside their interval, or not the same")
    negative = x < -0.1
    spread = float((y[negative] / x[negative]).std()) / ((high - low) / 12**0.5)  # 1 for a uniform distribution
    if not 0.9 < spread < 1.1:
        raise WrongResultError(f"{case.id}: the slopes' deviation is {spread:.3g} of a uniform distribution's")
    return error


OPERATIONS = {
    operation.name: operation
    for operation in (
        *_activations(),
        _prelu("prelu", None, torch.contiguous_format),
        _prelu("prelu_channels_last", None, torch.channels_last),
        _prelu("prelu_single", 1, torch.contiguous_format),
        _prelu("prelu_single_channels_last", 1, torch.channels_last),
        _rrelu(),
    )
}


def timed_cases(full: bool) -> list[Case]:
    """The most important first: a time limit cuts the end."""
    everything = [
        case
        for case in each_size(SIZES, DTYPES, OPERATIONS.values())
        # The gradient of slopes that so many elements share overflows float16, in PyTorch too.
        if not (case.operation.family == "prelu" and case.dtype is torch.float16)
    ]
    return everything if full else [case for case in everything if _in_quick_run(case)]


def _in_quick_run(case: Case) -> bool:
    name = case.operation.name
    if case.size == "large":
        return case.dtype is torch.bfloat16 or (case.dtype is torch.float32 and name in QUICK_FLOAT32)
    usual = torch.bfloat16 if case.size == "cifar" else torch.float32
    return case.dtype is usual and name in QUICK_SMALL


def counted_cases() -> list[Case]:
    return counted(OPERATIONS.values(), (torch.bfloat16, torch.float32), COUNTED_SHAPE)


def test_traffic(case: Case, counts: list[dict[str, Any]]) -> None:
    """Bytes within the budget (5 % over at most, beside the slopes' and their gradients' few bytes)."""
    for record in counts:
        if record["contestant"] == "fusednn":
            assert record["bytes"] <= 1.05 * record["budget_bytes"] + 64 * case.shape[1]
