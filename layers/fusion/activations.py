"""Activations as members of chains: which there are, by which name and parameters, and what refuses them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx, nn

from ...autograd import stock as F
from ...autograd.activation import resolve_activation
from ...autograd.batch_norm import apply_activation
from ...autograd.dispatch import is_number
from ..activation import QuickGELU, ReLUSquared, Squareplus  # and the twins beside it
from .members import call_refusal, class_of, is_one_of, layer_refusal

__all__ = [
    "ACTIVATIONS",
    "SLOPED",
    "Activation",
    "activated",
    "activation_of",
    "activation_refusal",
    "first_refusal",
    "slopes_of",
]

#: By what it says of its approximation; what else people set is a parameter that no kernel takes.
_GELUS: dict[str, tuple[str, tuple[float, ...]]] = {"none": ("gelu", ()), "tanh": ("gelu_tanh", ())}

#: The name of each activation layer that can be fused, and its parameters in PyTorch's order.  Registered ones join.
ACTIVATIONS: dict[type[nn.Module], Callable[[Any], tuple[str, tuple[float, ...]]]] = {
    nn.CELU: lambda layer: ("celu", (layer.alpha,)),
    nn.ELU: lambda layer: ("elu", (layer.alpha,)),
    nn.GELU: lambda layer: _GELUS.get(layer.approximate) or ("gelu", (layer.approximate,)),
    nn.Hardsigmoid: lambda layer: ("hardsigmoid", ()),
    nn.Hardswish: lambda layer: ("hardswish", ()),
    nn.Hardtanh: lambda layer: ("hardtanh", (layer.min_val, layer.max_val)),
    nn.LeakyReLU: lambda layer: ("leaky_relu", (layer.negative_slope,)),
    nn.LogSigmoid: lambda layer: ("logsigmoid", ()),
    nn.Mish: lambda layer: ("mish", ()),
    nn.ReLU: lambda layer: ("relu", ()),
    nn.ReLU6: lambda layer: ("relu6", ()),
    nn.SELU: lambda layer: ("selu", ()),
    nn.SiLU: lambda layer: ("silu", ()),
    nn.Sigmoid: lambda layer: ("sigmoid", ()),
    nn.Softsign: lambda layer: ("softsign", ()),
    nn.Tanh: lambda layer: ("tanh", ()),
    QuickGELU: lambda layer: ("quick_gelu", ()),
    ReLUSquared: lambda layer: ("relu_squared", ()),
    Squareplus: lambda layer: ("squareplus", (layer.b,)),
}
#: Activations with slopes that are learnt; patterns name those that they take.
SLOPED: tuple[type[nn.Module], ...] = (nn.PReLU,)
#: What stands for an activation: its layer, or where the code calls a function, its name and parameters.  Of PReLU's
#: function it is the slopes: their node in the graph where that is searched, the tensor where it runs.
Activation = nn.Module | tuple[str, tuple[float, ...]] | Tensor | fx.Node | None


def activation_of(activation: Activation) -> tuple[str | None, tuple[float, ...]]:
    """An activation's name in the table, and its parameters; None and none where there is none, or a PReLU."""
    if isinstance(activation, tuple):
        return activation
    if not isinstance(activation, nn.Module):
        return None, ()
    return (None, ()) if is_one_of(activation, SLOPED) else ACTIVATIONS[class_of(activation)](activation)


def slopes_of(activation: Activation) -> Any:
    """The slopes of a PReLU, a parameter and none of the table's numbers; a node where graphs are searched."""
    if isinstance(activation, Tensor | fx.Node):
        return activation
    if not isinstance(activation, nn.Module) or not is_one_of(activation, SLOPED):
        return None
    return activation.weight


def activation_refusal(activation: Activation, *others: type[nn.Module]) -> str | None:
    """As of `layer_refusal`, of an activation of the table, or one of ``others``; its parameters may have been changed
    to what only stock takes.
    """
    if refusal := layer_refusal(activation, *ACTIVATIONS, *others):
        return refusal
    _, parameters = activation_of(activation)
    without_slopes = isinstance(activation, nn.PReLU) and slopes_of(activation) is None
    return "a parameter isn't a number" if without_slopes or not all(map(is_number, parameters)) else None


def first_refusal(input: Tensor, activation: Activation) -> str | None:
    """Why a chain that begins with an activation isn't computed in one, whatever follows, or None."""
    refusal = call_refusal(input) or activation_refusal(activation)
    if refusal is None and getattr(activation, "inplace", False):  # others may look at what it was given
        refusal = "the activation writes over its input"
    return refusal


def activated(y: Tensor, activation: Activation) -> Tensor:
    """activation(y) as the code activates it, apart."""
    if isinstance(activation, nn.Module):
        result: Tensor = activation(y)
        return result
    if isinstance(activation, Tensor):
        return F.prelu(y, activation)
    return apply_activation(y, None, resolve_activation(*activation_of(activation)))
