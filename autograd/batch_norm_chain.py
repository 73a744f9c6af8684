"""Batch norm with PReLU or another activation, and dropout, behind it, in its own passes.

The slopes' gradient is one of the sums that batch norm's backward pass makes; dropout is drawn again from its seed.
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
from ..kernels.base.random import with_seed
from ..kernels.functions.activation import IDENTITY, PRELU, Activated, activated
from . import stock as F
from .activation import resolve_activation, stock_activation
from .batch_norm import argument_refusal
from .dispatch import autocast_dtype, takes_kernel
from .gradients import stock_gradients
from .operators import operator

__all__ = ["batch_norm_chain", "slopes_refusal"]

# --- Operators --------------------------------------------------------------------------------------------------------

#: The operands and options that all of them end with: those of `Chain`.
_REST = "Tensor? weight, Tensor? bias, Tensor? slopes, Tensor? seed, float eps, str name, float a, float b, float p"


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
    weight: Tensor | None,
    bias: Tensor | None,
    slopes: Tensor | None,
    seed: Tensor | None,
    eps: float,
    name: str,
    a: float,
    b: float,
    p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The result, and mean and variance of each channel; the running ones are updated."""
    running = (running_mean, running_var, batches, momentum)
    options: dict[str, Any] = {"masked": False, "slopes": slopes, "seed": seed, "p": p}
    y, _, mean, variance = kernels.batch_norm_training(
        x, None, *running, weight, bias, eps, activated(name, a, b), **options
    )
    return y, mean, variance


@operator(
    f"batch_norm_chain(Tensor x, Tensor mean, Tensor variance, {_REST}) -> Tensor",
    fake=lambda x, *_: torch.empty_like(x),
)
def _forward(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    slopes: Tensor | None,
    seed: Tensor | None,
    eps: float,
    name: str,
    a: float,
    b: float,
    p: float,
) -> Tensor:
    vectors = (mean, variance, weight, bias)
    options: dict[str, Any] = {"masked": False, "slopes": slopes, "seed": seed, "p": p}
    return kernels.batch_norm_forward(x, None, *vectors, eps, activated(name, a, b), **options)[0]


@operator(
    f"batch_norm_chain_reduce(Tensor g, Tensor x, Tensor mean, Tensor variance, {_REST}) -> Tensor",
    fake=lambda g, x, mean, variance, weight, bias, slopes, *_: x.new_empty(
        (plan_of(x).splits, 2 if slopes is None else 3, x.shape[1]), dtype=ACCUMULATOR[x.dtype]
    ),
)
def _reduce(
    g: Tensor,
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    slopes: Tensor | None,
    seed: Tensor | None,
    eps: float,
    name: str,
    a: float,
    b: float,
    p: float,
) -> Tensor:
    """Partial sums of the gradients of bias, weight and slopes, (splits, 2 or 3, channels)."""
    operands = (g, x, None, None, mean, variance, weight, bias, eps, activated(name, a, b))
    return batch_norm_gradients.batch_norm_reduce(*operands, slopes=slopes, seed=seed, p=p)[0]


@operator(
    f"batch_norm_chain_backward(Tensor g, Tensor x, Tensor? partial, Tensor mean, Tensor variance, {_REST}) -> Tensor",
    fake=lambda g, x, *_: torch.empty_like(x),
)
def _backward(
    g: Tensor,
    x: Tensor,
    partial: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    slopes: Tensor | None,
    seed: Tensor | None,
    eps: float,
    name: str,
    a: float,
    b: float,
    p: float,
) -> Tensor:
    """The gradient of the input."""
    rest = (x.shape[1] / x.numel(), mean, variance, weight, bias, eps, activated(name, a, b))
    return batch_norm_gradients.batch_norm_backward(g, x, partial, *rest, affine=False, slopes=slopes, seed=seed, p=p)[
        0
    ]


# --- Gradients --------------------------------------------------------------------------------------------------------


class Chain(NamedTuple):
    """What follows the normalisation by statistics of the batch, where ``training``, or by running ones."""

    training: bool
    eps: float
    activation: Activated
    p: float

    @property
    def arguments(self) -> tuple[Any, ...]:
        """What operators are given in its place."""
        return self.eps, *self.activation.arguments, self.p


class BatchNormChain(Function):
    """Saves the input, the parameters, the seed and the statistics: the input's, or the running ones as they were."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        slopes: Tensor | None,
        seed: Tensor | None,
        chain: Chain,
        running: tuple[Any, ...],
    ) -> Tensor:
        y: Tensor
        rest = (weight, bias, slopes, seed, *chain.arguments)
        if chain.training:
            y, mean, variance = _forward_training(x, *running, *rest)
        else:
            mean, variance = torch.stack(running[:2]).unbind()  # they may be updated before the backward pass comes
            y = _forward(x, mean, variance, *rest)
        ctx.save_for_backward(x, weight, bias, slopes, seed, mean, variance)
        ctx.chain = chain
        return y

    @staticmethod
    def recipe(ctx: Any) -> Callable[..., Tensor]:
        chain = ctx.chain

        def again(
            x: Tensor,
            weight: Tensor | None,
            bias: Tensor | None,
            slopes: Tensor | None,
            seed: Tensor | None,
            mean: Tensor,
            variance: Tensor,
        ) -> Tensor:
            y: Tensor = _forward(x, mean, variance, weight, bias, slopes, seed, *chain.arguments)
            return y

        return again

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, slopes, seed, mean, variance = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *_differentiable_gradients(ctx, g), None, None, None
        x_needed, *others_needed = ctx.needs_input_grad[:4]
        training = ctx.chain.training
        rest = (mean, variance, weight, bias, slopes, seed, *ctx.chain.arguments)
        partial = _reduce(g, x, *rest) if any(others_needed) or training else None
        gradients: list[Tensor | None] = [None] * 3
        if partial is not None and any(others_needed):
            dbias, dweight, *dslopes = partial.sum(0).unbind()
            if slopes is not None:
                dslopes = [(dslopes[0].sum() if slopes.numel() == 1 else dslopes[0]).view(slopes.shape)]
            given = zip((weight, bias, slopes), (dweight, dbias, *dslopes, None), others_needed, strict=False)
            gradients = [gradient.to(one.dtype) if needed else None for one, gradient, needed in given]
        dx = _backward(g, x, partial if training else None, *rest) if x_needed else None
        return dx, *gradients, None, None, None


def _differentiable_gradients(ctx: Any, g: Tensor) -> list[Tensor | None]:
    """The gradients, from stock operators that can be differentiated again."""
    x, weight, bias, slopes, seed, mean, variance = ctx.saved_tensors
    chain = ctx.chain
    noise = None
    if seed is not None:  # of zeros, normalised to ones: what dropout multiplies by
        zero, one = torch.zeros_like(mean), torch.ones_like(mean)
        plain = (chain.eps, *IDENTITY.arguments, chain.p)
        noise = _forward(torch.zeros_like(x), zero, one, zero, one, None, seed, *plain)
    dtype = x.dtype if weight is None else weight.dtype
    mean, variance = (None if chain.training else vector.to(dtype) for vector in (mean, variance))

    def chained(x: Tensor, weight: Tensor | None, bias: Tensor | None, slopes: Tensor | None) -> Tensor:
        y = F.batch_norm(x, mean, variance, weight, bias, chain.training, 0.0, chain.eps)
        y = stock_activation(y, chain.activation, slopes)
        return y if noise is None else y * noise

    return stock_gradients(chained, (x, weight, bias, slopes), ctx.needs_input_grad[:4], g)


# --- Function ---------------------------------------------------------------------------------------------------------


def batch_norm_chain(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    *,
    batches: Tensor | None = None,
    activation: str | None = None,
    activation_parameters: Sequence[float] = (),
    slopes: Tensor | None = None,
    p: float = 0.0,
) -> Tensor:
    """dropout(activation(batch_norm(x))), in as many passes over memory as batch norm alone.

    ``slopes``, one or one a channel, are PReLU's, which then is the activation; ``p`` is the probability to drop an
    element, 0 in evaluation.  The other arguments are those of `batch_norm_act`.  Saves the input, and a seed.
    """
    resolved = resolve_activation(activation, activation_parameters) if slopes is None else PRELU
    if slopes is not None and isinstance(input, Tensor) and autocast_dtype(input) is input.dtype:
        slopes = slopes.to(input.dtype)
    vectors = (running_mean, running_var, weight, bias)

    def refusal() -> str | None:
        reason = argument_refusal(input, *vectors, momentum, eps, None, batches)
        if reason is None and slopes is not None:
            reason = slopes_refusal(slopes, input)
        if reason is None and not training and running_mean is None:
            reason = "running statistics are missing"
        if reason is None and training and input.numel() == input.shape[1]:
            reason = "one value per channel"
        if reason is None and p and (not 0 < p < 1 or input.dtype is torch.float64):
            reason = "everything is dropped" if input.dtype is not torch.float64 else "dropout behind a norm in float64"
        return reason or resolved.refusal()

    name = "batch_norm_chain" if batches is None else "cumulative_batch_norm"
    operands = (input,) if slopes is None else (input, slopes)
    parameters = [vector for vector in vectors if vector is not None]
    if not takes_kernel(name, *operands, parameters=parameters, refusal=refusal):
        if batches is not None and training:
            momentum = 1.0 / float(batches)
        y = stock_activation(F.batch_norm(input, *vectors, training, momentum, eps), resolved, slopes)
        return F.dropout(y, p) if p else y
    running = (running_mean, running_var, batches, float(momentum))
    chain = Chain(training, float(eps), resolved, float(p))

    def compute(seed: Tensor | None) -> Tensor:
        y: Tensor
        differentiable = (input, weight, bias, slopes)
        rest = (weight, bias, slopes, seed, *chain.arguments)
        if torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in differentiable):
            y = BatchNormChain.apply(*differentiable, seed, chain, running)
        elif training:
            y, *_ = _forward_training(input, *running, *rest)
        else:
            y = _forward(input, running_mean, running_var, *rest)
        return y

    return with_seed(input.device, compute) if p else compute(None)


def slopes_refusal(slopes: Tensor, input: Tensor) -> str | None:
    """Why kernels of chains don't take these slopes of a PReLU, or None."""
    if slopes.dim() > 1 or slopes.numel() not in (1, input.shape[1]):
        return "the slopes are neither one nor one per channel"
    low = autocast_dtype(input)
    return None if low in (None, input.dtype) else "autocast computes PReLU in its low precision"
