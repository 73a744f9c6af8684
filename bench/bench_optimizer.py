"""The optimizers, on the parameters of ResNet-50 and of a transformer of a billion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fusednn_bench.replay import device_clock, replay
from fusednn_bench.steps import StepCase, StepOperation

SIZES: dict[str, tuple[tuple[int, ...], ...]] = {
    network: tuple(map(tuple, shapes))
    for network, shapes in json.loads((Path(__file__).parent / "parameter_lists.json").read_text()).items()
}
COUNTED_SHAPES = ((64, 64), (4096,))  # whole tiles; the interpreter is slow

OPERATIONS = {
    operation.name: operation
    for operation in (
        StepOperation("adamw", "AdamW", "adam"),
        StepOperation("sgd_momentum", "SGD", "sgd_momentum", {"momentum": 0.9}),
        StepOperation("rmsprop", "RMSprop", "rmsprop", checked_lr=0.05),
        StepOperation("adam", "Adam", "adam"),
        StepOperation("nadam", "NAdam", "nadam"),
        StepOperation("adagrad", "Adagrad", "adagrad"),
        StepOperation("adadelta", "Adadelta", "adadelta", checked_lr=100.0),
        StepOperation("adamax", "Adamax", "adamax"),
        StepOperation("radam", "RAdam", "radam"),
    )
}
QUICK = ("adamw", "sgd_momentum", "rmsprop")


def timed_cases(full: bool) -> list[StepCase]:
    """The most important first: a time limit cuts the end."""
    return [
        StepCase(operation, dtype, size, shapes)
        for dtype in (torch.float32, torch.bfloat16)
        for size, shapes in SIZES.items()
        for operation in OPERATIONS.values()
        if full or (operation.name in QUICK and dtype is torch.float32)
    ]


def counted_cases() -> list[StepCase]:
    return [
        StepCase(operation, dtype, "counted", COUNTED_SHAPES)
        for operation in OPERATIONS.values()
        for dtype in (torch.bfloat16, torch.float32)
    ]


@pytest.mark.benchmark(timer=device_clock)
def test_device_time(case: StepCase, contestant: str, device_samples: dict[str, list[float]], benchmark: Any) -> None:
    benchmark.group = case.id
    benchmark.extra_info["budget_bytes"] = case.budget()
    replay(benchmark, device_samples["step"])


def test_traffic(case: StepCase, counts: list[dict[str, Any]]) -> None:
    """Bytes within the budget: 5 % over at most."""
    (ours,) = (record for record in counts if record["contestant"] == "fusednn")
    assert ours["bytes"] <= 1.05 * ours["budget_bytes"]
