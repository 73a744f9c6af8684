"""Bias, activation, dropout and a residual as one operation."""

from collections.abc import Callable, Sequence
from math import inf
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels import bias_activation_dropout as kernels
from ..kernels.base.launch import ACCUMULATOR
from ..kernels.base.random import with_seed
from ..kernels.functions.activation import ACTIVATIONS, PRELU, Activated, activated
from . import stock as F
from .activation import resolve_activation, stock_activation
from .anchors import anchors_of
from .decisions import decided_once
from .dispatch import autocast_dtype, or_stock, takes_kernel
from .function import Function
from .gradients import LinearGradient, stock_gradients
from .operators import operator
from .recompute import needs

__all__ = ["bias_activation_dropout", "conv_activation_dropout", "drop_of", "linear_activation_dropout"]


def _fake_forward(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    *_, name, a, b, _, dim, _, save = arguments
    y = torch.empty_like(x)
    masked = save and activated(name, a, b).saves == "mask"
    return y, x.new_empty(kernels.saved_mask_bytes(y.shape, y.stride(), dim) if masked else 0, dtype=torch.uint8)


@operator(
    "bias_activation_dropout(Tensor x, Tensor? bias, Tensor? residual, Tensor? seed, Tensor? slopes, str name, float a,"
    " float b, float p, int dim, bool of_channels, bool save) -> (Tensor, Tensor)",
    fake=_fake_forward,
)
def _forward(
    x: Tensor, bias: Tensor | None, residual: Tensor | None, seed: Tensor | None, slopes: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor]:
    *activation, p, dim, of_channels, save = options
    operands = (x, bias, residual, seed, activated(*activation), p, dim)
    y, mask = kernels.bias_activation_dropout_forward(*operands, slopes=slopes, of_channels=of_channels, save=save)
    return y, x.new_empty(0, dtype=torch.uint8) if mask is None else mask


@operator(
    "bias_activation_dropout_backward(Tensor g, Tensor saved, Tensor? bias, Tensor? seed, Tensor? slopes,"
    " SymInt[] strides, str name, float a, float b, float p, int dim, bool of_channels, bool sums) -> (Tensor, Tensor)",
    fake=lambda g, saved, bias, seed, slopes, strides, name, a, b, p, dim, of_channels, sums: (
        g.new_empty_strided(g.shape, strides),
        g.new_empty(kernels.sums_shape(g.shape, strides, dim, slopes) if sums else 0, dtype=ACCUMULATOR[g.dtype]),
    ),
)
def _backward(g: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    saved, bias, seed, slopes, strides, *activation, p, dim, of_channels, sums = arguments
    operands = (g, saved, bias, seed, strides, activated(*activation), p, dim)
    dx, partial = kernels.bias_activation_dropout_backward(*operands, slopes=slopes, of_channels=of_channels, sums=sums)
    return dx, g.new_empty(0, dtype=ACCUMULATOR[g.dtype]) if partial is None else partial


class Chain(NamedTuple):
    """What is done to an input and its operands: activation, dropout, and the dimension that the bias lies along.

    ``of_channels``: dropout drops those of dimension 1 as a whole.
    """

    activation: Activated
    p: float
    dim: int
    of_channels: bool

    @property
    def arguments(self) -> tuple[Any, ...]:
        """What operators are given in its place."""
        return *self.activation.arguments, self.p, self.dim, self.of_channels


class BiasActivationDropout(Function):
    """Saves one bit an element (and the seed, for LeakyReLU), or the input, the bias, the slopes and the seed.

    Where the bias is ``added`` to the input already, without its gradient, it is an operand for its gradient alone.
    ``anchors`` are those of the input and the bias, where bits are saved.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        slopes: Tensor | None,
        seed: Tensor | None,
        chain: Chain,
        added: bool,
        anchors: tuple[Tensor, ...],
    ) -> Tensor:
        y: Tensor
        y, mask = _forward(x, None if added else bias, residual, seed, slopes, *chain.arguments, True)
        if chain.activation.saves == "mask":
            ctx.save_for_backward(mask, None, None if chain.activation.row.mask_gates else seed, None)
        else:
            ctx.save_for_backward(x, bias, seed, slopes)
            needs(ctx, residual)
        ctx.strides = y.stride()
        ctx.chain = chain
        ctx.added = added
        ctx.anchors = anchors
        return y

    @staticmethod
    def recipe(ctx: Any) -> Callable[..., Tensor] | None:
        chain = ctx.chain
        if chain.activation.saves == "mask":
            return None
        added = ctx.added

        def again(
            x: Tensor, bias: Tensor | None, seed: Tensor | None, slopes: Tensor | None, residual: Tensor | None
        ) -> Tensor:
            y: Tensor = _forward(x, None if added else bias, residual, seed, slopes, *chain.arguments, False)[0]
            return y

        return again

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        saved, bias, seed, slopes = ctx.saved_tensors
        chain = ctx.chain
        needs_dx, needs_db, needs_dr, needs_dslopes = ctx.needs_input_grad[:4]
        dx: Tensor | None = None
        db: Tensor | None = None
        dslopes: Tensor | None = None
        if not (needs_dx or needs_db or needs_dslopes):
            pass
        elif not torch.is_grad_enabled():
            rest = (seed, slopes, ctx.strides, *chain.arguments, needs_db or needs_dslopes)
            dx, partial = _backward(g, saved, None if ctx.added else bias, *rest)
            sums = partial.sum((-3, -1)).to(dx.dtype) if needs_db or needs_dslopes else None  # where a compiler sees it
            db, dslopes = (sums, None) if sums is None or slopes is None else sums.unbind()
            if dslopes is not None:
                dslopes = (dslopes.sum() if slopes.numel() == 1 else dslopes).view(slopes.shape)
        elif chain.activation.saves == "mask":
            arguments = (ctx.strides, *chain.arguments)
            dx = LinearGradient.apply(g, saved, seed, _masked_gradient, arguments, *ctx.anchors)
            db = dx.sum([other for other in range(dx.dim()) if other != chain.dim])
        else:
            if ctx.added and bias is not None:
                bias = bias - bias.detach()  # nothing, but for its gradient
            dx, db, dslopes = _differentiable_gradients(g, saved, bias, slopes, seed, chain)
        return (
            dx if needs_dx else None,
            db if needs_db else None,
            g if needs_dr else None,
            dslopes if needs_dslopes else None,
            *(None,) * 4,
        )


def _masked_gradient(g: Tensor, mask: Tensor, seed: Tensor | None, *arguments: Any) -> Tensor:
    """The gradient of the input where bits are saved, linear in that of the output."""
    dx: Tensor
    dx, _ = _backward(g, mask, None, seed, None, *arguments, False)
    return dx


def _differentiable_gradients(
    g: Tensor, x: Tensor, bias: Tensor | None, slopes: Tensor | None, seed: Tensor | None, chain: Chain
) -> list[Tensor | None]:
    """The gradients of the input, the bias and the slopes, from stock operators that can be differentiated again."""
    noise, _ = _forward(torch.ones_like(x), None, None, seed, None, *chain._replace(activation=_NOISE).arguments, False)
    operands = (x, bias, slopes)
    needed = [t is not None and t.requires_grad for t in operands]
    return stock_gradients(
        lambda x, bias, slopes: stock_activation(_biased(x, bias, chain.dim), chain.activation, slopes) * noise,
        operands,
        needed,
        g,
    )


#: What leaves of ones the numbers that dropout multiplies by.
_NOISE = Activated(ACTIVATIONS["relu"])


def _biased(x: Tensor, bias: Tensor | None, dim: int) -> Tensor:
    if bias is None:
        return x
    shape = [1] * x.dim()
    shape[dim] = -1
    return x + bias.view(shape)


@or_stock
def bias_activation_dropout(
    input: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    p: float = 0.5,
    activation: str | None = "relu",
    parameters: Sequence[float] = (),
    training: bool = True,
    dim: int = -1,
    *,
    slopes: Tensor | None = None,
    of_channels: bool = False,
) -> Tensor:
    """dropout(activation(input + bias)) + residual, in one kernel each way.

    In evaluation nothing is dropped.  The sums are not rounded in between.

    Args:
        input: any shape of at least one dimension, float16, bfloat16, float32 or float64.
        bias: (input.shape[dim],), or None.  Under autocast it is taken in the input's dtype.
        residual: of the input's shape, or None.
        p: probability to drop an element.
        activation: a name of `torch.nn.functional` (``"relu"``, ``"gelu"``, ...), ``"gelu_tanh"``, or None for none.
        parameters: the activation's scalar parameters in PyTorch's order; its defaults, where they are missing.
        training: whether to drop at all.
        dim: the dimension that the bias lies along: -1 after a linear layer, 1 after a convolution.
        slopes: those of PReLU, which then is the activation: one, or one for each channel of dimension 1.
        of_channels: whether dropout drops whole channels, those of dimension 1, as `dropout2d` does.

    Saves one bit an element where the activation's gradient is 0 or 1 (ReLU, ReLU6, Hardtanh, Threshold, Hardsigmoid),
    one bit and a seed for LeakyReLU, and otherwise the input and a seed; of PReLU the slopes, too.  Raises ValueError
    for an unknown activation or too many parameters, and stock's errors.  Source: Srivastava et al., "Dropout: A Simple
    Way to Prevent Neural Networks from Overfitting" (JMLR 2014).
    """
    if isinstance(input, Tensor) and autocast_dtype(input):
        bias, slopes = (None if one is None else one.to(input.dtype) for one in (bias, slopes))
    operands = (input, bias, residual, slopes)
    y: Tensor | None = _by_kernels(*operands, p, training, dim, of_channels, False, activation, *parameters)
    if y is not None:
        return y
    y = _by_stock(_biased(input, bias, dim), slopes, p, training, of_channels, activation, parameters)
    return y if residual is None else y + residual


def conv_activation_dropout(
    convolution: Callable[[Tensor | None], Tensor],
    bias: Tensor | None,
    p: float,
    activation: str | None,
    parameters: Sequence[float],
    training: bool,
    dim: int,
    *,
    slopes: Tensor | None = None,
    of_channels: bool = False,
) -> Tensor:
    """dropout(activation(convolution(bias))): `bias_activation_dropout` behind ``convolution(None)``.

    Where no kernel takes its result, the convolution adds the bias itself.
    """
    z = convolution(None)
    addend = bias
    if autocast_dtype(z):
        addend, weights = (None if one is None else one.to(z.dtype) for one in (bias, slopes))
    else:
        weights = slopes
    y: Tensor | None = _by_kernels(
        z, addend, None, weights, p, training, dim, of_channels, False, activation, *parameters
    )
    if y is not None:
        return y
    return _by_stock(z if bias is None else convolution(bias), slopes, p, training, of_channels, activation, parameters)


def _by_stock(
    x: Tensor,
    slopes: Tensor | None,
    p: float,
    training: bool,
    of_channels: bool,
    activation: str | None,
    parameters: Sequence[float],
) -> Tensor:
    """dropout(activation(x)), by stock operators."""
    resolved = resolve_activation(activation, parameters) if slopes is None else PRELU
    return drop_of(x, of_channels)(stock_activation(x, resolved, slopes), p, training)


def drop_of(x: Tensor, of_channels: bool) -> Callable[..., Tensor]:
    """Stock's dropout of such a tensor's elements, or channels."""
    return _CHANNELS.get(x.dim(), F.dropout2d) if of_channels else F.dropout


#: Stock's dropout of channels by the number of dimensions.
_CHANNELS = {3: F.dropout1d, 4: F.dropout2d, 5: F.dropout3d}


def linear_activation_dropout(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    p: float,
    activation: str | None,
    parameters: Sequence[float],
    training: bool,
    *,
    slopes: Tensor | None = None,
) -> Tensor:
    """dropout(activation(x weight^T + bias)): `bias_activation_dropout` behind a product that holds the bias.

    So the product is rounded once, as in `torch.nn.functional.linear`; the bias's gradient is summed where that of the
    product is made.
    """
    if bias is None:
        product = F.linear(input, weight)
        return bias_activation_dropout(product, None, None, p, activation, parameters, training, slopes=slopes)
    product = F.linear(input, weight, bias.detach())
    addend = bias
    if autocast_dtype(input):
        addend, slopes = bias.to(product.dtype), None if slopes is None else slopes.to(product.dtype)
    options = (p, training, -1, False, True, activation, *parameters)
    y: Tensor | None = _by_kernels(product, addend, None, slopes, *options)
    if y is not None:
        return y
    return _by_stock(F.linear(input, weight, bias), slopes, p, training, False, activation, parameters)


@decided_once
def _by_kernels(
    input: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    slopes: Tensor | None,
    p: float,
    training: bool,
    dim: int,
    of_channels: bool,
    added: bool,
    activation: str | None,
    *parameters: float,
) -> Callable[..., Tensor | None]:
    """`bias_activation_dropout` by its kernels, or None; ``added`` as of `BiasActivationDropout`."""
    resolved = resolve_activation(activation, parameters) if slopes is None else PRELU
    operands = [operand for operand in (input, bias, residual, slopes) if operand is not None]
    described = (input, bias, residual, slopes, p, resolved, training, dim, of_channels)
    last = isinstance(input, Tensor) and dim in (-1, input.dim() - 1)
    if not takes_kernel(_name(p, training, last), *operands, refusal=lambda: _refusal(*described)):
        return lambda *_: None
    p = float(p) if training else 0.0
    chain = Chain(resolved, p, dim % input.dim(), of_channels and p > 0)
    anchored = resolved.saves == "mask"
    differentiable = torch.is_grad_enabled() and any(operand.requires_grad for operand in operands)

    def compute(
        seed: Tensor | None, input: Tensor, bias: Tensor | None, residual: Tensor | None, slopes: Tensor | None
    ) -> Tensor:
        y: Tensor
        if differentiable:
            anchors = anchors_of(input, bias) if anchored else ()
            y = BiasActivationDropout.apply(input, bias, residual, slopes, seed, chain, added, anchors)
        else:
            y, _mask = _forward(input, None if added else bias, residual, seed, slopes, *chain.arguments, False)
        return y

    def apply(input: Tensor, bias: Tensor | None, residual: Tensor | None, slopes: Tensor | None, *_: object) -> Tensor:
        if chain.p == 0:
            return compute(None, input, bias, residual, slopes)
        return with_seed(input.device, lambda seed: compute(seed, input, bias, residual, slopes))

    return apply


def _name(p: object, training: object, last: bool) -> str:
    """The operation's name: without dropout, or where the bias isn't ``last``, it is another that a compiler fuses."""
    if not (training and p):
        return "bias_activation"
    return "bias_activation_dropout" if last else "channel_bias_activation_dropout"


def _refusal(
    input: object,
    bias: object,
    residual: object,
    slopes: Tensor | None,
    p: object,
    activation: Activated,
    training: object,
    dim: int,
    of_channels: bool,
) -> str | None:
    if not isinstance(input, Tensor) or not all(isinstance(t, Tensor | None) for t in (bias, residual, slopes)):
        return "not a tensor"
    if input.dim() == 0 or not -input.dim() <= dim < input.dim():
        return "no such dimension"
    if isinstance(bias, Tensor) and bias.shape != (input.shape[dim],):
        return "the bias is not one number for each channel"
    if isinstance(residual, Tensor) and residual.shape != input.shape:
        return "the residual is of another shape"
    if slopes is not None and (slopes.dim() > 1 or (slopes.numel() != 1 and not _are_channels(slopes, input, dim))):
        return "the slopes are neither one nor one per channel"
    if of_channels and not (2 < input.dim() < 6 and input.numel() and kernels.has_channels(input)):
        return "the channels that are dropped don't lie one after another, or last"
    if not (-inf < activation.a < inf and -inf < activation.b < inf):
        return "a parameter is not finite"
    if not isinstance(p, float | int) or not 0 <= p <= 1:
        return "p is not a probability"
    if type(training) is not bool:
        return "training is not a boolean"
    return activation.refusal()


def _are_channels(slopes: Tensor, input: Tensor, dim: int) -> bool:
    """Whether there is a slope for each channel, and these lie along dimension 1, as those of the bias do."""
    return dim % input.dim() == 1 and slopes.numel() == input.shape[1]
