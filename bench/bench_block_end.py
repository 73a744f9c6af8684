"""The block_end family: LayerScale, stochastic depth and the residual, of a vision transformer and a ConvNeXt."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from fusednn_bench.families import counted
from fusednn_bench.replay import test_device_time  # noqa: F401 (pytest collects it here)
from torch import Tensor

from fusednn import autograd
from fusednn.benchmark.cases import Case, Inputs, Operation
from fusednn.benchmark.validity import compare
from fusednn.catalogue import row_of

P = 0.25
#: Tokens of a small vision transformer, and an early stage of a ConvNeXt.
SIZES = {"vit": (64, 197, 768)}
IMAGES_SIZES = {"convnext": (64, 96, 56, 56)}
COUNTED_SHAPE = (8, 16, 256)
COUNTED_IMAGES = (4, 64, 16, 16)
DTYPES = (torch.bfloat16, torch.float32)


def _operands(x: Tensor, dim: int = -1) -> tuple[Tensor, ...]:
    """The input, the residual, and a scale along ``dim``."""
    scale = torch.linspace(-1, 1, x.shape[dim], device=x.device, dtype=x.dtype)
    others = x.detach().flip(0), scale.view(-1, *[1] * (-1 - dim))
    return x.requires_grad_(), *(one.clone(memory_format=torch.preserve_format).requires_grad_() for one in others)


def _dropped(x: Tensor) -> Tensor:
    """As timm's ``drop_path``."""
    noise = x.new_empty(len(x), *[1] * (x.dim() - 1)).bernoulli_(1 - P)
    return x * noise.div_(1 - P)


def _check(case: Case, y: Tensor, gradients: Sequence[Tensor], inputs: Inputs) -> float:
    """Plain PyTorch's, with the samples that the input's gradient shows to be kept."""
    keep = (gradients[0] != 0).reshape(len(y), -1).any(1).view(-1, *[1] * (y.dim() - 1))
    return compare(case, (y, *gradients), inputs, lambda x, residual, scale: x * scale * (keep / (1 - P)) + residual)


OPERATIONS = {
    operation.name: operation
    for operation in (
        Operation(
            f"block_end{name}",
            "block_end",
            partial(autograd.block_end, p=P),
            lambda x, residual, scale: _dropped(x * scale) + residual,
            row_of("block_end").budget,
            operands=partial(_operands, dim=dim),
            memory_format=memory_format,
            check=_check,
        )
        for name, dim, memory_format in (
            ("", -1, torch.contiguous_format),
            ("_images", -3, torch.contiguous_format),
            ("_channels_last", -3, torch.channels_last),
        )
    )
}


def timed_cases(full: bool) -> list[Case]:
    """The most important first: a time limit cuts the end."""
    return [
        Case(operation, dtype, size, shape)
        for dtype in (DTYPES if full else DTYPES[:1])
        for operation in OPERATIONS.values()
        for size, shape in (SIZES if operation.name == "block_end" else IMAGES_SIZES).items()
    ]


def counted_cases() -> list[Case]:
    return counted(OPERATIONS.values(), DTYPES, COUNTED_IMAGES, {"block_end": COUNTED_SHAPE})


def test_traffic(case: Case, counts: list[dict[str, Any]]) -> None:
    """Bytes within the budget, beside what there is of each channel.

    A program reads the scale of its columns, and leaves a sum for each, which is read once more: three times 4 bytes
    for a column of at least 8 elements.
    """
    for record in counts:
        if record["contestant"] == "fusednn":
            assert record["bytes"] <= 1.01 * record["budget_bytes"] + 12 * case.numel / 8 + 2048
