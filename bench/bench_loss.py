"""The pointwise losses, and that of class indices: their means, as in training; one also element by element."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from fusednn_bench.families import counted, each_size
from fusednn_bench.replay import test_device_time  # noqa: F401 (pytest collects it here)
from torch import Tensor

from fusednn import autograd
from fusednn.benchmark.cases import Case, Operation
from fusednn.catalogue import row_of

SIZES = {"large": (8192, 8192), "medium": (1024, 1024), "small": (128, 10)}
COUNTED_SHAPE = (16, 512)
DTYPES = (torch.bfloat16, torch.float32)
INDEX_BYTES = 8

POINTWISE = {
    "mse_loss": "normal",
    "l1_loss": "normal",
    "smooth_l1_loss": "normal",
    "huber_loss": "normal",
    "binary_cross_entropy": "probability",
    "binary_cross_entropy_with_logits": "logit",
    "kl_div": "log_probability",
}


def _pointwise_operands(x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Input and target, in the loss's range; of the input alone a gradient is wanted."""
    target = x.flip(0)
    if kind == "probability":
        x = x.sigmoid().clamp(0.01, 0.99)
    if kind == "log_probability":
        x = -x.abs()
    if kind != "normal":
        target = target.sigmoid()
    return x.detach().requires_grad_(), target


def _class_operands(x: Tensor) -> tuple[Tensor, Tensor]:
    target = torch.arange(x.shape[0], device=x.device) % x.shape[1]
    return x.log_softmax(1).detach().requires_grad_(), target


def _scalar(shape: torch.Size) -> Sequence[int]:
    return ()


def _class_budget(shape: torch.Size, dtype: torch.dtype) -> tuple[float, float]:
    """A target and an element of each row; the gradient, zeros and all."""
    picked = shape[0] * (INDEX_BYTES + dtype.itemsize)
    return picked, shape.numel() * dtype.itemsize + picked


def _pointwise(function: str, reduction: str) -> Operation:
    ours, stock = (partial(getattr(module, function), reduction=reduction) for module in (autograd, F))
    mean = reduction == "mean"
    return Operation(
        function if mean else f"{function}_none",
        "loss",
        ours,
        stock,
        partial(row_of(function).budget, alternative=0 if mean else 1),
        operands=partial(_pointwise_operands, kind=POINTWISE[function]),
        **({"output_shape": _scalar} if mean else {}),
    )


OPERATIONS = {
    operation.name: operation
    for operation in (
        *(_pointwise(function, "mean") for function in POINTWISE),
        _pointwise("mse_loss", "none"),
        Operation("nll_loss", "loss", autograd.nll_loss, F.nll_loss, _class_budget, _class_operands, _scalar),
    )
}
QUICK = ("mse_loss", "mse_loss_none", "binary_cross_entropy_with_logits")


def timed_cases(full: bool) -> list[Case]:
    """The most important first: a time limit cuts the end."""
    everything = each_size(SIZES, DTYPES, OPERATIONS.values())
    return [case for case in everything if full or (case.operation.name in QUICK and case.size != "medium")]


def counted_cases() -> list[Case]:
    return counted(OPERATIONS.values(), DTYPES, COUNTED_SHAPE)


def test_traffic(case: Case, counts: list[dict[str, Any]]) -> None:
    """Bytes within the budget (5 % over at most, beside partial sums and scalars)."""
    for record in counts:
        if record["contestant"] == "fusednn":
            assert record["bytes"] <= 1.05 * record["budget_bytes"] + 1024
