"""How compiled kernels use memory, counted on the virtual GPU for a representative size of each family.

A factor of 1 is all that can be had: sectors that hold nothing but bytes in use, and shared memory without conflicts.
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from vgpu import Counters, counted

from fusednn import autograd

pytestmark = pytest.mark.compiled


def normal(*shape: int, **layout: torch.memory_format) -> Tensor:
    return torch.randn(shape).contiguous(**layout).requires_grad_()


class Waste(NamedTuple):
    """Bytes of sectors for a byte in use, and waves of shared memory for a wave without conflicts."""

    sectors: float
    waves: float


class Case(NamedTuple):
    call: Callable[[], Tensor]
    forward: Waste
    backward: Waste


#: What they waste today.  Small tensors weigh scalars (a mean, a seed, a target) heavily: a sector for 4 or 8 bytes.
CASES = {
    "relu": Case(lambda: autograd.relu(normal(8192)), Waste(1.0, 1.0), Waste(1.0, 1.0)),
    "gelu": Case(lambda: autograd.gelu(normal(8192)), Waste(1.0, 1.0), Waste(1.0, 1.0)),
    "dropout": Case(lambda: autograd.dropout(normal(8192), 0.5, True), Waste(1.01, 1.0), Waste(1.01, 1.0)),
    "softmax of rows": Case(lambda: autograd.softmax(normal(64, 512), 1), Waste(1.0, 1.0), Waste(1.0, 1.0)),
    "softmax of columns": Case(lambda: autograd.softmax(normal(64, 512), 0), Waste(1.0, 6.6), Waste(1.0, 6.6)),
    "cross_entropy": Case(
        lambda: autograd.cross_entropy(normal(64, 512), torch.arange(64)), Waste(1.14, 1.0), Waste(1.12, 1.0)
    ),
    "mse_loss": Case(lambda: autograd.mse_loss(normal(8192), torch.randn(8192)), Waste(1.0, 1.0), Waste(1.0, 1.0)),
    "prelu": Case(lambda: autograd.prelu(normal(4, 16, 16, 16), normal(16)), Waste(1.03, 1.0), Waste(1.02, 1.0)),
    "batch_norm": Case(
        lambda: autograd.batch_norm(normal(8, 16, 16, 16), None, None, normal(16), normal(16), True),
        Waste(1.28, 1.12),
        Waste(1.28, 1.0),
    ),
    "max_pool2d": Case(lambda: autograd.max_pool2d(normal(4, 16, 16, 16), 2), Waste(1.04, 1.0), Waste(1.19, 1.0)),
    "maxout": Case(lambda: autograd.maxout(normal(64, 128), 2), Waste(1.0, 1.0), Waste(1.31, 1.0)),
    "maxout_linear": Case(
        lambda: autograd.maxout_linear(normal(64, 64), normal(2, 64, 64)), Waste(1.44, 6.41), Waste(1.31, 1.0)
    ),
}


def waste(launches: list[Counters]) -> Waste:
    traffic = [each for launch in launches for each in (launch.loads, launch.stores)]
    used, sectors = (sum(each) for each in zip(*((each.bytes_used, each.sectors) for each in traffic), strict=True))
    waves = sum(launch.shared.waves for launch in launches)
    least = sum(launch.shared.least_waves for launch in launches)
    return Waste(32 * sectors / max(used, 1), waves / least if least else 1.0)


@pytest.mark.parametrize("name", CASES)
def test_memory_is_used_as_well_as_ever(name: str) -> None:
    case = CASES[name]
    with counted() as forward:
        y = case.call()
    with counted() as backward:
        y.sum().backward()
    found = (("forward", waste(forward), case.forward), ("backward", waste(backward), case.backward))
    for pass_, now, known in found:
        assert now.sectors <= 1.02 * known.sectors, f"{pass_}: {now}, {known} known"
        assert now.waves <= 1.02 * known.waves, f"{pass_}: {now}, {known} known"
