"""What is measured: operations, each ours and stock, on tensors of given shapes and dtypes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .protocol import Direction, NamedCase

__all__ = ["Case", "Inputs", "Operation", "forward", "gradients", "make_inputs"]


def _just_x(x: Tensor) -> tuple[Tensor, ...]:
    return (x.requires_grad_(),)


def _same_shape(shape: torch.Size) -> Sequence[int]:
    return shape


def _no_peers() -> dict[str, Callable[..., Tensor]]:
    return {}


@dataclass(frozen=True)
class Operation:
    """One function in two implementations, ``ours`` and ``stock``, each called as ``f(*operands)``.

    ``budget(shape, dtype)`` are the bytes that (forward, backward) must move.  ``operands(x)`` makes all operands from
    normal numbers x of the case's shape; those that require gradients are differentiated.  ``output_shape`` gives the
    output's shape from x's.  ``check(case, y, gradients, inputs)`` takes the place of the comparison with eager PyTorch
    where results differ from call to call: it returns the error in epsilons, or raises WrongResultError.  ``peers()``
    imports other libraries' implementations, by name: those that are installed.  ``tf32`` sets whether float32 products
    may be TF32's, for all contestants; None leaves PyTorch's defaults.
    """

    name: str
    family: str
    ours: Callable[..., Tensor]
    stock: Callable[..., Tensor]
    budget: Callable[[torch.Size, torch.dtype], tuple[float, float]]
    operands: Callable[[Tensor], tuple[Tensor, ...]] = _just_x
    output_shape: Callable[[torch.Size], Sequence[int]] = _same_shape
    memory_format: torch.memory_format = torch.contiguous_format
    tf32: bool | None = None
    check: Callable[[Case, Tensor, Sequence[Tensor], Inputs], float] | None = None
    peers: Callable[[], dict[str, Callable[..., Tensor]]] = _no_peers


@dataclass(frozen=True)
class Case(NamedCase):
    """An operation on tensors of one shape and dtype; ``size`` names the shape's class (``large``, ``cifar``, ...)."""

    operation: Operation
    dtype: torch.dtype
    size: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return int(torch.Size(self.shape).numel())

    def contestants(self, usual: tuple[str, ...]) -> tuple[str, ...]:
        """Who takes part: the usual ones, and peers that are installed."""
        return (*usual, *self.operation.peers())

    def record(self, contestant: str, direction: Direction) -> dict[str, Any]:
        """What a result file says of the case, whatever was measured."""
        return {
            **self.named(contestant, direction, self.shape),
            "channels_last": self.operation.memory_format in (torch.channels_last, torch.channels_last_3d),
            "tf32": self.operation.tf32,
            "budget_bytes": self.budget(direction),
        }

    def budget(self, direction: Direction) -> float:
        """Bytes that the direction must move: each operand once."""
        forward, backward = self.operation.budget(torch.Size(self.shape), self.dtype)
        return {"forward": forward, "backward": backward, "forward_backward": forward + backward}[direction]


@dataclass(frozen=True)
class Inputs:
    """One set of inputs: the operands, and the gradient of the output."""

    operands: tuple[Tensor, ...]
    g: Tensor

    @property
    def differentiable(self) -> tuple[Tensor, ...]:
        return tuple(operand for operand in self.operands if operand.requires_grad)

    def upcast(self) -> Inputs:
        """The same numbers in float64, for references."""
        return Inputs(tuple(_upcast(operand) for operand in self.operands), self.g.double())


def _upcast(operand: Tensor) -> Tensor:
    if not operand.is_floating_point():
        return operand
    return operand.detach().double().requires_grad_(operand.requires_grad)


def make_inputs(case: Case, device: torch.device, seed: int) -> Inputs:
    """Random numbers: x normal with both signs; g positive, so that sums over it don't cancel to nothing."""
    generator = torch.Generator(device).manual_seed(seed)
    options: dict[str, Any] = {"generator": generator, "device": device, "dtype": torch.float32}
    operation = case.operation
    x = torch.randn(case.shape, **options).mul_(2).to(case.dtype).contiguous(memory_format=operation.memory_format)
    g = torch.rand(tuple(operation.output_shape(x.shape)), **options).add_(0.5).to(case.dtype)
    if g.dim() == x.dim():
        g = g.contiguous(memory_format=operation.memory_format)
    return Inputs(operation.operands(x), g)


def forward(function: Callable[..., Tensor], inputs: Inputs) -> Tensor:
    """The result of a call."""
    return function(*inputs.operands)


def gradients(y: Tensor, inputs: Inputs) -> Sequence[Tensor]:
    """Fresh gradients, added to nothing: as ``backward()`` leaves them where ``.grad`` was None."""
    if not y.requires_grad:
        return ()
    return torch.autograd.grad(y, inputs.differentiable, inputs.g)
