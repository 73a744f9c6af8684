"""Batch norm with an activation before it, and a residual, PReLU or another, and dropout, behind it, in its own passes.

The slopes' gradient is one of the sums that batch norm's backward pass makes; dropout is drawn again from its seed.
With a residual the first pass writes its gradient, too, from which the second goes on.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from ..kernels import batch_norm as kernels
from ..kernels import batch_norm_gradients
from ..kernels.base.channels import plan_of
from ..kernels.base.launch import ACCUMULATOR
from ..kernels.base.layout import placed
from ..kernels.base.random import with_seed
from ..kernels.batch_norm_operands import Around, Before, Norm, Running, spatial_of
from ..kernels.functions.activation import IDENTITY, PRELU, Activated, activated
from . import stock as F
from .activation import resolve_activation, stock_activation
from .batch_norm_arguments import NormArguments, those_given
from .bias_activation_dropout import drop_of
from .dispatch import autocast_dtype, takes_kernel
from .gradients import stock_gradients
from .operators import operator

__all__ = ["batch_norm_chain", "slopes_refusal"]

# --- Operators --------------------------------------------------------------------------------------------------------

#: The operands and options that all of them end with: those of `Chain`, as `_parsed` tells.
_REST = (
    "Tensor? weight, Tensor? bias, Tensor? residual, Tensor? slopes, Tensor? seed, Tensor? shift, float eps, str name,"
    " float a, float b, float p, bool of_channels, str before, float c, float d"
)


def _parsed(mean: Any, variance: Any, *rest: Any) -> tuple[Tensor | None, Norm, Around]:
    """The residual, and what else kernels are given in their place; no name is nothing before.

    Vectors may lie in memory as they like: one element may be all of them.
    """
    weight, bias, residual, slopes, seed, shift, eps, name, a, b, p, of_channels, before, c, d = rest
    first = Before(activated(before, c, d), None if shift is None else shift.contiguous()) if before else None
    norm = Norm(mean, variance, weight, bias, eps)
    return residual, norm, Around(activated(name, a, b), slopes, seed, p, of_channels, first)


@operator(
    "batch_norm_chain_training(Tensor x, Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor? batches,"
    f" float momentum, {_REST}) -> (Tensor, Tensor, Tensor)",
    fake=lambda x, *_: (
        torch.empty_like(x),
        *(x.new_empty(x.shape[1], dtype=ACCUMULATOR[x.dtype]) for _ in range(2)),
    ),
)
def _forward_training(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    batches: Tensor | None,
    momentum: float,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """The result, and mean and variance of each channel; the running ones are updated."""
    residual, norm, around = _parsed(None, None, *rest)
    running = Running(running_mean, running_var, batches, momentum)
    y, _, mean, variance = kernels.batch_norm_training(x, residual, running, norm, around, masked=False)
    return y, mean, variance


@operator(
    f"batch_norm_chain(Tensor x, Tensor mean, Tensor variance, {_REST}) -> Tensor",
    fake=lambda x, *_: torch.empty_like(x),
)
def _forward(x: Tensor, *arguments: Any) -> Tensor:
    return kernels.batch_norm_forward(x, *_parsed(*arguments), masked=False)[0]


@operator(
    f"batch_norm_chain_reduce(Tensor g, Tensor x, Tensor mean, Tensor variance, {_REST}) -> (Tensor, Tensor)",
    fake=lambda g, x, mean, variance, weight, bias, residual, slopes, *rest: (
        x.new_empty((_splits(x, rest[-4]), 2 if slopes is None else 3, x.shape[1]), dtype=ACCUMULATOR[x.dtype]),
        x.new_empty(0) if residual is None else torch.empty_like(x),
    ),
)
def _reduce(g: Tensor, x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """Partial sums of the gradients of bias, weight and slopes, (splits, 2 or 3, channels); that of a residual."""
    residual, norm, around = _parsed(*arguments)
    partial, dz = batch_norm_gradients.batch_norm_reduce(g, x, residual, None, norm, around)
    return partial, x.new_empty(0) if dz is None else dz


def _splits(x: Tensor, of_channels: bool) -> int:
    """How many programs leave sums of a channel."""
    return plan_of(x, spatial_of(x, of_channels)).splits


def _fake_backward(
    g: Tensor, x: Tensor, partial: Tensor | None, mean: Tensor, variance: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    weight, _, _, _, _, shift, *_, of_channels, _, _, _, affine = rest
    sums = (0,) if shift is None else (_splits(x, of_channels), x.shape[1])
    vectors = (torch.empty_like(weight) if affine else x.new_empty(0) for _ in range(2))
    return torch.empty_like(x), *vectors, x.new_empty(sums, dtype=ACCUMULATOR[x.dtype])


@operator(
    f"batch_norm_chain_backward(Tensor g, Tensor x, Tensor? partial, Tensor mean, Tensor variance, {_REST},"
    " bool affine) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_backward,
)
def _backward(g: Tensor, x: Tensor, partial: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
    """Gradients of the input and, where ``affine``, of weight and bias; and partial sums of that of the shift.

    There is no residual: of a chain that has one, ``g`` is its gradient.
    """
    *rest, affine = arguments
    _, norm, around = _parsed(*rest)
    operands = (g, x, partial, x.shape[1] / x.numel(), norm, around)
    dx, dweight, dbias, dshift = batch_norm_gradients.batch_norm_backward(*operands, affine=affine)
    vectors = (x.new_empty(0) if vector is None else vector for vector in (dweight, dbias))
    return dx, *vectors, x.new_empty(0, dtype=ACCUMULATOR[x.dtype]) if dshift is None else dshift


# --- Gradients --------------------------------------------------------------------------------------------------------


class Chain(NamedTuple):
    """What stands around the normalisation by statistics of the batch, where ``training``, or by running ones."""

    training: bool
    eps: float
    activation: Activated
    p: float
    of_channels: bool = False
    before: Activated | None = None

    @property
    def arguments(self) -> tuple[Any, ...]:
        """What operators are given in its place."""
        before = ("", 0.0, 0.0) if self.before is None else self.before.arguments
        return self.eps, *self.activation.arguments, self.p, self.of_channels, *before

    @property
    def linear(self) -> "Chain":
        """What is left of it where the gradient before the activation is given."""
        return self._replace(activation=IDENTITY, p=0.0, of_channels=False)


class BatchNormChain(Function):
    """Saves the input, the parameters, the seed and the statistics: the input's, or the running ones as they were."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        slopes: Tensor | None,
        shift: Tensor | None,
        seed: Tensor | None,
        chain: Chain,
        running: tuple[Any, ...],
    ) -> Tensor:
        y: Tensor
        rest = (weight, bias, residual, slopes, seed, shift, *chain.arguments)
        if chain.training:
            y, mean, variance = _forward_training(x, *running, *rest)
        else:
            mean, variance = torch.stack(running[:2]).unbind()  # they may be updated before the backward pass comes
            y = _forward(x, mean, variance, *rest)
        ctx.save_for_backward(x, mean, variance, weight, bias, residual, slopes, seed, shift)
        ctx.chain = chain
        return y

    @staticmethod
    def recipe(ctx: Any) -> Callable[..., Tensor]:
        chain = ctx.chain

        def again(*saved: Tensor | None) -> Tensor:
            y: Tensor = _forward(*saved, *chain.arguments)
            return y

        return again

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, variance, weight, bias, residual, slopes, seed, shift = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *_differentiable_gradients(ctx, g), None, None, None
        x_needed, weight_needed, bias_needed, residual_needed, slopes_needed, shift_needed = ctx.needs_input_grad[:6]
        chain = ctx.chain
        training = chain.training
        statistics = (mean, variance, weight, bias)
        walks = x_needed or shift_needed
        affine = weight_needed or bias_needed
        # The second pass adds up what the programs of the first left: these are the parameters' gradients.
        merges = affine and walks and training and weight is not None
        dx: Any = None
        dweight: Any = None
        dbias: Any = None
        dslopes: Any = None
        dshift: Any = None
        partial: Any = None
        if affine or slopes_needed or training or residual is not None:
            partial, dz = _reduce(g, x, *statistics, residual, slopes, seed, shift, *chain.arguments)
        if partial is not None and affine and not merges:
            dbias, dweight = partial[:, :2].sum(0).unbind()
        if partial is not None and slopes_needed:
            sums = partial[:, 2]
            dslopes = (sums.sum() if slopes.numel() == 1 else sums.sum(0)).to(slopes.dtype).view(slopes.shape)
        if residual is not None:
            g, chain, slopes, seed = dz, chain.linear, None, None
            partial = partial.sum(0)[None, :2]
        if walks:
            rest = (*statistics, None, slopes, seed, shift, *chain.arguments)
            dx, *merged, dshift = _backward(g, x, partial if training else None, *rest, merges)
            if merges:
                dweight, dbias = merged
        return (
            dx if x_needed else None,
            dweight.to(weight.dtype) if weight_needed else None,
            dbias.to(bias.dtype) if bias_needed else None,
            g if residual_needed else None,
            dslopes,
            dshift.sum(0).to(shift.dtype) if shift_needed else None,
            *[None] * 3,
        )


def _differentiable_gradients(ctx: Any, g: Tensor) -> list[Tensor | None]:
    """The gradients, from stock operators that can be differentiated again."""
    x, mean, variance, weight, bias, residual, slopes, seed, shift = ctx.saved_tensors
    chain = ctx.chain
    noise = None
    if seed is not None:  # of zeros, normalised to ones: what dropout multiplies by
        zero, one = torch.zeros_like(mean), torch.ones_like(mean)
        plain = chain._replace(activation=IDENTITY, before=None)
        noise = _forward(torch.zeros_like(x), zero, one, zero, one, None, None, seed, None, *plain.arguments)
    dtype = x.dtype if weight is None else weight.dtype
    mean, variance = (None if chain.training else vector.to(dtype) for vector in (mean, variance))

    def chained(x: Tensor, *operands: Tensor | None) -> Tensor:
        weight, bias, residual, slopes, shift = operands
        x = _before(x if shift is None else x + shift.view(-1, *[1] * (x.dim() - 2)), chain)
        y = F.batch_norm(x, mean, variance, weight, bias, chain.training, 0.0, chain.eps)
        y = stock_activation(y if residual is None else y + residual, chain.activation, slopes)
        return y if noise is None else y * noise

    return stock_gradients(chained, (x, weight, bias, residual, slopes, shift), ctx.needs_input_grad[:6], g)


def _before(x: Tensor, chain: Chain) -> Tensor:
    """What is normalised, by stock operators."""
    return x if chain.before is None else stock_activation(x, chain.before)


# --- Function ---------------------------------------------------------------------------------------------------------


def batch_norm_chain(
    input: Tensor,
    *arguments: Any,
    residual: Tensor | None = None,
    activation: str | None = None,
    activation_parameters: Sequence[float] = (),
    slopes: Tensor | None = None,
    p: float = 0.0,
    of_channels: bool = False,
    before: str | None = None,
    before_parameters: Sequence[float] = (),
    product: Callable[[Tensor | None], Tensor] | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """dropout(activation(batch_norm(before(x + shift)) + residual)), in as many passes over memory as batch norm alone.

    ``arguments`` are `NormArguments`.  ``slopes``, one or one a channel, are PReLU's, which then is the activation;
    ``p`` is the probability to drop an element, or ``of_channels`` a sample's whole channel; 0 in evaluation.
    ``before`` is an activation before the norm, with ``before_parameters``; in front of it ``shift``, the bias of what
    made the input, ``product(None)``, is added: ``product(shift)`` makes it for stock operators.  The other options are
    those of `batch_norm_act`.  Saves the input, the residual, and a seed.
    """
    resolved = resolve_activation(activation, activation_parameters) if slopes is None else PRELU
    first = None if before is None else resolve_activation(before, before_parameters)
    given = shift
    if isinstance(input, Tensor) and autocast_dtype(input) is input.dtype:
        slopes, shift = (None if one is None else one.to(input.dtype) for one in (slopes, shift))
    norm = NormArguments(*arguments)
    chain = Chain(norm.training, float(norm.eps), resolved, float(p), of_channels and p > 0, first)

    def refusal() -> str | None:
        reason = norm.refusal(input, activation=resolved)
        if reason is None and slopes is not None:
            reason = slopes_refusal(slopes, input)
        if reason is None and p and (not 0 < p < 1 or input.dtype is torch.float64):
            reason = "everything is dropped" if input.dtype is not torch.float64 else "dropout behind a norm in float64"
        if reason is None and chain.of_channels and not 2 < input.dim() < 6:
            reason = "the channels that are dropped have no places"
        if reason is None and residual is not None and residual.shape != input.shape:
            reason = "the residual has another shape"
        return reason or (None if first is None else first.refusal())

    operands, name = those_given(input, residual, slopes, shift), norm.named("batch_norm_chain")
    if not takes_kernel(name, *operands, parameters=norm.vectors, refusal=refusal):
        y = norm.stock(_before(input if given is None or product is None else product(given), chain))
        y = stock_activation(y if residual is None else y + residual, resolved, slopes)
        return drop_of(y, of_channels)(y, p) if p else y

    def compute(seed: Tensor | None) -> Tensor:
        y: Tensor
        x = placed(input) if chain.of_channels else input
        differentiable = (x, norm.weight, norm.bias, residual, slopes, shift)
        rest = (norm.weight, norm.bias, residual, slopes, seed, shift, *chain.arguments)
        if torch.is_grad_enabled() and any(one.requires_grad for one in those_given(*differentiable)):
            y = BatchNormChain.apply(*differentiable, seed, chain, norm.running)
        elif norm.training:
            y, *_ = _forward_training(x, *norm.running, *rest)
        else:
            y = _forward(x, norm.running_mean, norm.running_var, *rest)
        return y

    return with_seed(input.device, compute) if p else compute(None)


def slopes_refusal(slopes: Tensor, input: Tensor) -> str | None:
    """Why kernels of chains don't take these slopes of a PReLU, or None."""
    if slopes.dim() > 1 or slopes.numel() not in (1, input.shape[1]):
        return "the slopes are neither one nor one per channel"
    low = autocast_dtype(input)
    return None if low in (None, input.dtype) else "autocast computes PReLU in its low precision"
