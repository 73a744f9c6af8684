"""Softmax and cross-entropy over classes from ten to a language model's, and the output layer with its loss."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from fusednn_bench import peers
from fusednn_bench.families import counted, each_size
from fusednn_bench.replay import test_device_time  # noqa: F401 (pytest collects it here)
from torch import Tensor

from fusednn import autograd
from fusednn.benchmark.cases import Case, Operation
from fusednn.catalogue import row_of

# About 134 MB of logits in bfloat16, however many the classes; and the last layer of a small network.
SIZES = {
    "10 classes": (6_553_600, 10),
    "1,000 classes": (65_536, 1000),
    "32,768 classes": (2048, 32_768),
    "131,072 classes": (512, 131_072),
    "262,144 classes": (256, 262_144),
    "small": (128, 10),
}
#: Inputs of the output layer: tokens and features.
TOKENS = {"small": (128, 64), "tokens": (8192, 2048)}
LINEAR_CLASSES = {"small": 10, "tokens": 32_768}
COUNTED_SHAPE = (16, 512)
DTYPES = (torch.bfloat16, torch.float32)
INDEX_BYTES = 8
STATISTICS_BYTES = 8  # of a line: its maximum and the logarithm of its sum, float32
SOFTMAX = ("softmax", "log_softmax", "softmin")


def _line_softmax(function: str) -> Operation:
    ours, stock = (partial(getattr(module, function), dim=1) for module in (autograd, F))
    return Operation(
        function,
        "softmax",
        ours,
        stock,
        row_of(function).budget,
        peers=peers.softmax_peers if function == "softmax" else dict,
    )


def _cross_entropy_budget(shape: torch.Size, dtype: torch.dtype) -> tuple[float, float]:
    """The logits; and again, with their gradient.  A target, its logit and the statistics of each line beside."""
    tensor, lines = shape.numel() * dtype.itemsize, shape.numel() // shape[1]
    beside = lines * (INDEX_BYTES + STATISTICS_BYTES)
    return tensor + beside + lines * dtype.itemsize, 2 * tensor + beside


def _linear_budget(shape: torch.Size, dtype: torch.dtype) -> tuple[float, float]:
    """Input, weight and the gradients of both; targets.  The matrix products' time is what there is to it."""
    operands = shape.numel() + _linear_classes(shape) * shape[1]
    return 2 * operands * dtype.itemsize + shape[0] * INDEX_BYTES, 0.0


def _scalar(shape: torch.Size) -> Sequence[int]:
    return ()


def _targets(x: Tensor, classes: int) -> Tensor:
    shape = (x.shape[0], *x.shape[2:])
    generator = torch.Generator(x.device).manual_seed(0)
    return torch.randint(classes, shape, generator=generator, device=x.device)


def _class_operands(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.requires_grad_(), _targets(x, x.shape[1])


def _linear_classes(shape: torch.Size) -> int:
    return next(LINEAR_CLASSES[size] for size, tokens in TOKENS.items() if tokens == tuple(shape))


def _linear_operands(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    classes = _linear_classes(x.shape)
    generator = torch.Generator(x.device).manual_seed(1)
    weight = torch.randn((classes, x.shape[1]), generator=generator, device=x.device, dtype=torch.float32)
    weight = (weight / x.shape[1] ** 0.5).to(x.dtype)
    return x.requires_grad_(), weight.requires_grad_(), _targets(x, classes)


def _two_steps(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """The output layer and its loss as they are usually written."""
    return F.cross_entropy(F.linear(x, weight), target)


OPERATIONS = {
    operation.name: operation
    for operation in (
        *(_line_softmax(function) for function in SOFTMAX),
        Operation(
            "cross_entropy",
            "softmax",
            autograd.cross_entropy,
            F.cross_entropy,
            _cross_entropy_budget,
            _class_operands,
            _scalar,
            peers=peers.cross_entropy_peers,
        ),
        Operation(
            "linear_cross_entropy",
            "softmax",
            autograd.linear_cross_entropy,
            _two_steps,
            _linear_budget,
            _linear_operands,
            _scalar,
            peers=peers.linear_cross_entropy_peers,
        ),
    )
}
LINEAR = OPERATIONS["linear_cross_entropy"]
OF_LOGITS = [operation for operation in OPERATIONS.values() if operation is not LINEAR]
QUICK = ("softmax", "cross_entropy")


def timed_cases(full: bool) -> list[Case]:
    """The most important first: a time limit cuts the end."""
    logits = [
        case
        for case in each_size(SIZES, DTYPES, OF_LOGITS)
        if full or (case.operation.name in QUICK and (case.dtype is torch.bfloat16 or case.size == "small"))
    ]
    return logits + [
        Case(LINEAR, dtype, size, shape)
        for size, shape in TOKENS.items()
        for dtype in (DTYPES if full else (torch.bfloat16,))
    ]


def counted_cases() -> list[Case]:
    logits = counted(OF_LOGITS, DTYPES, COUNTED_SHAPE)
    return logits + [Case(LINEAR, dtype, "small", TOKENS["small"]) for dtype in DTYPES]


def test_traffic(case: Case, counts: list[dict[str, Any]]) -> None:
    """Bytes within the budget (5 % over at most, beside partial sums and scalars); the output layer's are counted."""
    for record in counts:
        if record["contestant"] == "fusednn" and case.operation is not LINEAR:
            assert record["bytes"] <= 1.05 * record["budget_bytes"] + 1024
