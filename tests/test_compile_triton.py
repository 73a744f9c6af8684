"""Under ``torch.compile`` where Triton compiles kernels: every operation, forward and backward, is one graph.

In the interpreter kernels are Python, and Dynamo sees other objects than on a GPU.  Here they are Triton's own, which
CPU tensors are told to take, and launches do nothing: what counts is that nothing breaks the graph.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.device import ON_GPU
from support.operations import OPERATIONS, Operation
from torch import Tensor, nn

import fusednn
from fusednn import kernels
from fusednn.autograd.dispatch import Choice, observe_choices
from fusednn.testing import random_tensor

pytestmark = [pytest.mark.compiles, pytest.mark.skipif(ON_GPU, reason="kernels run here, and are tested as they are")]


@pytest.fixture(autouse=True)
def _kernels_that_do_nothing(monkeypatch: pytest.MonkeyPatch, keeps_kernels: None) -> None:
    from triton.runtime import JITFunction

    torch._dynamo.reset()
    monkeypatch.setattr(kernels.base.launch, "ON_CPU", True)
    monkeypatch.setattr(kernels.base.launch, "REMEMBERS", False)
    monkeypatch.setattr(torch.utils._triton, "has_triton", lambda: True)  # there is no driver
    monkeypatch.setattr(JITFunction, "__getitem__", lambda *_: lambda **_: None)


def check_one_graph(function: Callable[..., Any], *operands: Tensor, dynamic: bool = False) -> None:
    """Forward and backward, by a kernel, in one graph."""
    choices: list[Choice] = []
    with observe_choices(choices.append):
        function(*operands)
    assert all(choice.kernel or choice.reason.startswith(("cuDNN", "cuBLAS")) for choice in choices), choices
    y = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")(*operands)
    y = y[0] if isinstance(y, tuple) else y
    if y.requires_grad:
        y.backward(torch.ones_like(y))


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation(name: str, dynamic: bool) -> None:
    operation = Operation(name, torch.float32)
    check_one_graph(operation.ours, *operation.leaves(), dynamic=dynamic)


def test_fused_neighbours() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 8), nn.LeakyReLU(), nn.Dropout(0.5))
    fusednn.replace_layers(model, fuse=True)
    check_one_graph(model, random_tensor((4, 8), torch.float32, "cpu"))
