"""The comparison that needs no GPU: bytes moved and kernels launched, ours in Triton's interpreter against eager's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor

from .cases import Case, forward, gradients, make_inputs
from .protocol import Direction
from .validity import check

if TYPE_CHECKING:
    from ..instruments.traffic import Traffic

__all__ = ["count_case", "counts_of", "operators_of_cuda"]


def count_case(case: Case, *, checked: bool = True) -> list[dict[str, Any]]:
    """Records of (fusednn, eager) x (forward, backward), after checking fusednn's results, where that isn't left out.

    Eager's ATen operators count as one launch each.  Where fusednn calls ATen operators beside its kernels, they and
    their bytes count too.
    """
    errors = {}
    if checked:
        inputs = make_inputs(case, torch.device("cpu"), seed=0)
        errors["error_epsilons"] = check(case, case.operation.ours, inputs)
    records = []
    for name, function in (("fusednn", case.operation.ours), ("eager", case.operation.stock)):
        for direction, counts in _count(case, function).items():
            records.append(
                {
                    **case.record(name, direction),
                    "elements": case.numel,
                    **counts,
                    **(errors if name == "fusednn" else {}),
                }
            )
    return records


@contextmanager
def operators_of_cuda() -> Iterator[None]:
    """Let dropout be the one operator that it is on a GPU: PyTorch's for CPUs is a chain of three."""

    composed = torch._VF.dropout

    def dropout(x: Tensor, p: float, training: bool) -> Tensor:
        y: Tensor = torch.native_dropout(x, p, training)[0] if training and 0 < p < 1 else composed(x, p, training)
        return y

    with mock.patch.object(torch._VF, "dropout", dropout, create=True):
        yield


def _count(case: Case, function: Callable[..., Tensor]) -> dict[Direction, dict[str, int]]:
    from ..instruments.saved_tensors import saved_tensors
    from ..instruments.traffic import measure_traffic

    inputs = make_inputs(case, torch.device("cpu"), seed=0)
    with operators_of_cuda(), measure_traffic() as ahead, saved_tensors() as census:
        y = forward(function, inputs)
    saved = census.bytes
    with measure_traffic() as back:
        gradients(y, inputs)
    return {"forward": {**counts_of(ahead), "saved_bytes": saved}, "backward": counts_of(back)}


def counts_of(traffic: Traffic) -> dict[str, int]:
    """What a record says of the traffic: of our kernels, and of ATen's operators."""
    return {
        "bytes": traffic.bytes + traffic.aten_bytes,
        "launches": traffic.launches + traffic.aten_operations,
        "kernel_launches": traffic.launches,
        "aten_operations": traffic.aten_operations,
    }
