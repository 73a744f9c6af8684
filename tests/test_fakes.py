"""Where operators are seen: what tracers are told about results is what they make, and autograd asks none of them."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from support.operations import OPERATIONS, Operation
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.filterwarnings("ignore:reduction"),
    pytest.mark.filterwarnings("error:.*autograd kernel was not registered"),
]

#: That no kernel computes: PyTorch's convolution is theirs.
BY_STOCK = tuple(name for name in OPERATIONS if name in vars(nn) and name.startswith("Conv"))


def description(result: Tensor) -> tuple[Any, ...]:
    """What a tracer may rely on: a stride along one element, or of none, says nothing."""
    strides = [stride for size, stride in zip(result.shape, result.stride(), strict=True) if size > 1]
    return tuple(result.shape), result.dtype, str(result.device), strides if result.numel() else []


class Comparing(TorchDispatchMode):
    """Holds each of our operators' results against those of its fake."""

    takes_kernels = True

    def __init__(self) -> None:
        super().__init__()
        self.compared: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "fusednn":
            return func(*args, **(kwargs or {}))
        with FakeTensorMode() as mode:
            fakes = func(*tree_map_only(Tensor, mode.from_tensor, args))
        results = func(*args)
        pairs = zip(*((made,) if isinstance(made, Tensor) else made or () for made in (results, fakes)), strict=True)
        for index, (result, fake) in enumerate(pairs):
            assert description(result) == description(fake), f"result {index} of {func}"
        self.compared.add(func._opname)
        return results


def tensors_of(operation: Operation) -> list[Tensor]:
    parameters = list(operation.ours.parameters()) if isinstance(operation.ours, nn.Module) else []
    return [one for one in (*operation.operands, *parameters) if one.is_floating_point()]


def channels_last(operand: Tensor) -> Tensor:
    return operand.contiguous(memory_format=torch.channels_last) if operand.dim() == 4 else operand


@pytest.mark.parametrize("name", [name for name in OPERATIONS if name not in BY_STOCK])
def test_fakes_are_what_operators_make(name: str) -> None:
    """With the gradients of all operands and parameters, of the first alone, and of all others."""
    plain = Operation(name)
    count, images = len(tensors_of(plain)), any(operand.dim() == 4 for operand in plain.operands)
    parts = {(True,) * count, (True, *[False] * (count - 1)), (False, *[True] * (count - 1))}
    layouts = (torch.Tensor.contiguous, channels_last)[: 1 + images]
    for wanted, change in itertools.product(parts, layouts):
        operation = Operation(name, torch.float32, change=change)
        for tensor, is_wanted in zip(tensors_of(operation), wanted, strict=True):
            tensor.requires_grad_(is_wanted)
        with Comparing() as comparing:
            y = operation.call(operation.ours, operation.operands)
            if y.requires_grad:
                y.sum().backward()
        assert comparing.compared
        assert y.requires_grad == operation.call(operation.stock, operation.operands).requires_grad
