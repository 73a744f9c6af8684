"""Activation functions with the signatures of ``torch.nn.functional``, and their gradients.

Each function takes the kernel or the stock operator, as `fusednn.autograd.dispatch` decides.  What the backward pass
saves is the table's choice (`fusednn.kernels.functions.activation`): one bit an element, the output, or the input.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ..kernels import activation as kernels
from ..kernels import rrelu as rrelu_kernels
from ..kernels.base.layout import is_dense
from ..kernels.base.tiles import mask_bytes
from ..kernels.functions.activation import ACTIVATIONS, IDENTITY, Activated, activated
from . import stock as F
from .anchors import anchors_of
from .decisions import decided_once
from .dispatch import autocast_dtype, is_number, or_stock, takes_kernel
from .gradients import LinearGradient, stock_gradients
from .operators import operator
from .recompute import needs

__all__ = [
    "celu",
    "elu",
    "gelu",
    "hardsigmoid",
    "hardswish",
    "hardtanh",
    "leaky_relu",
    "logsigmoid",
    "mish",
    "quick_gelu",
    "relu",
    "relu6",
    "relu_squared",
    "selu",
    "sigmoid",
    "silu",
    "softplus",
    "softsign",
    "squareplus",
    "tanh",
    "threshold",
]

# --- Operators ------------------------------------------------------------------------------------------------------
#
# ``seed`` is given for RReLU alone, whose slopes are drawn from it; ``a`` and ``b`` are then their bounds.


def _fake_mask(x: Tensor) -> Tensor:
    return x.new_empty(mask_bytes(x.numel()), dtype=torch.uint8)


def activation_operator(
    schema: str, function: Callable[..., Any], *, fake: Callable[..., Any] = lambda x, *_: torch.empty_like(x)
) -> Callable[..., Any]:
    """The operator of a kernel's function whose last argument is an activation: ``ACTIVATION`` in the schema.

    Its result is like its first operand, unless ``fake`` tells otherwise.
    """

    @wraps(function)
    def of_arguments(*arguments: Any) -> Any:
        return function(*arguments[:-3], activated(*arguments[-3:]))

    return operator(schema.replace("ACTIVATION", "str name, float a, float b"), fake=fake)(of_arguments)


_forward = activation_operator("activation(Tensor x, ACTIVATION) -> Tensor", kernels.activation_forward)


@operator(
    "activation_(Tensor(a!) x, str name, float a, float b) -> ()",
    fake=lambda x, name, a, b: None,
)
def _forward_inplace(x: Tensor, name: str, a: float, b: float) -> None:
    kernels.activation_forward(x, activated(name, a, b), inplace=True)


@operator(
    "activation_masked(Tensor x, Tensor? seed, str name, float a, float b) -> (Tensor, Tensor)",
    fake=lambda x, seed, name, a, b: (torch.empty_like(x), _fake_mask(x)),
)
def _masked_forward(x: Tensor, seed: Tensor | None, name: str, a: float, b: float) -> tuple[Tensor, Tensor]:
    if seed is not None:
        return rrelu_kernels.rrelu_forward(x, seed, a, b)
    return kernels.activation_masked_forward(x, activated(name, a, b))


@operator(
    "activation_masked_(Tensor(a!) x, Tensor? seed, str name, float a, float b) -> Tensor",
    fake=lambda x, seed, name, a, b: _fake_mask(x),
)
def _masked_forward_inplace(x: Tensor, seed: Tensor | None, name: str, a: float, b: float) -> Tensor:
    if seed is not None:
        return rrelu_kernels.rrelu_forward(x, seed, a, b, inplace=True)[1]
    return kernels.activation_masked_forward(x, activated(name, a, b), inplace=True)[1]


_backward = activation_operator(
    "activation_backward(Tensor g, Tensor saved, ACTIVATION) -> Tensor",
    kernels.activation_backward,
    fake=lambda g, saved, *_: torch.empty_like(saved),
)


@operator(
    "activation_masked_backward(Tensor g, Tensor mask, Tensor? seed, SymInt[] strides, str name, float a, float b)"
    " -> Tensor",
    fake=lambda g, mask, seed, strides, name, a, b: g.new_empty_strided(g.shape, strides),
)
def masked_backward(
    g: Tensor, mask: Tensor, seed: Tensor | None, strides: Sequence[int], name: str, a: float, b: float
) -> Tensor:
    if seed is not None:
        return rrelu_kernels.rrelu_backward(g, mask, seed, strides, a, b)
    return kernels.activation_masked_backward(g, mask, strides, activated(name, a, b))


# --- Gradients ------------------------------------------------------------------------------------------------------


class MaskedActivation(Function):
    """An activation whose gradient needs one bit an element: linear in the gradient of the output, piecewise.

    ``activation`` are its operator's arguments, ``anchors`` those of ``x``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        seed: Tensor | None,
        activation: tuple[str, float, float],
        inplace: bool,
        anchors: tuple[Tensor, ...],
    ) -> Tensor:
        y: Tensor
        if inplace:
            y, mask = x, _masked_forward_inplace(x, seed, *activation)
            ctx.mark_dirty(x)
        else:
            y, mask = _masked_forward(x, seed, *activation)
            needs(ctx, x)
        ctx.save_for_backward(mask, seed)
        ctx.arguments = (y.stride(), *activation)
        ctx.anchors = anchors
        return y

    @staticmethod
    def recipe(ctx: Any) -> Callable[..., Tensor]:
        _, *activation = ctx.arguments

        def again(mask: Tensor, seed: Tensor | None, x: Tensor) -> Tensor:
            y: Tensor
            y = _forward(x, *activation) if seed is None else _masked_forward(x, seed, *activation)[0]
            return y

        return again

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None, None]:
        mask, seed = ctx.saved_tensors
        if torch.is_grad_enabled():
            dx = LinearGradient.apply(g, mask, seed, masked_backward, ctx.arguments, *ctx.anchors)
        else:
            dx = masked_backward(g, mask, seed, *ctx.arguments)
        return dx, None, None, None, None


class SavedActivation(Function):
    """An activation whose gradient needs the output or the input.

    ``original`` is given in place of a saved input that ``inplace`` is about to overwrite: a copy of ``x``.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, original: Tensor | None, activation: Activated, inplace: bool) -> Tensor:
        if inplace:
            _forward_inplace(x, *activation.arguments)
            ctx.mark_dirty(x)
            y = x
        else:
            y = _forward(x, *activation.arguments)
        ctx.save_for_backward(y if activation.saves == "output" else x if original is None else original)
        ctx.from_copy = original is not None
        ctx.activation = activation
        return y

    @staticmethod
    def recipe(ctx: Any) -> Callable[..., Tensor] | None:
        activation = ctx.activation
        return None if activation.saves == "output" else lambda x: _forward(x, *activation.arguments)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (saved,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            dx = differentiable_gradient(g, saved, ctx.activation, ctx.activation.saves)
        else:
            dx = _backward(g, saved, *ctx.activation.arguments)
        return (None, dx, None, None) if ctx.from_copy else (dx, None, None, None)


def _stock_squareplus(x: Tensor, b: float) -> Tensor:
    """In float32 where x has 16 bits, and without cancellation."""
    wide = x.float() if x.is_floating_point() and x.dtype.itemsize == 2 else x
    root = torch.hypot(wide, torch.full((), b, dtype=wide.dtype, device=x.device).sqrt())
    return torch.where(wide >= 0, 0.5 * wide + 0.5 * root, 0.5 * b / (root - wide.clamp(max=0))).to(x.dtype)


#: The stock function of (x, a, b) for each row of the table.
STOCK: dict[str, Callable[[Tensor, float, float], Tensor]] = {
    "celu": lambda x, a, b: F.celu(x, a),
    "elu": lambda x, a, b: F.elu(x, a),
    "gelu": lambda x, a, b: F.gelu(x),
    "gelu_tanh": lambda x, a, b: F.gelu(x, approximate="tanh"),
    "hardsigmoid": lambda x, a, b: F.hardsigmoid(x),
    "hardswish": lambda x, a, b: F.hardswish(x),
    "hardtanh": lambda x, a, b: F.hardtanh(x, a, b),
    "leaky_relu": lambda x, a, b: F.leaky_relu(x, a),
    "logsigmoid": lambda x, a, b: F.logsigmoid(x),
    "mish": lambda x, a, b: F.mish(x),
    "quick_gelu": lambda x, a, b: x * F.sigmoid(1.702 * x),
    "relu": lambda x, a, b: F.relu(x),
    "relu6": lambda x, a, b: F.relu6(x),
    "relu_squared": lambda x, a, b: torch.square(F.relu(x)),
    "selu": lambda x, a, b: F.selu(x),
    "sigmoid": lambda x, a, b: F.sigmoid(x),
    "silu": lambda x, a, b: F.silu(x),
    "softplus": lambda x, a, b: F.softplus(x, a, b),
    "softsign": lambda x, a, b: F.softsign(x),
    "squareplus": lambda x, a, b: _stock_squareplus(x, a),
    "tanh": lambda x, a, b: F.tanh(x),
    "threshold": lambda x, a, b: F.threshold(x, a, b),
}
# The stock gradient of (g, y, a, b), where the output is saved.
_STOCK_GRADIENT: dict[str, Callable[[Tensor, Tensor, float, float], Tensor]] = {
    "celu_": lambda g, y, a, b: torch.ops.aten.elu_backward(g, a, 1.0, 1.0 / a, True, y),
    "elu_": lambda g, y, a, b: torch.ops.aten.elu_backward(g, a / b, b, 1.0, True, y),
    "sigmoid": lambda g, y, a, b: torch.ops.aten.sigmoid_backward(g, y),
    "tanh": lambda g, y, a, b: torch.ops.aten.tanh_backward(g, y),
}


def stock_activation(x: Tensor, activation: Activated, slopes: Tensor | None = None) -> Tensor:
    """activation(x), by PyTorch's operators; PReLU's with its ``slopes``."""
    if slopes is not None:
        return F.prelu(x, slopes)
    row, a, b = activation
    return x if activation.saves == "nothing" else STOCK[row.name](x, a, b)


def differentiable_gradient(g: Tensor, saved: Tensor, activation: Activated, kept: str) -> Tensor:
    """The gradient of the input, from stock operators that can be differentiated again.

    ``saved`` is what ``kept`` says, the ``"input"`` or the ``"output"``.
    """
    row, a, b = activation
    if kept == "output":
        return _STOCK_GRADIENT[row.name](g, saved, a, b)
    dx: Tensor
    (dx,) = stock_gradients(lambda x: stock_activation(x, activation), (saved,), (True,), g)
    return dx


# --- Functions ------------------------------------------------------------------------------------------------------


def resolve_activation(name: str | None, parameters: Sequence[float] = ()) -> Activated:
    """The activation that goes by a name; None is the identity.

    ``parameters`` are its scalar parameters in PyTorch's order; its defaults, where they are missing.  Raises
    ValueError for other names, and for more parameters than the activation has.
    """
    if name is not None and name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}; known: {', '.join(ACTIVATIONS)}")
    row = IDENTITY.row if name is None else ACTIVATIONS[name]
    if len(parameters) > (most := len(row.parameters)):
        raise ValueError(f"{row.name} has {most} parameter{'s' * (most != 1)}, but got {len(parameters)}")
    a, b = (*parameters, *row.defaults[len(parameters) :])
    return Activated(row, float(a), float(b))


def taken(
    name: str, input: Tensor, *parameters: float, inplace: bool = False, out: Tensor | None = None
) -> Activated | None:
    """The activation, if its kernel takes the input; None where the stock operator has to."""
    activation: Activated | None
    if not inplace and out is None:
        activation = _taken_apart(input, name, *parameters)
    else:
        activation = _taken(input, name, parameters, inplace, out)
    return activation


@decided_once
def _taken_apart(input: Tensor, name: str, *parameters: float) -> Callable[..., Activated | None]:
    """`taken`, as a function, of an activation whose result is a new tensor."""
    activation = _taken(input, name, parameters, False, None)
    return lambda *_: activation


def _taken(
    input: Tensor, name: str, parameters: Sequence[float], inplace: bool, out: Tensor | None
) -> Activated | None:
    def refusal() -> str | None:
        if not all(is_number(parameter) for parameter in parameters):
            return "a parameter is not a Python number"
        return resolve_activation(name, parameters).refusal(inplace) or _out_refusal(out)

    return resolve_activation(name, parameters) if takes_kernel(name, input, inplace=inplace, refusal=refusal) else None


def _out_refusal(out: Tensor | None) -> str | None:
    return None if out is None else "the result goes into a given tensor"


def _given_out(out: Tensor | None) -> dict[str, Any]:
    """The option of those stock functions that have it, where it is given: modes see no other call than stock's."""
    return {} if out is None else {"out": out}


def _is_copied(input: Tensor) -> bool:
    """Whether what is computed in place is computed apart, and copied.

    Tracers fold copies away; a view's base needs PyTorch's own bookkeeping; strided memory needs the copy.
    """
    return torch.compiler.is_compiling() or input._is_view() or not is_dense(input)


def apply_masked(input: Tensor, seed: Tensor | None, activation: tuple[str, float, float], inplace: bool) -> Tensor:
    """Apply an activation that saves a mask, by its operator's arguments; with a seed RReLU, which are its bounds'."""
    if inplace and _is_copied(input):
        return input.copy_(apply_masked(input, seed, activation, False))
    y: Tensor = MaskedActivation.apply(input, seed, activation, inplace, anchors_of(input))
    return input if inplace else y  # without gradients a function returns another tensor


def apply_kernel(input: Tensor, activation: Activated, inplace: bool) -> Tensor:
    """Apply an activation, differentiably where the input requires gradients."""
    differentiable = torch.is_grad_enabled() and input.requires_grad
    if differentiable and activation.saves == "mask":
        return apply_masked(input, None, activation.arguments, inplace)
    if inplace:
        activation = activation.overwriting(input.dtype)
        saves_input = differentiable and activation.saves == "input"
        if _is_copied(input):
            return input.copy_(apply_kernel(input.clone() if saves_input else input, activation, False))
    y: Tensor
    if differentiable:
        y = SavedActivation.apply(input, input.clone() if inplace and saves_input else None, activation, inplace)
    elif inplace:
        _forward_inplace(input, *activation.arguments)
        if not input.is_inference():
            torch.autograd.graph.increment_version(input)
        y = input
    else:
        y = _forward(input, *activation.arguments)
    return y


@or_stock
def relu(input: Tensor, inplace: bool = False) -> Tensor:
    """max(0, x).  As `torch.nn.functional.relu`; saves one bit an element."""
    if (activation := taken("relu", input, inplace=inplace)) is None:
        return F.relu(input, inplace)
    return apply_kernel(input, activation, inplace)


@or_stock
def relu6(input: Tensor, inplace: bool = False) -> Tensor:
    """min(max(0, x), 6).  As `torch.nn.functional.relu6`; saves one bit an element."""
    if (activation := taken("relu6", input, inplace=inplace)) is None:
        return F.relu6(input, inplace)
    return apply_kernel(input, activation, inplace)


@or_stock
def relu_squared(input: Tensor) -> Tensor:
    """max(0, x)^2; saves the input.  Source: So et al., "Primer" (2021)."""
    if (activation := taken("relu_squared", input)) is None:
        return STOCK["relu_squared"](input, 0.0, 0.0)
    return apply_kernel(input, activation, False)


@or_stock
def leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    """max(0, x) + negative_slope min(0, x).  As `torch.nn.functional.leaky_relu`; saves one bit an element."""
    if (activation := taken("leaky_relu", input, negative_slope, inplace=inplace)) is None:
        return F.leaky_relu(input, negative_slope, inplace)
    return apply_kernel(input, activation, inplace)


@or_stock
def threshold(input: Tensor, threshold: float, value: float, inplace: bool = False) -> Tensor:
    """x where x > threshold, else value.  As `torch.nn.functional.threshold`; saves one bit an element."""
    if (activation := taken("threshold", input, threshold, value, inplace=inplace)) is None:
        return F.threshold(input, threshold, value, inplace)
    return apply_kernel(input, activation, inplace)


@or_stock
def hardtanh(input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Tensor:
    """min(max(min_val, x), max_val).  As `torch.nn.functional.hardtanh`; saves one bit an element."""
    if (activation := taken("hardtanh", input, min_val, max_val, inplace=inplace)) is None:
        return F.hardtanh(input, min_val, max_val, inplace)
    return apply_kernel(input, activation, inplace)


@or_stock
def hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """min(max(0, x + 3), 6) / 6.  As `torch.nn.functional.hardsigmoid`; saves one bit an element."""
    if (activation := taken("hardsigmoid", input, inplace=inplace)) is None:
        return F.hardsigmoid(input, inplace)
    return apply_kernel(input, activation, inplace)


@or_stock
def hardswish(input: Tensor, inplace: bool = False) -> Tensor:
    """x min(max(0, x + 3), 6) / 6.  As `torch.nn.functional.hardswish`; saves the input."""
    if (activation := taken("hardswish", input, inplace=inplace)) is None:
        return F.hardswish(input, inplace)
    return apply_kernel(input, activation, inplace)


@or_stock
def elu(input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    """max(0, x) + min(0, alpha (exp(x) - 1)).  As `torch.nn.functional.elu`.

    Saves the input; in place the output, in 16 bits a copy of the input.
    """
    if (activation := taken("elu", input, alpha, inplace=inplace)) is None:
        return F.elu(input, alpha, inplace)
    return apply_kernel(input, activation, inplace)


@or_stock
def selu(input: Tensor, inplace: bool = False) -> Tensor:
    """scale (max(0, x) + min(0, alpha (exp(x) - 1))).  As `torch.nn.functional.selu`.

    Saves the input; in place the output, in 16 bits a copy of the input.
    """
    if (activation := taken("selu", input, inplace=inplace)) is None:
        return F.selu(input, inplace)
    return apply_kernel(input, activation, inplace)


@or_stock
def celu(input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    """max(0, x) + min(0, alpha (exp(x / alpha) - 1)).  As `torch.nn.functional.celu`.

    Saves the input; in place the output, in 16 bits a copy of the input.
    """
    if (activation := taken("celu", input, alpha, inplace=inplace)) is None:
        return F.celu(input, alpha, inplace)
    return apply_kernel(input, activation, inplace)


@or_stock
def gelu(input: Tensor, *, approximate: str = "none", out: Tensor | None = None) -> Tensor:
    """x Phi(x), or its tanh approximation.  As `torch.nn.functional.gelu`; saves the input."""
    known = type(approximate) is str and approximate in ("none", "tanh")
    if not known:
        takes_kernel("gelu", input, refusal=lambda: "unknown approximation")
    elif (activation := taken("gelu_tanh" if approximate == "tanh" else "gelu", input, out=out)) is not None:
        return apply_kernel(input, activation, False)
    return F.gelu(input, approximate=approximate, **_given_out(out))


@or_stock
def quick_gelu(input: Tensor) -> Tensor:
    """x sigmoid(1.702 x); saves the input.  Source: Hendrycks and Gimpel, "Gaussian Error Linear Units" (2016)."""
    if (activation := taken("quick_gelu", input)) is None:
        return STOCK["quick_gelu"](input, 0.0, 0.0)
    return apply_kernel(input, activation, False)


@or_stock
def silu(input: Tensor, inplace: bool = False) -> Tensor:
    """x sigmoid(x).  As `torch.nn.functional.silu`; saves the input."""
    if (activation := taken("silu", input, inplace=inplace)) is None:
        return F.silu(input, inplace)
    return apply_kernel(input, activation, inplace)


@or_stock
def mish(input: Tensor, inplace: bool = False) -> Tensor:
    """x tanh(softplus(x)).  As `torch.nn.functional.mish`; saves the input."""
    if (activation := taken("mish", input, inplace=inplace)) is None:
        return F.mish(input, inplace)
    return apply_kernel(input, activation, inplace)


@or_stock
def softplus(input: Tensor, beta: float = 1.0, threshold: float = 20.0, *, out: Tensor | None = None) -> Tensor:
    """log(1 + exp(beta x)) / beta, and x where beta x > threshold.  As `torch.nn.functional.softplus`.

    Saves the input.  CUDA's autocast computes it in float32, and so does this.
    """
    if (activation := taken("softplus", input, beta, threshold, out=out)) is None:
        return F.softplus(input, beta, threshold, **_given_out(out))
    if input.device.type == "cuda" and autocast_dtype(input) and input.dtype is not torch.float64:
        input = input.float()
    return apply_kernel(input, activation, False)


@or_stock
def softsign(input: Tensor) -> Tensor:
    """x / (1 + |x|).  As `torch.nn.functional.softsign`; saves the input."""
    if (activation := taken("softsign", input)) is None:
        return F.softsign(input)
    return apply_kernel(input, activation, False)


@or_stock
def squareplus(input: Tensor, b: float = 4.0) -> Tensor:
    """(x + sqrt(x^2 + b)) / 2, a softplus of algebra alone; saves the input.

    ``b`` > 0 is how wide it is bent.  Source: Barron, "Squareplus: A Softplus-Like Algebraic Rectifier" (2021).
    """
    if (activation := taken("squareplus", input, b)) is None:
        return _stock_squareplus(input, b)
    return apply_kernel(input, activation, False)


@or_stock
def sigmoid(input: Tensor) -> Tensor:
    """1 / (1 + exp(-x)).  As `torch.nn.functional.sigmoid`; saves the output."""
    if (activation := taken("sigmoid", input)) is None:
        return F.sigmoid(input)
    return apply_kernel(input, activation, False)


@or_stock
def logsigmoid(input: Tensor, *, out: Tensor | None = None) -> Tensor:
    """log(sigmoid(x)).  As `torch.nn.functional.logsigmoid`; saves the input."""
    if (activation := taken("logsigmoid", input, out=out)) is None:
        return F.logsigmoid(input, **_given_out(out))
    return apply_kernel(input, activation, False)


@or_stock
def tanh(input: Tensor) -> Tensor:
    """tanh(x).  As `torch.nn.functional.tanh`; saves the output."""
    if (activation := taken("tanh", input)) is None:
        return F.tanh(input)
    return apply_kernel(input, activation, False)
