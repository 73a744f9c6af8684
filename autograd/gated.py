"""Gates: activation(gate) * other, of two tensors or of the halves of one, and GLU; gates of channels; highways.

Dauphin et al., "Language Modeling with Gated Convolutional Networks" (ICML 2017); Shazeer, "GLU Variants Improve
Transformer" (2020); Hu, Shen, Sun, "Squeeze-and-Excitation Networks" (CVPR 2018); Srivastava, Greff, Schmidhuber,
"Highway Networks" (2015).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..kernels import gated as kernels
from ..kernels import gated_channels as channels
from ..kernels import gated_highway as highways
from ..kernels.base.layout import is_dense
from ..kernels.functions.activation import Activated, activated
from . import stock as F
from .activation import resolve_activation, stock_activation
from .decisions import decided_once
from .dispatch import is_integer, takes_kernel
from .function import Function
from .gradients import stock_gradients
from .operators import operator

__all__ = ["CHANNEL_GATES", "GATES", "HIGHWAY_GATES", "gated", "gated_channels", "gated_halves", "glu", "highway"]

#: The activations that kernels gate with.
GATES = kernels.GATES
#: Those that they gate channels with.
CHANNEL_GATES = channels.CHANNEL_GATES
#: Those of highways.
HIGHWAY_GATES = highways.HIGHWAY_GATES


@operator(
    "gated(Tensor gate, Tensor other, str name, float a, float b) -> Tensor",
    fake=lambda gate, other, name, a, b: torch.empty_like(gate),
)
def _forward(gate: Tensor, other: Tensor, name: str, a: float, b: float) -> Tensor:
    return kernels.gated_forward(gate, other, activated(name, a, b))


@operator(
    "gated_backward(Tensor g, Tensor gate, Tensor other, str name, float a, float b) -> (Tensor, Tensor)",
    fake=lambda g, gate, other, name, a, b: (torch.empty_like(gate), torch.empty_like(gate)),
)
def _backward(g: Tensor, gate: Tensor, other: Tensor, name: str, a: float, b: float) -> tuple[Tensor, Tensor]:
    return kernels.gated_backward(g, gate, other, activated(name, a, b))


def _fake_half(x: Tensor, dim: int, name: str, a: float, b: float, gate_first: bool) -> Tensor:
    x = x if is_dense(x) else torch.empty_like(x)
    shape = [size // 2 if i == dim else size for i, size in enumerate(x.shape)]
    return x.new_empty_strided(shape, kernels.halved_strides(x, dim))


@operator("gated_halves(Tensor x, int dim, str name, float a, float b, bool gate_first) -> Tensor", fake=_fake_half)
def _halves_forward(x: Tensor, dim: int, name: str, a: float, b: float, gate_first: bool) -> Tensor:
    return kernels.gated_halves_forward(x, dim, activated(name, a, b), gate_first)


@operator(
    "gated_halves_backward(Tensor g, Tensor x, int dim, str name, float a, float b, bool gate_first) -> Tensor",
    fake=lambda g, x, dim, name, a, b, gate_first: torch.empty_like(x),
)
def _halves_backward(g: Tensor, x: Tensor, dim: int, name: str, a: float, b: float, gate_first: bool) -> Tensor:
    return kernels.gated_halves_backward(g, x, dim, activated(name, a, b), gate_first)


@operator(
    "gated_channels(Tensor x, Tensor gate, str name, float a, float b) -> Tensor",
    fake=lambda x, gate, name, a, b: torch.empty_like(x),
)
def _channels_forward(x: Tensor, gate: Tensor, name: str, a: float, b: float) -> Tensor:
    return channels.gated_channels_forward(x, gate, activated(name, a, b))


@operator(
    "gated_channels_backward(Tensor g, Tensor x, Tensor gate, str name, float a, float b) -> (Tensor, Tensor)",
    fake=lambda g, x, gate, name, a, b: (torch.empty_like(x), gate.new_empty(gate.shape)),
)
def _channels_backward(g: Tensor, x: Tensor, gate: Tensor, name: str, a: float, b: float) -> tuple[Tensor, Tensor]:
    return channels.gated_channels_backward(g, x, gate, activated(name, a, b))


@operator(
    "highway(Tensor gate, Tensor transformed, Tensor carried, str name, float a, float b) -> Tensor",
    fake=lambda gate, transformed, carried, name, a, b: torch.empty_like(gate),
)
def _highway_forward(gate: Tensor, transformed: Tensor, carried: Tensor, name: str, a: float, b: float) -> Tensor:
    return highways.highway_forward(gate, transformed, carried, activated(name, a, b))


@operator(
    "highway_backward(Tensor g, Tensor gate, Tensor transformed, Tensor carried, str name, float a, float b)"
    " -> (Tensor, Tensor, Tensor)",
    fake=lambda g, gate, *_: tuple(torch.empty_like(gate) for _ in range(3)),
)
def _highway_backward(
    g: Tensor, gate: Tensor, transformed: Tensor, carried: Tensor, name: str, a: float, b: float
) -> tuple[Tensor, Tensor, Tensor]:
    return highways.highway_backward(g, gate, transformed, carried, activated(name, a, b))


class Gated(Function):
    """Saves the gate and the other operand; one pass gives both gradients."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, other: Tensor, activation: Activated) -> Tensor:
        ctx.save_for_backward(gate, other)
        ctx.activation = activation
        y: Tensor = _forward(gate, other, *activation.arguments)
        return y

    @staticmethod
    def recipe(ctx: Any) -> Callable[..., Tensor]:
        activation = ctx.activation
        return lambda gate, other: _forward(gate, other, *activation.arguments)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        gate, other = ctx.saved_tensors
        needed = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled():
            dgate, dother = stock_gradients(
                lambda gate, other: stock_activation(gate, ctx.activation) * other, (gate, other), needed, g
            )
        else:
            dgate, dother = _backward(g, gate, other, *ctx.activation.arguments)
        return dgate if needed[0] else None, dother if needed[1] else None, None


class GatedHalves(Function):
    """Saves the input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, activation: Activated, gate_first: bool) -> Tensor:
        ctx.save_for_backward(x)
        ctx.arguments = (dim, activation, gate_first)
        y: Tensor = _halves_forward(x, dim, *activation.arguments, gate_first)
        return y

    @staticmethod
    def recipe(ctx: Any) -> Callable[..., Tensor]:
        dim, activation, gate_first = ctx.arguments
        return lambda x: _halves_forward(x, dim, *activation.arguments, gate_first)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, None, None, None]:
        (x,) = ctx.saved_tensors
        dim, activation, gate_first = ctx.arguments
        if torch.is_grad_enabled():
            (dx,) = stock_gradients(lambda x: _stock_halves(x, *ctx.arguments), (x,), (True,), g)
        else:
            dx = _halves_backward(g, x, dim, *activation.arguments, gate_first)
        return dx, None, None, None


class GatedChannels(Function):
    """Saves the input and the gate; one pass gives both gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, activation: Activated) -> Tensor:
        ctx.save_for_backward(x, gate)
        ctx.activation = activation
        y: Tensor = _channels_forward(x, gate, *activation.arguments)
        return y

    @staticmethod
    def recipe(ctx: Any) -> Callable[..., Tensor]:
        activation = ctx.activation
        return lambda x, gate: _channels_forward(x, gate, *activation.arguments)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, gate = ctx.saved_tensors
        needed = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled():
            dx, dgate = stock_gradients(
                lambda x, gate: x * stock_activation(gate, ctx.activation), (x, gate), needed, g
            )
        else:
            dx, dgate = _channels_backward(g, x, gate, *ctx.activation.arguments)
        return dx if needed[0] else None, dgate if needed[1] else None, None


class Highway(Function):
    """Saves the operands; one pass gives all three gradients."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, transformed: Tensor, carried: Tensor, activation: Activated) -> Tensor:
        ctx.save_for_backward(gate, transformed, carried)
        ctx.activation = activation
        y: Tensor = _highway_forward(gate, transformed, carried, *activation.arguments)
        return y

    @staticmethod
    def recipe(ctx: Any) -> Callable[..., Tensor]:
        activation = ctx.activation
        return lambda *operands: _highway_forward(*operands, *activation.arguments)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        operands, needed = ctx.saved_tensors, ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            found = stock_gradients(lambda gate, h, x: _stock_highway(gate, h, x, ctx.activation), operands, needed, g)
        else:
            found = _highway_backward(g, *operands, *ctx.activation.arguments)
        return *(gradient if need else None for gradient, need in zip(found, needed, strict=True)), None


def _stock_highway(gate: Tensor, transformed: Tensor, carried: Tensor, activation: Activated) -> Tensor:
    t = stock_activation(gate, activation)
    return t * transformed + (1 - t) * carried


def _stock_halves(x: Tensor, dim: int, activation: Activated, gate_first: bool) -> Tensor:
    first, second = x.chunk(2, dim)
    gate, other = (first, second) if gate_first else (second, first)
    return stock_activation(gate, activation) * other


def gated(gate: Tensor, other: Tensor, activation: str = "silu") -> Tensor:
    """activation(gate) * other: SwiGLU's gate with "silu", GEGLU's with "gelu" or "gelu_tanh".

    ``activation`` is a name of `fusednn.autograd`'s activations; kernels have "gelu", "gelu_tanh", "relu", "sigmoid"
    and "silu", and tensors of the same shape and dtype.  Others take PyTorch's operators, which also broadcast.  Saves
    the gate and ``other``: 3 elements are moved forward for each of the result, 5 backward.
    """
    y: Tensor = _gated(gate, other, activation)
    return y


@decided_once
def _gated(gate: Tensor, other: Tensor, activation: str) -> Callable[..., Tensor]:
    resolved = resolve_activation(activation)

    def refusal() -> str | None:
        if activation not in kernels.GATES:
            return f"no kernel gates with {activation}"
        if gate is other:
            return "the gate is what it gates"
        if gate.shape != other.shape:
            return "gate and operand differ in shape"
        if not is_dense(gate) or gate.stride() != other.stride():
            return "memory that isn't walked alike"  # PyTorch's operators need no copy
        return None

    if not isinstance(other, Tensor) or not takes_kernel("gated", gate, other, refusal=refusal):
        return lambda gate, other, _: stock_activation(gate, resolved) * other
    if torch.is_grad_enabled() and (gate.requires_grad or other.requires_grad):
        return lambda gate, other, _: Gated.apply(gate, other, resolved)
    return lambda gate, other, _: _forward(gate, other, *resolved.arguments)


def gated_halves(input: Tensor, dim: int = -1, activation: str = "sigmoid", *, gate_first: bool = False) -> Tensor:
    """activation(gate) * other, the halves of one tensor along ``dim``: first the other, then the gate, as in GLU.

    ``gate_first``: the other way round, as where one matrix product makes the gate and what it gates.  Activations as
    of `gated`.  Saves the input, and writes one gradient.
    """
    y: Tensor = _halves("gated_halves", input, dim, activation, gate_first)
    return y


def glu(input: Tensor, dim: int = -1) -> Tensor:
    """first * sigmoid(second), of the halves along ``dim``.  As `torch.nn.functional.glu`; saves the input."""
    y: Tensor = _halves("glu", input, dim, "sigmoid", False)
    return y


@decided_once
def _halves(operation: str, input: Tensor, dim: int, activation: str, gate_first: bool) -> Callable[..., Tensor]:
    resolved = resolve_activation(activation)
    if not takes_kernel(operation, input, refusal=lambda: _halves_refusal(input, dim, activation)):
        if operation == "glu":
            return lambda _, input, dim, *__: F.glu(input, dim)
        return lambda _, input, *__: _stock_halves(input, dim, resolved, gate_first)
    place = dim % input.dim()
    if torch.is_grad_enabled() and input.requires_grad:
        return lambda _, input, *__: GatedHalves.apply(input, place, resolved, gate_first)
    return lambda _, input, *__: _halves_forward(input, place, *resolved.arguments, gate_first)


def highway(gate: Tensor, transformed: Tensor, carried: Tensor, activation: str = "sigmoid") -> Tensor:
    """t * transformed + (1 - t) * carried, where t = activation(gate): how far a layer transforms what it is given.

    Kernels have "sigmoid" and "hardsigmoid", and operands of one shape; others take PyTorch's operators.  Saves the
    operands: 4 elements are moved forward for each of the result, 7 backward.
    """
    y: Tensor = _highway(gate, transformed, carried, activation)
    return y


@decided_once
def _highway(gate: Tensor, transformed: Tensor, carried: Tensor, activation: str) -> Callable[..., Tensor]:
    resolved = resolve_activation(activation)
    operands = (gate, transformed, carried)

    def refusal() -> str | None:
        if activation not in HIGHWAY_GATES:
            return f"no kernel has highways with {activation}"
        return None if gate.shape == transformed.shape == carried.shape else "operands differ in shape"

    if not all(isinstance(one, Tensor) for one in operands) or not takes_kernel("highway", *operands, refusal=refusal):
        return lambda gate, transformed, carried, _: _stock_highway(gate, transformed, carried, resolved)
    if torch.is_grad_enabled() and any(one.requires_grad for one in operands):
        return lambda gate, transformed, carried, _: Highway.apply(gate, transformed, carried, resolved)
    return lambda gate, transformed, carried, _: _highway_forward(gate, transformed, carried, *resolved.arguments)


def gated_channels(input: Tensor, gate: Tensor, activation: str = "sigmoid") -> Tensor:
    """input * activation(gate): each channel of (N, C, ...) scaled by its element of a gate of (N, C, 1, ...).

    Kernels have "sigmoid" and "hardsigmoid", and tensors that are contiguous or channels last; others take PyTorch's
    operators.  Saves both: 2 elements are moved forward for each of the result, 3 backward.
    """
    y: Tensor = _gated_channels(input, gate, activation)
    return y


@decided_once
def _gated_channels(input: Tensor, gate: Tensor, activation: str) -> Callable[..., Tensor]:
    resolved = resolve_activation(activation)

    def refusal() -> str | None:
        if activation not in CHANNEL_GATES:
            return f"no kernel gates channels with {activation}"
        if input.dim() < 3 or gate.shape != (*input.shape[:2], *(1 for _ in input.shape[2:])):
            return "the gate hasn't one element for each sample's channel"
        if not input.numel():
            return "no elements"
        return None if channels.lines_of_channels(input) else "neither contiguous nor channels last"

    if not isinstance(gate, Tensor) or not takes_kernel("gated_channels", input, gate, refusal=refusal):
        return lambda input, gate, _: input * stock_activation(gate, resolved)
    if torch.is_grad_enabled() and (input.requires_grad or gate.requires_grad):
        return lambda input, gate, _: GatedChannels.apply(input, gate, resolved)
    return lambda input, gate, _: _channels_forward(input, gate, *resolved.arguments)


def _halves_refusal(input: Tensor, dim: int, activation: str) -> str | None:
    if activation not in kernels.GATES:
        return f"no kernel gates with {activation}"
    if not is_integer(dim) or not -input.dim() <= dim < input.dim():
        return "there is no such dimension"
    return "its size is odd" if input.shape[dim] % 2 else None
