"""What eager PyTorch does at a shape, without doing it: bytes of its ATen operators, operations of its products.

The operators run on tensors without memory.  They are those of PyTorch for CPUs, but for dropout.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from .cases import Case, forward, gradients, make_inputs
from .counting import operators_of_cuda
from .protocol import Direction

__all__ = ["Work", "eager_work"]


class Work(NamedTuple):
    """Bytes read and written, and operations of matrix products and convolutions: 2 for each product and its sum."""

    bytes: int
    operations: int

    def __add__(self, other: object) -> Work:
        assert isinstance(other, Work)
        return Work(self.bytes + other.bytes, self.operations + other.operations)


@cache
def eager_work(case: Case) -> dict[Direction, Work]:
    """Of a call in each direction."""
    from ..instruments.traffic import measure_traffic

    with FakeTensorMode(), operators_of_cuda():
        inputs = make_inputs(case, torch.device("cpu"), seed=0)
        with FlopCounterMode(display=False) as products, measure_traffic() as traffic:
            y = forward(case.operation.stock, inputs)
        ahead = Work(traffic.aten_bytes, products.get_total_flops())
        with FlopCounterMode(display=False) as products, measure_traffic() as traffic:
            gradients(y, inputs)
        back = Work(traffic.aten_bytes, products.get_total_flops())
    return {"forward": ahead, "backward": back, "forward_backward": ahead + back}
