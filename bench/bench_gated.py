"""The gated family: gates of two tensors (SwiGLU), of the halves of one (GEGLU, GLU), of channels, and highways."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from fusednn_bench.families import counted
from fusednn_bench.replay import test_device_time  # noqa: F401 (pytest collects it here)
from torch import Tensor

from fusednn import autograd
from fusednn.benchmark.cases import Case, Operation
from fusednn.catalogue import row_of

#: The inside of a Llama's feed-forward layer, of 8192 tokens; and of a small vision transformer's.
SIZES = {"large": (8192, 14336), "vit": (64 * 197, 1536)}
#: An early block of an EfficientNet.
CHANNELS_SIZES = {"efficientnet": (128, 96, 56, 56)}
COUNTED_SHAPE = (32, 1024)
COUNTED_CHANNELS = (2, 4, 32, 32)
DTYPES = (torch.bfloat16, torch.float32)


def _stock_gate(gate: Tensor, other: Tensor) -> Tensor:
    return F.silu(gate) * other


def _stock_halves(x: Tensor) -> Tensor:
    other, gate = x.chunk(2, -1)
    return other * F.gelu(gate)


def _stock_highway(gate: Tensor, h: Tensor, x: Tensor) -> Tensor:
    t = gate.sigmoid()
    return t * h + (1 - t) * x


def _two(x: Tensor) -> tuple[Tensor, ...]:
    return x.requires_grad_(), x.detach().flip(0).requires_grad_()


def _three(x: Tensor) -> tuple[Tensor, ...]:
    return *_two(x), x.detach().flip(1).requires_grad_()


def _halved(shape: torch.Size) -> tuple[int, ...]:
    return (*shape[:-1], shape[-1] // 2)


OPERATIONS = {
    operation.name: operation
    for operation in (
        Operation("gated", "gated", autograd.gated, _stock_gate, row_of("gated").budget, operands=_two),
        Operation(
            "gated_halves",
            "gated",
            partial(autograd.gated_halves, activation="gelu"),
            _stock_halves,
            row_of("gated_halves").budget,
            output_shape=_halved,
        ),
        Operation(
            "gated_channels",
            "gated",
            autograd.gated_channels,
            lambda x, gate: x * gate.sigmoid(),
            row_of("gated_channels").budget,
            operands=lambda x: (x.requires_grad_(), x.detach()[:, :, :1, :1].clone().requires_grad_()),
        ),
        Operation("highway", "gated", autograd.highway, _stock_highway, row_of("highway").budget, operands=_three),
        Operation("glu", "gated", autograd.glu, F.glu, row_of("glu").budget, output_shape=_halved),
    )
}


def timed_cases(full: bool) -> list[Case]:
    """The most important first: a time limit cuts the end."""
    dtypes = DTYPES if full else DTYPES[:1]
    return [
        Case(operation, dtype, size, shape)
        for operation in OPERATIONS.values()
        for size, shape in (CHANNELS_SIZES if operation.name == "gated_channels" else SIZES).items()
        for dtype in dtypes
    ]


def counted_cases() -> list[Case]:
    return counted(OPERATIONS.values(), DTYPES, COUNTED_SHAPE, {"gated_channels": COUNTED_CHANNELS})


def test_traffic(case: Case, counts: list[dict[str, Any]]) -> None:
    """Bytes within the budget."""
    for record in counts:
        if record["contestant"] == "fusednn":
            assert record["bytes"] <= 1.01 * record["budget_bytes"]
