"""The comparison that needs no GPU: bytes moved and kernels launched, ours in Triton's interpreter against eager's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .cases import Case, Direction, forward, gradients, make_inputs
from .validity import check

__all__ = ["count_case"]


def count_case(case: Case) -> list[dict[str, Any]]:
    """Records of (fusednn, eager) x (forward, backward), after checking fusednn's results.

    Eager's ATen operators count as one launch each.  Where fusednn calls ATen operators beside its kernels, they and
    their bytes count too.
    """
    inputs = make_inputs(case, torch.device("cpu"), seed=0)
    error = check(case, case.operation.ours, inputs)
    records = []
    for name, function in (("fusednn", case.operation.ours), ("eager", case.operation.stock)):
        for direction, counts in _count(case, function).items():
            records.append(
                {
                    **case.record(name, direction),
                    "elements": case.numel,
                    **counts,
                    **({"error_epsilons": error} if name == "fusednn" else {}),
                }
            )
    return records


def _count(case: Case, function: Callable[..., Tensor]) -> dict[Direction, dict[str, int]]:
    from fusednn.kernels.instruments.traffic import Traffic, measure_traffic

    inputs = make_inputs(case, torch.device("cpu"), seed=0)
    with measure_traffic() as ahead:
        y = forward(function, inputs)
    with measure_traffic() as back:
        gradients(y, inputs)
    measured: dict[Direction, Traffic] = {"forward": ahead, "backward": back}
    return {
        direction: {
            "bytes": traffic.bytes + traffic.aten_bytes,
            "launches": traffic.launches + traffic.aten_operations,
            "kernel_launches": traffic.launches,
            "aten_operations": traffic.aten_operations,
        }
        for direction, traffic in measured.items()
    }
