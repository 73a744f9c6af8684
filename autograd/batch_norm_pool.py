"""Batch norm or a bias, an activation, and the maximum or the mean over all places behind it, in their last pass.

The activated tensor is never written.  The gradient of maxima is that of as many elements as there are channels: sums
are over these alone, and one pass over the input, or none, scatters it.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from ..kernels import batch_norm_gradients
from ..kernels import batch_norm_pool as kernels
from ..kernels.base.launch import ACCUMULATOR
from ..kernels.base.layout import placed
from ..kernels.batch_norm_operands import Around, Norm
from ..kernels.functions.activation import IDENTITY, PRELU, Activated, activated
from . import stock as F
from .activation import resolve_activation, stock_activation
from .batch_norm_arguments import NormArguments, those_given
from .batch_norm_chain import slopes_refusal
from .batch_norm_operators import statistics
from .dispatch import autocast_dtype, takes_kernel
from .gradients import stock_gradients
from .operators import given, operator

__all__ = ["activation_pool", "batch_norm_pool"]

# --- Operators --------------------------------------------------------------------------------------------------------

#: What both of them are given: statistics, or none, parameters, and the activation.
_CHAIN = (
    "Tensor? mean, Tensor? variance, Tensor? weight, Tensor? bias, Tensor? slopes, float eps, str name, float a,"
    " float b"
)


def _fake_pool(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, maximum, keeps = arguments
    y = x.new_empty(x.shape[:2])
    kept = y.shape if maximum and keeps else (0,)
    return y, x.new_empty(kept), x.new_empty(kept, dtype=torch.int64)


@operator(f"batch_norm_pool(Tensor x, {_CHAIN}, bool maximum, bool keeps) -> (Tensor, Tensor, Tensor)", fake=_fake_pool)
def _forward(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`fusednn.kernels.batch_norm_pool.batch_norm_pool`; empty tensors stand for None."""
    *rest, maximum, keeps = arguments
    y, winner, position = kernels.batch_norm_pool(x, *_parsed(*rest), maximum=maximum, keeps=keeps)
    if winner is None or position is None:
        return y, x.new_empty(0), x.new_empty(0, dtype=torch.int64)
    return y, winner, position


def _parsed(
    mean: Any, variance: Any, weight: Any, bias: Any, slopes: Any, eps: float, *activation: Any
) -> tuple[Norm, Around]:
    """What kernels are given in their place."""
    return Norm(mean, variance, weight, bias, eps), Around(activated(*activation), slopes)


def _fake_backward(g: Tensor, x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    slopes = arguments[6]
    return torch.empty_like(x), x.new_empty((2 if slopes is None else 3, x.shape[1]), dtype=ACCUMULATOR[x.dtype])


@operator(
    f"batch_norm_pool_backward(Tensor g, Tensor x, Tensor? winner, Tensor? position, {_CHAIN}, bool training)"
    " -> (Tensor, Tensor)",
    fake=_fake_backward,
)
def _backward(
    g: Tensor, x: Tensor, winner: Tensor | None, position: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor]:
    """The gradient of the input, and sums over each channel: the gradients of bias, weight and slopes."""
    *rest, training = arguments
    norm, around = _parsed(*rest)
    places = x.numel() // g.numel()
    maximum, normalised = winner is not None, norm.mean is not None
    partial, dz = batch_norm_gradients.batch_norm_reduce(
        *(g, winner if winner is not None else x, None, None, norm, around),
        places=None if maximum else places,
        emits=maximum or not normalised,
    )
    sums = partial.sum(0)
    if dz is not None and not maximum:
        return dz, sums
    if dz is not None:
        g, around = dz, Around(IDENTITY)
        norm = norm if normalised else Norm(None, None, None, None, norm.eps)
    dx, *_ = batch_norm_gradients.batch_norm_backward(
        *(g, x, sums[None, : 2 if around.slopes is None else 3] if training else None, x.shape[1] / x.numel()),
        *(norm, around),
        affine=False,
        places=places,
        position=position,
    )
    return dx, sums


# --- Gradients --------------------------------------------------------------------------------------------------------


class Chain(NamedTuple):
    """What is reduced: of the input normalised by the batch's statistics (``training``) or others, or with a bias."""

    maximum: bool
    training: bool
    eps: float
    activation: Activated

    @property
    def arguments(self) -> tuple[Any, ...]:
        """What operators are given of it."""
        return self.eps, *self.activation.arguments


class BatchNormPool(Function):
    """Saves the input, the parameters and the statistics; of maxima the input there, and the place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *arguments: Any) -> Tensor:
        y: Tensor
        weight, bias, slopes, mean, variance, chain = arguments
        vectors = (mean, variance, weight, bias, slopes)
        y, winner, position = _forward(x, *vectors, *chain.arguments, chain.maximum, True)
        ctx.save_for_backward(x, given(winner), given(position), *vectors)
        ctx.chain = chain
        return y

    @staticmethod
    def recipe(ctx: Any) -> Callable[..., Tensor]:
        chain = ctx.chain

        def again(x: Tensor, winner: Tensor | None, position: Tensor | None, *vectors: Tensor | None) -> Tensor:
            y: Tensor = _forward(x, *vectors, *chain.arguments, chain.maximum, False)[0]
            return y

        return again

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, winner, position, mean, variance, weight, bias, slopes = ctx.saved_tensors
        chain = ctx.chain
        needed = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled():
            dtype = x.dtype if weight is None else weight.dtype
            mean, variance = (None if chain.training or one is None else one.to(dtype) for one in (mean, variance))

            def chained(x: Tensor, weight: Tensor | None, bias: Tensor | None, slopes: Tensor | None) -> Tensor:
                if chain.training or mean is not None:
                    x = F.batch_norm(x, mean, variance, weight, bias, chain.training, 0.0, chain.eps)
                elif bias is not None:
                    x = x + bias.view(-1, *[1] * (x.dim() - 2))
                return _by_stock(x, slopes, chain)

            return *stock_gradients(chained, (x, weight, bias, slopes), needed, g), None, None, None
        vectors = (mean, variance, weight, bias, slopes)
        dx, sums = _backward(g, x, winner, position, *vectors, *chain.arguments, chain.training)
        dbias, dweight, *dslopes = sums.unbind()
        if slopes is not None:
            dslopes = [(dslopes[0].sum() if slopes.numel() == 1 else dslopes[0]).view(slopes.shape)]
        found = zip((weight, bias, slopes), (dweight, dbias, *dslopes, None), needed[1:], strict=False)
        gradients = [gradient.to(one.dtype) if wanted else None for one, gradient, wanted in found]
        return dx if needed[0] else None, *gradients, None, None, None


def _by_stock(y: Tensor, slopes: Tensor | None, chain: Chain) -> Tensor:
    """What is behind the normalisation or the bias, by stock operators."""
    y = stock_activation(y, chain.activation, slopes).flatten(2)
    return y.max(2).values if chain.maximum else y.mean(2)


# --- Functions --------------------------------------------------------------------------------------------------------


def batch_norm_pool(
    input: Tensor,
    *arguments: Any,
    maximum: bool,
    activation: str | None = None,
    activation_parameters: Sequence[float] = (),
    slopes: Tensor | None = None,
) -> Tensor:
    """max or mean over all places of activation(batch_norm(x)): (N, C) of (N, C, *).

    Reads the input twice in training and once in evaluation, and writes no tensor of its size.  The other arguments
    are those of `batch_norm_chain`.  Saves the input; of maxima also the input there, and the place.
    """
    norm = NormArguments(*arguments)
    resolved, slopes = _resolved(input, activation, activation_parameters, slopes)

    def refusal() -> str | None:
        return norm.refusal(input) or _refusal(input, slopes, resolved)

    chain = Chain(maximum, norm.training, float(norm.eps), resolved)
    operands, name = those_given(input, slopes), norm.named("batch_norm_pool")
    if not takes_kernel(name, *operands, parameters=norm.vectors, refusal=refusal):
        return _by_stock(norm.stock(input), slopes, chain)
    x = placed(input)
    moments = statistics(x.detach(), *norm.running) if norm.training else (norm.running_mean, norm.running_var)
    return _reduced(x, (*moments, norm.weight, norm.bias, slopes), chain)


def activation_pool(
    product: Callable[[Tensor | None], Tensor],
    bias: Tensor | None,
    activation: str | None,
    parameters: Sequence[float],
    *,
    maximum: bool,
    slopes: Tensor | None = None,
) -> Tensor:
    """max or mean over all places of activation(product(bias)), with a convolution's ``product``.

    Where no kernel takes the result of ``product(None)``, the product adds the bias itself.
    """
    z = product(None)
    resolved, weights = _resolved(z, activation, parameters, slopes)
    addend = bias.to(z.dtype) if bias is not None and autocast_dtype(z) else bias
    chain = Chain(maximum, False, 0.0, resolved)
    operands = those_given(z, addend, weights)
    if not takes_kernel("bias_activation", *operands, refusal=lambda: _refusal(z, weights, resolved)):
        return _by_stock(z if bias is None else product(bias), slopes, chain)
    return _reduced(placed(z), (None, None, None, addend, weights), chain)


def _resolved(
    input: Tensor, activation: str | None, parameters: Sequence[float], slopes: Tensor | None
) -> tuple[Activated, Tensor | None]:
    """The activation, and PReLU's slopes as autocast gives them to it."""
    if slopes is None:
        return resolve_activation(activation, parameters), None
    low = isinstance(input, Tensor) and autocast_dtype(input) is input.dtype
    return PRELU, slopes.to(input.dtype) if low else slopes


def _refusal(input: Tensor, slopes: Tensor | None, activation: Activated) -> str | None:
    if input.dim() < 3 or not input.numel():
        return "there are no places to reduce over"
    if input.shape[2:].numel() > kernels.MOST_PLACES:
        return "there are too many places"
    return activation.refusal() or (None if slopes is None else slopes_refusal(slopes, input))


def _reduced(x: Tensor, vectors: tuple[Tensor | None, ...], chain: Chain) -> Tensor:
    y: Tensor
    mean, variance, *parameters = vectors
    if torch.is_grad_enabled() and any(one.requires_grad for one in those_given(x, *parameters)):
        if mean is not None and variance is not None and not chain.training:
            mean, variance = torch.stack((mean, variance)).unbind()  # they may be updated before the backward pass
        y = BatchNormPool.apply(x, *parameters, mean, variance, chain)
    else:
        y, *_ = _forward(x, *vectors, *chain.arguments, chain.maximum, False)
    return y
