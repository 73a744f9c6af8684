"""What is measured: operations, each ours and stock, on tensors of given shapes and dtypes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = ["DIRECTIONS", "Case", "Direction", "Inputs", "Operation", "forward", "gradients", "make_inputs"]

Direction = Literal["forward", "backward", "forward_backward"]

#: Forward runs with gradients enabled, so that it saves what training saves.
DIRECTIONS: tuple[Direction, ...] = ("forward", "backward", "forward_backward")

_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}


def _no_parameters(x: Tensor) -> tuple[Tensor, ...]:
    return ()


@dataclass(frozen=True)
class Operation:
    """One function in two implementations, ``ours`` and ``stock``, each called as ``f(x, *parameters)``.

    ``budget(numel, dtype)`` are the bytes that (forward, backward) must move; ``parameters(x)`` makes the learnt
    parameters; ``random`` marks results that differ from call to call, for which ``bounds`` are the slopes' interval.
    """

    name: str
    family: str
    ours: Callable[..., Tensor]
    stock: Callable[..., Tensor]
    budget: Callable[[int, torch.dtype], tuple[float, float]]
    parameters: Callable[[Tensor], tuple[Tensor, ...]] = _no_parameters
    memory_format: torch.memory_format = torch.contiguous_format
    bounds: tuple[float, float] | None = None

    @property
    def random(self) -> bool:
        return self.bounds is not None


@dataclass(frozen=True)
class Case:
    """An operation on tensors of one shape and dtype; ``size`` names the shape's class (``large``, ``cifar``, ...)."""

    operation: Operation
    dtype: torch.dtype
    size: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return int(torch.Size(self.shape).numel())

    @property
    def dtype_name(self) -> str:
        return _NAMES[self.dtype]

    @property
    def id(self) -> str:
        return f"{self.operation.name}-{self.dtype_name}-{self.size}"

    def record(self, contestant: str, direction: Direction) -> dict[str, Any]:
        """What a result file says of the case, whatever was measured."""
        return {
            "family": self.operation.family,
            "operation": self.operation.name,
            "contestant": contestant,
            "direction": direction,
            "dtype": self.dtype_name,
            "size": self.size,
            "shape": list(self.shape),
            "channels_last": self.operation.memory_format is torch.channels_last,
            "budget_bytes": self.budget(direction),
        }

    def budget(self, direction: Direction) -> float:
        """Bytes that the direction must move: each operand once."""
        forward, backward = self.operation.budget(self.numel, self.dtype)
        return {"forward": forward, "backward": backward, "forward_backward": forward + backward}[direction]


@dataclass(frozen=True)
class Inputs:
    """One set of inputs: the input and the parameters, which require gradients, and the gradient of the output."""

    x: Tensor
    parameters: tuple[Tensor, ...]
    g: Tensor

    @property
    def differentiable(self) -> tuple[Tensor, ...]:
        return (self.x, *self.parameters)

    def upcast(self) -> Inputs:
        """The same numbers in float64, for references."""
        double = [tensor.detach().double().requires_grad_() for tensor in self.differentiable]
        return Inputs(double[0], tuple(double[1:]), self.g.double())


def make_inputs(case: Case, device: torch.device, seed: int) -> Inputs:
    """Random numbers: x normal with both signs; g positive, so that sums over it don't cancel to nothing."""
    generator = torch.Generator(device).manual_seed(seed)
    options: dict[str, Any] = {"generator": generator, "device": device, "dtype": torch.float32}
    layout = case.operation.memory_format
    x = torch.randn(case.shape, **options).mul_(2).to(case.dtype).contiguous(memory_format=layout)
    g = torch.rand(case.shape, **options).add_(0.5).to(case.dtype).contiguous(memory_format=layout)
    parameters = tuple(parameter.requires_grad_() for parameter in case.operation.parameters(x))
    return Inputs(x.requires_grad_(), parameters, g)


def forward(function: Callable[..., Tensor], inputs: Inputs) -> Tensor:
    return function(inputs.x, *inputs.parameters)


def gradients(y: Tensor, inputs: Inputs) -> Sequence[Tensor]:
    """Fresh gradients, added to nothing: as ``backward()`` leaves them where ``.grad`` was None."""
    return torch.autograd.grad(y, inputs.differentiable, inputs.g)
