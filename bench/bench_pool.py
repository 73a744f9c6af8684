"""Max pooling: windows of 2 x 2, and of 3 x 3 with a stride of 2, in both memory formats; of lines and volumes."""

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

SIZES = {"large": (64, 64, 112, 112), "cifar": (128, 64, 16, 16), "lenet": (64, 6, 28, 28)}
COUNTED_SHAPE = (2, 8, 16, 32)
DTYPES = (torch.bfloat16, torch.float32, torch.float16)
FORMATS = {"": torch.contiguous_format, "_channels_last": torch.channels_last}
WINDOWS = {"2x2": (2, 2), "3x3": (3, 2)}
CODE_BITS = {2: 2, 3: 4}


def _pooled(shape: torch.Size, kernel: int, stride: int) -> Sequence[int]:
    return (*shape[:2], *((size - kernel) // stride + 1 for size in shape[2:]))


def _budget(shape: torch.Size, dtype: torch.dtype, kernel: int, stride: int) -> tuple[float, float]:
    """The images once, the pooled images and the code."""
    windows = torch.Size(_pooled(shape, kernel, stride)).numel()
    moved = (shape.numel() + windows) * dtype.itemsize + windows * CODE_BITS[kernel] / 8
    return moved, moved


def _operation(window: str, suffix: str) -> Operation:
    kernel, stride = WINDOWS[window]
    ours, stock = (
        partial(module.max_pool2d, kernel_size=kernel, stride=stride)  # type: ignore[attr-defined]
        for module in (autograd, F)
    )
    return Operation(
        f"max_pool2d_{window}{suffix}",
        "pool",
        ours,
        stock,
        partial(_budget, kernel=kernel, stride=stride),
        output_shape=partial(_pooled, kernel=kernel, stride=stride),
        memory_format=FORMATS[suffix],
    )


def _lines(x: Tensor, module: Any) -> Tensor:
    y: Tensor = module.max_pool1d(x.flatten(2), 2)
    return y


def _pooled_lines(shape: torch.Size) -> Sequence[int]:
    return *shape[:2], shape[2] * shape[3] // 2


def _lines_budget(shape: torch.Size, dtype: torch.dtype) -> tuple[float, float]:
    moved = shape.numel() * (1.5 * dtype.itemsize + 1 / 16)
    return moved, moved


def _volume(x: Tensor, module: Any) -> Tensor:
    """Of the channels, each four are levels."""
    y: Tensor = module.max_pool3d(x.unflatten(1, (-1, 4)), 2)
    return y


def _pooled_volume(shape: torch.Size) -> Sequence[int]:
    return shape[0], shape[1] // 4, 2, shape[2] // 2, shape[3] // 2


def _volume_budget(shape: torch.Size, dtype: torch.dtype) -> tuple[float, float]:
    moved = shape.numel() * (1.125 * dtype.itemsize + 1 / 16)
    return moved, moved


OPERATIONS = {
    operation.name: operation
    for operation in (
        *(_operation(window, suffix) for window in WINDOWS for suffix in FORMATS),
        Operation(
            "max_pool1d",
            "pool",
            *(partial(_lines, module=module) for module in (autograd, F)),
            budget=_lines_budget,
            output_shape=_pooled_lines,
        ),
        Operation(
            "max_pool3d",
            "pool",
            *(partial(_volume, module=module) for module in (autograd, F)),
            budget=_volume_budget,
            output_shape=_pooled_volume,
        ),
    )
}


def timed_cases(full: bool) -> list[Case]:
    """The most important first: a time limit cuts the end."""
    everything = each_size(SIZES, DTYPES, OPERATIONS.values())
    possible = [case for case in everything if case.operation.name != "max_pool3d" or case.shape[1] % 4 == 0]
    return possible if full else [case for case in possible if _in_quick_run(case)]


def _in_quick_run(case: Case) -> bool:
    return (case.size == "large" and case.dtype is not torch.float16) or "2x2_channels_last" in case.operation.name


def counted_cases() -> list[Case]:
    return counted(OPERATIONS.values(), DTYPES, COUNTED_SHAPE)


def test_traffic(case: Case, counts: list[dict[str, Any]]) -> None:
    """Windows side by side keep the budget (5% over at most); overlapping ones leave rereading to the caches."""
    for record in counts:
        if record["contestant"] == "fusednn" and "2x2" in case.operation.name:
            assert record["bytes"] <= 1.05 * record["budget_bytes"]
