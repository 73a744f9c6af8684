"""Bias, activation, dropout and a residual as one operation."""

from collections.abc import Callable, Sequence
from math import inf
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ..kernels import bias_activation_dropout as kernels
from ..kernels.base.launch import ACCUMULATOR
from ..kernels.base.random import with_seed
from ..kernels.functions.activation import ACTIVATIONS, Activated, activated
from . import stock as F
from .activation import resolve_activation, stock_activation
from .anchors import anchors_of
from .dispatch import autocast_dtype, takes_kernel
from .gradients import LinearGradient, stock_gradients
from .operators import operator
from .recompute import needs

__all__ = ["bias_activation_dropout", "linear_activation_dropout"]


def _fake_forward(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    name: str,
    a: float,
    b: float,
    p: float,
    dim: int,
    save: bool,
) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(x)
    masked = save and ACTIVATIONS[name].saves == "mask"
    return y, x.new_empty(kernels.saved_mask_bytes(y.shape, y.stride(), dim) if masked else 0, dtype=torch.uint8)


@operator(
    "bias_activation_dropout(Tensor x, Tensor? bias, Tensor? residual, Tensor? seed, str name, float a, float b,"
    " float p, int dim, bool save) -> (Tensor, Tensor)",
    fake=_fake_forward,
)
def _forward(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    name: str,
    a: float,
    b: float,
    p: float,
    dim: int,
    save: bool,
) -> tuple[Tensor, Tensor]:
    y, mask = kernels.bias_activation_dropout_forward(x, bias, residual, seed, activated(name, a, b), p, dim, save=save)
    return y, x.new_empty(0, dtype=torch.uint8) if mask is None else mask


@operator(
    "bias_activation_dropout_backward(Tensor g, Tensor saved, Tensor? bias, Tensor? seed, SymInt[] strides, str name,"
    " float a, float b, float p, int dim, bool bias_gradient) -> (Tensor, Tensor)",
    fake=lambda g, saved, bias, seed, strides, name, a, b, p, dim, bias_gradient: (
        g.new_empty_strided(g.shape, strides),
        g.new_empty(kernels.bias_sums_shape(g.shape, strides, dim) if bias_gradient else 0, dtype=ACCUMULATOR[g.dtype]),
    ),
)
def _backward(
    g: Tensor,
    saved: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    strides: Sequence[int],
    name: str,
    a: float,
    b: float,
    p: float,
    dim: int,
    bias_gradient: bool,
) -> tuple[Tensor, Tensor]:
    dx, sums = kernels.bias_activation_dropout_backward(
        g, saved, bias, seed, strides, activated(name, a, b), p, dim, bias_gradient=bias_gradient
    )
    return dx, g.new_empty(0, dtype=ACCUMULATOR[g.dtype]) if sums is None else sums


class BiasActivationDropout(Function):
    """Saves one bit an element (and the seed, for LeakyReLU), or the input, the bias and the seed.

    Where the bias is ``added`` to the input already, without its gradient, it is an operand for its gradient alone.
    ``anchors`` are those of the input and the bias, where bits are saved.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        seed: Tensor | None,
        activation: Activated,
        p: float,
        dim: int,
        added: bool,
        anchors: tuple[Tensor, ...],
    ) -> Tensor:
        y: Tensor
        y, mask = _forward(x, None if added else bias, residual, seed, *activation.arguments, p, dim, True)
        if activation.saves == "mask":
            ctx.save_for_backward(mask, None, None if activation.row.mask_gates else seed)
        else:
            ctx.save_for_backward(x, bias, seed)
            needs(ctx, residual)
        ctx.strides = y.stride()
        ctx.arguments = (activation, p, dim)
        ctx.added = added
        ctx.anchors = anchors
        return y

    @staticmethod
    def recipe(ctx: Any) -> Callable[..., Tensor] | None:
        activation, p, dim = ctx.arguments
        if activation.saves == "mask":
            return None
        added = ctx.added

        def again(x: Tensor, bias: Tensor | None, seed: Tensor | None, residual: Tensor | None) -> Tensor:
            y: Tensor = _forward(x, None if added else bias, residual, seed, *activation.arguments, p, dim, False)[0]
            return y

        return again

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        saved, bias, seed = ctx.saved_tensors
        activation, p, dim = ctx.arguments
        arguments = (ctx.strides, *activation.arguments, p, dim)
        needs_dx, needs_db, needs_dr = ctx.needs_input_grad[:3]
        dx: Tensor | None = None
        db: Tensor | None = None
        if not (needs_dx or needs_db):
            pass
        elif not torch.is_grad_enabled():
            dx, sums = _backward(g, saved, None if ctx.added else bias, seed, *arguments, needs_db)
            db = sums.sum((0, 2)).to(dx.dtype) if needs_db else None  # here, where a compiler sees it
        elif activation.saves == "mask":
            dx = LinearGradient.apply(g, saved, seed, _masked_gradient, arguments, *ctx.anchors)
            db = dx.sum([other for other in range(dx.dim()) if other != dim])
        else:
            if ctx.added and bias is not None:
                bias = bias - bias.detach()  # nothing, but for its gradient
            dx, db = _differentiable_gradients(g, saved, bias, seed, *ctx.arguments)
        return (
            dx if needs_dx else None,
            db if needs_db else None,
            g if needs_dr else None,
            *(None,) * 6,
        )


def _masked_gradient(g: Tensor, mask: Tensor, seed: Tensor | None, *arguments: Any) -> Tensor:
    """The gradient of the input where bits are saved, linear in that of the output."""
    dx: Tensor
    dx, _ = _backward(g, mask, None, seed, *arguments, False)
    return dx


def _differentiable_gradients(
    g: Tensor,
    x: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    activation: Activated,
    p: float,
    dim: int,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of the input and the bias, from stock operators that can be differentiated again."""
    noise, _ = _forward(torch.ones_like(x), None, None, seed, "relu", 0.0, 0.0, p, dim, False)
    needed = [t is not None and t.requires_grad for t in (x, bias)]
    dx, db = stock_gradients(
        lambda x, bias: stock_activation(_biased(x, bias, dim), activation) * noise, (x, bias), needed, g
    )
    return dx, db


def _biased(x: Tensor, bias: Tensor | None, dim: int) -> Tensor:
    if bias is None:
        return x
    shape = [1] * x.dim()
    shape[dim] = -1
    return x + bias.view(shape)


def bias_activation_dropout(
    input: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    p: float = 0.5,
    activation: str = "relu",
    parameters: Sequence[float] = (),
    training: bool = True,
    dim: int = -1,
) -> Tensor:
    """dropout(activation(input + bias)) + residual, in one kernel each way.

    In evaluation nothing is dropped.  The sums are not rounded in between.

    Args:
        input: any shape of at least one dimension, float16, bfloat16, float32 or float64.
        bias: (input.shape[dim],), or None.  Under autocast it is taken in the input's dtype.
        residual: of the input's shape, or None.
        p: probability to drop an element.
        activation: a name of `torch.nn.functional` (``"relu"``, ``"gelu"``, ...), or ``"gelu_tanh"``.
        parameters: the activation's scalar parameters in PyTorch's order; its defaults, where they are missing.
        training: whether to drop at all.
        dim: the dimension that the bias lies along: -1 after a linear layer, 1 after a convolution.

    Saves one bit an element where the activation's gradient is 0 or 1 (ReLU, ReLU6, Hardtanh, Threshold, Hardsigmoid),
    one bit and a seed for LeakyReLU, and otherwise the input and a seed.  Raises ValueError for an unknown activation
    or too many parameters, and stock's errors.  Source: Srivastava et al., "Dropout: A Simple Way to Prevent Neural
    Networks from Overfitting" (JMLR 2014).
    """
    resolved = resolve_activation(activation, parameters)
    if bias is not None and isinstance(input, Tensor) and autocast_dtype(input):
        bias = bias.to(input.dtype)
    operands = [operand for operand in (input, bias, residual) if operand is not None]
    described = (input, bias, residual, p, resolved, training, dim)
    if not takes_kernel(_name(p, training), *operands, refusal=lambda: _refusal(*described)):
        y: Tensor = F.dropout(stock_activation(_biased(input, bias, dim), resolved), p, training)
        return y if residual is None else y + residual
    return _apply(input, bias, residual, p if training else 0.0, resolved, dim, added=False)


def linear_activation_dropout(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    p: float,
    activation: str,
    parameters: Sequence[float],
    training: bool,
) -> Tensor:
    """dropout(activation(x weight^T + bias)): `bias_activation_dropout` behind a product that holds the bias.

    So the product is rounded once, as in `torch.nn.functional.linear`; the bias's gradient is summed where that of the
    product is made.
    """
    if bias is None:
        return bias_activation_dropout(F.linear(input, weight), None, None, p, activation, parameters, training)
    resolved = resolve_activation(activation, parameters)
    product = F.linear(input, weight, bias.detach())
    addend = bias.to(product.dtype) if autocast_dtype(input) else bias
    described = (product, addend, None, p, resolved, training, -1)
    if not takes_kernel(_name(p, training), product, addend, refusal=lambda: _refusal(*described)):
        return F.dropout(stock_activation(F.linear(input, weight, bias), resolved), p, training)
    return _apply(product, addend, None, p if training else 0.0, resolved, -1, added=True)


def _name(p: object, training: object) -> str:
    """The operation's name: without dropout it is another, which a compiler fuses as well."""
    return "bias_activation_dropout" if training and p else "bias_activation"


def _apply(
    input: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    p: float,
    activation: Activated,
    dim: int,
    *,
    added: bool,
) -> Tensor:
    """The operation, by its kernels; ``added`` as of `BiasActivationDropout`."""
    operands = [operand for operand in (input, bias, residual) if operand is not None]
    dim %= input.dim()

    def compute(seed: Tensor | None) -> Tensor:
        y: Tensor
        if torch.is_grad_enabled() and any(operand.requires_grad for operand in operands):
            anchors = anchors_of(input, bias) if activation.saves == "mask" else ()
            y = BiasActivationDropout.apply(input, bias, residual, seed, activation, float(p), dim, added, anchors)
        else:
            rest = (*activation.arguments, float(p), dim, False)
            y, _ = _forward(input, None if added else bias, residual, seed, *rest)
        return y

    return with_seed(input.device, compute) if p > 0 else compute(None)


def _refusal(
    input: object,
    bias: object,
    residual: object,
    p: object,
    activation: Activated,
    training: object,
    dim: int,
) -> str | None:
    if not isinstance(input, Tensor) or not all(isinstance(t, Tensor | None) for t in (bias, residual)):
        return "not a tensor"
    if input.dim() == 0 or not -input.dim() <= dim < input.dim():
        return "no such dimension"
    if isinstance(bias, Tensor) and bias.shape != (input.shape[dim],):
        return "the bias is not one number for each channel"
    if isinstance(residual, Tensor) and residual.shape != input.shape:
        return "the residual is of another shape"
    if not (-inf < activation.a < inf and -inf < activation.b < inf):
        return "a parameter is not finite"
    if not isinstance(p, float | int) or not 0 <= p <= 1:
        return "p is not a probability"
    if type(training) is not bool:
        return "training is not a boolean"
    return activation.refusal()
