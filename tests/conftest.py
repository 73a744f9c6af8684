"""Which tests run where.

The suite has three modes on a machine without a GPU: with ``TRITON_INTERPRET=1`` kernels run in the interpreter; with
``FUSEDNN_VGPU=80`` (or 90) they run compiled, on the virtual GPU; with neither CPU tensors take the stock path, and
kernels are compiled ahead of time.  On a GPU it runs once, on CUDA tensors.  Tests that have nothing to say in a mode
are deselected, so that a skip always means something.
"""

from collections.abc import Iterator

import pytest
import torch
from support.compiled import ARCHITECTURE, MISSING
from support.device import DEVICE, KERNELS_RUN, ON_GPU
from support.sample import beyond_each_choice, is_of_part, part_of

import fusednn
from fusednn.autograd.decisions import forget_decisions
from fusednn.autograd.operators import forget_plans
from fusednn.kernels import AVAILABLE, INTERPRETING, WHERE

#: These need Triton to be imported at all.
collect_ignore_glob = [] if AVAILABLE else ["test_vgpu_*.py", "test_compiled*.py"]

_RUNS = {
    "kernels": KERNELS_RUN,
    "interpreter": INTERPRETING,
    "compiled": bool(ARCHITECTURE),
    "compiles": AVAILABLE and not INTERPRETING and not ARCHITECTURE,
    "gpu": ON_GPU,
    "stock": not KERNELS_RUN,
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--part", type=part_of, metavar="K/N", help="run the K-th of N parts of the tests")


@pytest.hookimpl(tryfirst=True)  # before -m looks for what is of a grid
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if ARCHITECTURE and MISSING:
        for item in items:
            item.add_marker(pytest.mark.skip(reason=MISSING))
        return
    idle = [item for item in items if any(item.get_closest_marker(name) and not runs for name, runs in _RUNS.items())]
    config.hook.pytest_deselected(items=idle)
    left_out = set(idle)
    items[:] = [item for item in items if item not in left_out]
    sampled = (item for item in items if not any(map(item.get_closest_marker, ("thorough", "whole"))))
    for item in beyond_each_choice(sampled):
        item.add_marker(pytest.mark.grid)
    if part := config.getoption("--part"):
        config.hook.pytest_deselected(items=[item for item in items if not is_of_part(item.nodeid, part)])
        items[:] = [item for item in items if is_of_part(item.nodeid, part)]


def pytest_report_header() -> str:
    where = f"run {WHERE}" if KERNELS_RUN else "don't run: stock path"
    return f"fusednn kernels {where}{f', compiled for sm_{ARCHITECTURE}' if ARCHITECTURE else ''}"


@pytest.fixture
def device() -> str:
    return DEVICE


@pytest.fixture
def keeps_kernels() -> Iterator[None]:
    """Compiled code takes every kernel, also for what the compiler fuses by itself."""
    with fusednn.compile_policy("keep"):
        yield


@pytest.fixture(autouse=True)
def _anew() -> None:
    """The same random numbers in every test, kernels for tensors of any size, and nothing remembered of others."""
    fusednn.always_kernels()
    torch.manual_seed(0)
    forget_decisions()
    forget_plans()
