"""Which tests run where.

The suite runs twice on a machine without a GPU: with ``TRITON_INTERPRET=1``, where kernels run in the interpreter, and
without, where CPU tensors take the stock path and kernels are compiled ahead of time.  On a GPU it runs once, on CUDA
tensors.  Tests that have nothing to say in a mode are deselected, so that a skip always means something.
"""

import pytest
import torch
from support.device import DEVICE, KERNELS_RUN, ON_GPU

from fusednn.kernels import AVAILABLE, INTERPRETING

_RUNS = {
    "kernels": KERNELS_RUN,
    "compiles": AVAILABLE and not INTERPRETING,
    "gpu": ON_GPU,
    "stock": not KERNELS_RUN,
}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    idle = [item for item in items if any(item.get_closest_marker(name) and not runs for name, runs in _RUNS.items())]
    config.hook.pytest_deselected(items=idle)
    items[:] = [item for item in items if item not in set(idle)]


def pytest_report_header() -> str:
    where = torch.cuda.get_device_name() if ON_GPU else "the interpreter" if KERNELS_RUN else "nowhere: stock path"
    return f"fusednn kernels run on {where}"


@pytest.fixture
def device() -> str:
    return DEVICE


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
