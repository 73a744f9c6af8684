"""Operators of ``torch.ops.fusednn`` are called where something sees them, and only there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support.operations import OPERATIONS, Operation
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fusednn import autograd
from fusednn.testing import LAYOUTS

pytestmark = pytest.mark.kernels


@pytest.fixture
def dispatched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of our operators that reach PyTorch's dispatcher."""
    names = []
    call = torch._ops.OpOverload.__call__

    def noted(self: Any, /, *arguments: Any, **options: Any) -> Any:
        if self.namespace == "fusednn":
            names.append(self._opname)
        return call(self, *arguments, **options)

    monkeypatch.setattr(torch._ops.OpOverload, "__call__", noted)
    return names


def step(device: str) -> tuple[Tensor, Tensor]:
    x = torch.linspace(-1, 1, 6, device=device, requires_grad=True)
    y = autograd.gelu(x)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    return y.detach(), dx


class Watching(TorchDispatchMode):
    takes_kernels = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class WatchingFunctions(TorchFunctionMode):
    takes_kernels = True

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@contextmanager
def profiling() -> Iterator[None]:
    with torch.profiler.profile() as profile:
        yield
    assert {"fusednn::activation", "fusednn::activation_backward"} <= {event.key for event in profile.key_averages()}


def test_not_where_nothing_looks(device: str, dispatched: list[str]) -> None:
    step(device)
    assert not dispatched


@pytest.mark.parametrize("listener", [Watching, WatchingFunctions, profiling])
def test_where_something_looks(listener: Callable[[], Any], device: str, dispatched: list[str]) -> None:
    """Also after many calls that nothing saw."""
    expected = [step(device) for _ in range(5)][-1]
    assert not dispatched
    with listener():
        found = step(device)
    assert "activation" in dispatched
    # PyTorch's own call of the engine is a function that a mode sees: nothing below it is.
    assert listener is WatchingFunctions or "activation_backward" in dispatched
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


class Subclass(Tensor):
    """Sees what its elements meet."""

    seen: list[str]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(str(func))
        return super().__torch_function__(func, types, args, kwargs)


def backward(upstream: Callable[[Tensor], Tensor], device: str) -> tuple[Tensor, Tensor]:
    """The gradient from an upstream gradient, and from the same as a plain tensor."""
    x = torch.linspace(-1, 1, 6, device=device, requires_grad=True)
    y = autograd.gelu(x)
    gradient = upstream(torch.arange(6.0, device=device))
    plain = gradient.as_subclass(Tensor).resolve_neg() + 0
    found, expected = (torch.autograd.grad(y, x, g, retain_graph=True)[0] for g in (gradient, plain))
    return found, expected


def test_gradients_that_are_negated_when_they_are_read(device: str, dispatched: list[str]) -> None:
    found, expected = backward(torch._neg_view, device)
    assert torch.equal(found, expected)
    assert dispatched == ["activation_backward"]


@pytest.mark.parametrize("name", OPERATIONS)
def test_gradients_without_memory(name: str) -> None:
    """As PyTorch makes them of results that nothing depends on; of images in both layouts."""
    images = any(operand.dim() == 4 for operand in Operation(name).operands)
    for layout in ("contiguous", "channels_last")[: 1 + images]:
        operation = Operation(name, torch.float32, change=lambda x, to=LAYOUTS[layout]: to(x) if x.dim() == 4 else x)
        leaves = operation.leaves()
        y = operation.call(operation.ours, leaves)
        wanted = [one for one in leaves if one.requires_grad]
        if y.requires_grad and wanted:
            g = torch._efficientzerotensor(y.shape, dtype=y.dtype, device=y.device)
            for found in torch.autograd.grad(y, wanted, g, allow_unused=True):
                assert found is None or not found.any()


@pytest.mark.parametrize("name", OPERATIONS)
def test_operands_without_memory(name: str) -> None:
    """They are zeros like any others."""

    results = []
    for zeros in (torch.zeros, torch._efficientzerotensor):
        operation = Operation(name, torch.float32)
        operands = [
            zeros(x.shape, dtype=x.dtype, device=x.device) if x.is_floating_point() else x for x in operation.operands
        ]
        results.append(operation.call(operation.ours, operands) + 0)
    torch.testing.assert_close(*results, rtol=0, atol=0, equal_nan=True)


def test_gradients_of_a_subclass(device: str) -> None:
    Subclass.seen = []
    found, expected = backward(lambda g: g.as_subclass(Subclass), device)
    assert torch.equal(found.as_subclass(Tensor), expected)
    assert any("activation_backward" in name for name in Subclass.seen)


def test_batched_gradients(device: str) -> None:
    x = torch.linspace(-1, 1, 6, device=device, requires_grad=True)
    y = autograd.gelu(x)
    upstream = torch.eye(6, device=device)
    (batched,) = torch.autograd.grad(y, x, upstream, is_grads_batched=True, retain_graph=True)
    for g, found in zip(upstream, batched, strict=True):
        assert torch.equal(torch.autograd.grad(y, x, g, retain_graph=True)[0], found)
