"""Gates: activation(gate) * other, of two tensors or of the halves of one, and GLU; gates of channels; highways.

Dauphin et al., "Language Modeling with Gated Convolutional Networks" (ICML 2017); Shazeer, "GLU Variants Improve
Transformer" (2020); Hu, Shen, Sun, "Squeeze-and-Excitation Networks" (CVPR 2018); Srivastava, Greff, Schmidhuber,
"Highway Networks" (2015).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels import gated as kernels
from ..kernels import gated_channels as channels
from ..kernels import gated_highway as highways
from ..kernels.base.layout import is_dense
from ..kernels.functions.activation import Activated, activated
from . import stock as F
from .activation import activation_operator, resolve_activation, stock_activation
from .decisions import decided_once
from .dispatch import Refusal, is_integer, takes_kernel
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


_forward = activation_operator("gated(Tensor gate, Tensor other, ACTIVATION) -> Tensor", kernels.gated_forward)
_backward = activation_operator(
    "gated_backward(Tensor g, Tensor gate, Tensor other, ACTIVATION) -> (Tensor, Tensor)",
    kernels.gated_backward,
    fake=lambda g, gate, *_: (torch.empty_like(gate), torch.empty_like(gate)),
)
_channels_forward = activation_operator(
    "gated_channels(Tensor x, Tensor gate, ACTIVATION) -> Tensor", channels.gated_channels_forward
)
_channels_backward = activation_operator(
    "gated_channels_backward(Tensor g, Tensor x, Tensor gate, ACTIVATION) -> (Tensor, Tensor)",
    channels.gated_channels_backward,
    fake=lambda g, x, gate, *_: (torch.empty_like(x), gate.new_empty(gate.shape)),
)
_highway_forward = activation_operator(
    "highway(Tensor gate, Tensor transformed, Tensor carried, ACTIVATION) -> Tensor", highways.highway_forward
)
_highway_backward = activation_operator(
    "highway_backward(Tensor g, Tensor gate, Tensor transformed, Tensor carried, ACTIVATION)"
    " -> (Tensor, Tensor, Tensor)",
    highways.highway_backward,
    fake=lambda g, gate, *_: tuple(torch.empty_like(gate) for _ in range(3)),
)


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


class _Kind(NamedTuple):
    """A gate: its operator, that of its gradients, what PyTorch computes in their place, and its kernels' names."""

    forward: Callable[..., Tensor]
    backward: Callable[..., tuple[Tensor, ...]]
    stock: Callable[..., Tensor]
    activations: Sequence[str]
    does: str


def _stock_gated(activation: Activated, gate: Tensor, other: Tensor, *_: object) -> Tensor:
    return stock_activation(gate, activation) * other


def _stock_channels(activation: Activated, x: Tensor, gate: Tensor, *_: object) -> Tensor:
    return x * stock_activation(gate, activation)


def _stock_highway(activation: Activated, gate: Tensor, transformed: Tensor, carried: Tensor, *_: object) -> Tensor:
    t = stock_activation(gate, activation)
    return t * transformed + (1 - t) * carried


_KINDS = {
    "gated": _Kind(_forward, _backward, _stock_gated, GATES, "gates"),
    "gated_channels": _Kind(_channels_forward, _channels_backward, _stock_channels, CHANNEL_GATES, "gates channels"),
    "highway": _Kind(_highway_forward, _highway_backward, _stock_highway, HIGHWAY_GATES, "has highways"),
}


class Gated(Function):
    """Saves the operands of a gate of this kind; one pass gives the gradients of all."""

    @staticmethod
    def forward(ctx: Any, kind: str, activation: Activated, *operands: Tensor) -> Tensor:
        ctx.save_for_backward(*operands)
        ctx.kind, ctx.activation = kind, activation
        return _KINDS[kind].forward(*operands, *activation.arguments)

    @staticmethod
    def recipe(ctx: Any) -> Callable[..., Tensor]:
        forward, arguments = _KINDS[ctx.kind].forward, ctx.activation.arguments
        return lambda *operands: forward(*operands, *arguments)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        kind, activation = _KINDS[ctx.kind], ctx.activation
        operands, needed = ctx.saved_tensors, ctx.needs_input_grad[2:]
        found: Sequence[Tensor | None]
        if torch.is_grad_enabled():
            found = stock_gradients(partial(kind.stock, activation), operands, needed, g)
        else:
            found = kind.backward(g, *operands, *activation.arguments)
        return None, None, *(gradient if need else None for gradient, need in zip(found, needed, strict=True))


class GatedChannels(Gated):
    """`Gated`, of channels."""


class Highway(Gated):
    """`Gated`, of highways."""


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
    def refusal() -> str | None:
        if gate is other:
            return "the gate is what it gates"
        if gate.shape != other.shape:
            return "gate and operand differ in shape"
        if not is_dense(gate) or gate.stride() != other.stride():
            return "memory that isn't walked alike"  # PyTorch's operators need no copy
        return None

    return _decide(Gated, "gated", (gate, other), activation, refusal)


def _decide(
    function: type[Gated], name: str, operands: Sequence[Tensor], activation: str, refusal: Refusal
) -> Callable[..., Tensor]:
    """What computes a gate of the kind that goes by a name, of its operands and the activation."""
    kind, resolved = _KINDS[name], resolve_activation(activation)

    def any_refusal() -> str | None:
        return refusal() if activation in kind.activations else f"no kernel {kind.does} with {activation}"

    if not all(isinstance(one, Tensor) for one in operands) or not takes_kernel(name, *operands, refusal=any_refusal):
        return partial(kind.stock, resolved)
    if torch.is_grad_enabled() and any(one.requires_grad for one in operands):
        return lambda *given: function.apply(name, resolved, *given[:-1])
    return lambda *given: kind.forward(*given[:-1], *resolved.arguments)


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
    def refusal() -> str | None:
        return None if gate.shape == transformed.shape == carried.shape else "operands differ in shape"

    return _decide(Highway, "highway", (gate, transformed, carried), activation, refusal)


def gated_channels(input: Tensor, gate: Tensor, activation: str = "sigmoid") -> Tensor:
    """input * activation(gate): each channel of (N, C, ...) scaled by its element of a gate of (N, C, 1, ...).

    Kernels have "sigmoid" and "hardsigmoid", and tensors that are contiguous or channels last; others take PyTorch's
    operators.  Saves both: 2 elements are moved forward for each of the result, 3 backward.
    """
    y: Tensor = _gated_channels(input, gate, activation)
    return y


@decided_once
def _gated_channels(input: Tensor, gate: Tensor, activation: str) -> Callable[..., Tensor]:
    def refusal() -> str | None:
        if input.dim() < 3 or gate.shape != (*input.shape[:2], *(1 for _ in input.shape[2:])):
            return "the gate hasn't one element for each sample's channel"
        if not input.numel():
            return "no elements"
        return None if channels.lines_of_channels(input) else "neither contiguous nor channels last"

    return _decide(GatedChannels, "gated_channels", (input, gate), activation, refusal)


def _halves_refusal(input: Tensor, dim: int, activation: str) -> str | None:
    if activation not in GATES:
        return f"no kernel gates with {activation}"
    if not is_integer(dim) or not -input.dim() <= dim < input.dim():
        return "there is no such dimension"
    return "its size is odd" if input.shape[dim] % 2 else None
