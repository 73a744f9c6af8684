"""Batch norm with the signature of ``torch.nn.functional.batch_norm``, and fused with a residual and an activation.

Two steps: the statistics (and the update of the running ones), and the normalisation with them.  One
``torch.autograd.Function`` takes the statistics as given, or computes them, and its backward pass is told whether they
depend on the input.  `fusednn.autograd.sync_batch_norm` puts collectives between the steps.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..kernels.base.launch import ACCUMULATOR
from ..kernels.functions.activation import IDENTITY, Activated
from . import stock as F
from .activation import resolve_activation, stock_activation
from .batch_norm_arguments import NormArguments, norm_and_rest, those_given
from .batch_norm_operators import (
    backward,
    backward_training,
    forward,
    forward_training,
    merge_statistics,
    reduce,
    statistics,
)
from .decisions import decided_once
from .dispatch import or_stock, takes_kernel
from .function import Function
from .gradients import stock_gradients
from .recompute import needs

__all__ = ["BatchNorm", "batch_norm", "batch_norm_act", "begin_batch_norm", "channel_statistics"]

# --- Gradients ------------------------------------------------------------------------------------------------------


class BatchNorm(Function):
    """activation(normalised x * weight + bias + residual), with given statistics, or those of x.

    Saves the input and the statistics; ``running`` is what computes these and updates the running ones.  With a
    residual and an activation it also saves what the activation's gradient needs: the bits of a mask where that
    suffices, else the residual.  The bias is saved only where the activation's argument is computed from it again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor | None,
        variance: Tensor | None,
        training: bool,
        eps: float,
        activation: Activated,
        *running: Any,
    ) -> Tensor:
        joined = residual is not None and activation.saves != "nothing"
        # Compilers may give the backward pass operands of other strides, by which bits of a mask would be another's.
        masked = joined and activation.saves == "mask" and not torch.compiler.is_compiling()
        y: Tensor
        rest = (weight, bias, eps, *activation.arguments, masked)
        if mean is None or variance is None:
            y, mask, mean, variance = forward_training(x, residual, *running, *rest)
        else:
            y, mask = forward(x, residual, mean, variance, *rest)
        kept = residual if joined and not masked else None
        again = activation.saves != "nothing" and not masked
        ctx.save_for_backward(x, kept, mask if masked else None, weight, bias if again else None, mean, variance)
        needs(ctx, residual if kept is None else None, bias)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.arguments = (training, eps, activation)
        return y

    @staticmethod
    def recipe(ctx: Any) -> Callable[..., Tensor]:
        _, eps, activation = ctx.arguments

        def again(
            x: Tensor,
            kept: Tensor | None,
            mask: Tensor | None,
            weight: Tensor | None,
            _: Tensor | None,
            mean: Tensor,
            variance: Tensor,
            residual: Tensor | None,
            bias: Tensor | None,
        ) -> Tensor:
            joined = residual if kept is None else kept
            y: Tensor = forward(x, joined, mean, variance, weight, bias, eps, *activation.arguments, False)[0]
            return y

        return again

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            return _differentiable_gradients(ctx, g)
        return gradients(ctx, g)


def gradients(
    ctx: Any, g: Tensor, combine: Callable[[Tensor], tuple[Tensor, float]] | None = None
) -> tuple[Tensor | None, ...]:
    """Gradients of the arguments of `BatchNorm`.

    ``combine`` makes of the sums of dz and dz * normalised x, (2, channels), those over a larger batch that this is a
    part of, and gives 1 / its values per channel besides.
    """
    x, residual, mask, weight, bias, mean, variance = ctx.saved_tensors
    training, eps, activation = ctx.arguments
    x_needed, residual_needed, weight_needed, bias_needed, *_ = ctx.needs_input_grad
    # Where the activation's argument isn't computed again, the bias isn't read: the weight in its place spares zeros.
    unread = mask is not None or activation.saves == "nothing"
    vectors = (mean, variance, weight, weight if unread else bias, eps)
    dx, dweight, dbias = None, None, None
    joined = residual is not None or mask is not None
    affine = weight_needed or bias_needed
    if x_needed and training and combine is None and (weight is not None or not affine):
        # The second pass adds up what the programs of the first left: these are the parameters' gradients.
        operands = (g, x, residual, mask, *vectors, *activation.arguments, affine)
        dx, dz, dweight, dbias = backward_training(*operands)
        g = dz if joined else g
    else:
        partial, share = None, x.shape[1] / max(x.numel(), 1)
        if affine or joined or (x_needed and training):
            partial, dz = reduce(g, x, residual, mask, *vectors, *activation.arguments)
            sums: Any = partial.sum(0) if affine or combine is not None else None
            if affine:
                dbias, dweight = sums.to(weight.dtype if weight_needed else ctx.bias_dtype).unbind()
            if x_needed and training and combine is not None:
                sums, share = combine(sums)
                partial = sums[None]
            if joined:
                g, activation = dz, IDENTITY
        if x_needed:
            dx, *_ = backward(g, x, partial if training else None, share, *vectors, *activation.arguments, False)
    return (
        dx,
        g if residual_needed else None,
        dweight if weight_needed else None,
        dbias if bias_needed else None,
        *[None] * (len(ctx.needs_input_grad) - 4),
    )


def _differentiable_gradients(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients, from stock operators that can be differentiated again."""
    x, residual, mask, weight, bias, mean, variance = ctx.saved_tensors
    training, eps, activation = ctx.arguments
    if mask is not None:
        # The gradient of the activation is linear: its slopes, which the mask tells, are constants.
        with torch.no_grad():
            vectors = (mean, variance, weight, bias, eps)
            _, slopes = reduce(torch.ones_like(g), x, None, mask, *vectors, *activation.arguments)
        g, activation = g * slopes, IDENTITY
    dtype = next((vector.dtype for vector in (weight, bias) if vector is not None), mean.dtype)
    mean, variance = (None if training else vector.to(dtype) for vector in (mean, variance))

    def norm_act(x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        y = F.batch_norm(x, mean, variance, weight, bias, training, 0.0, eps)
        return apply_activation(y, residual, activation)

    operands = (x, residual, weight, bias)
    dx, dresidual, dweight, dbias = stock_gradients(norm_act, operands, ctx.needs_input_grad[:4], g)
    if residual is None and ctx.needs_input_grad[1]:
        dresidual = g
    if bias is None and ctx.needs_input_grad[3]:
        dbias = g.sum([dim for dim in range(g.dim()) if dim != 1], dtype=ctx.bias_dtype)
    return dx, dresidual, dweight, dbias, *[None] * (len(ctx.needs_input_grad) - 4)


# --- Functions ------------------------------------------------------------------------------------------------------


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias, for each channel.  As `torch.nn.functional.batch_norm`.

    Input (N, C, *).  In training the statistics are those of the input, and the running ones are updated by
    ``momentum`` (the variance with the unbiased one); otherwise they are the running ones.  Saves the input.  Source:
    Ioffe and Szegedy, "Batch Normalization" (ICML 2015).
    """
    y: Tensor = _batch_norm(
        *(input, None, running_mean, running_var, weight, bias, training, momentum, eps, None),
        None,
    )
    return y


def batch_norm_act(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    batches: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = "relu",
    activation_parameters: Sequence[float] = (),
) -> Tensor:
    """activation(batch_norm(x) + residual), in as many passes over memory as batch norm alone.

    Arguments as of `batch_norm`, and:

    Args:
        batches: the number of batches so far, a tensor of one integer, takes the place of ``momentum``: the running
            statistics are then the averages over all batches, without a host synchronisation.
        residual: added before the activation; of the input's shape, or one that can be expanded to it.
        activation: a name of `fusednn.autograd`'s activations, ``"gelu_tanh"``, or None.  Raises ValueError for others.
        activation_parameters: its scalar parameters in PyTorch's order; its defaults, where they are missing.

    Saves the input; with a residual, one bit an element for activations whose gradient needs no more (ReLU and its
    like), and the residual for the others.
    """
    y: Tensor = _batch_norm(
        *(input, residual, running_mean, running_var, weight, bias, training, momentum, eps, batches),
        *(activation, *activation_parameters),
    )
    return y


@decided_once
def _batch_norm(input: Tensor, residual: Tensor | None, *arguments: Any) -> Callable[..., Tensor]:
    """`batch_norm_act`, by its kernels or by stock operators; the activation and its parameters come last."""
    norm, (activation, *parameters) = norm_and_rest(arguments)
    resolved = resolve_activation(activation, parameters)
    name = norm.named("batch_norm" if resolved.saves == "nothing" and residual is None else "batch_norm_act")
    operands = those_given(input, residual)
    if not takes_kernel(
        name, *operands, parameters=norm.vectors, refusal=lambda: norm.refusal(input, residual, resolved)
    ):
        return partial(_stock, resolved)
    if not norm.training:
        return partial(_in_evaluation, resolved)
    differentiable = _requires_grad(input, residual, norm.weight, norm.bias)
    return _in_training(float(norm.momentum), float(norm.eps), resolved, differentiable=differentiable)


def _stock(
    activation: Activated,
    input: Tensor,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    batches: Tensor | None,
    *_: object,
) -> Tensor:
    """`_batch_norm` by PyTorch's operators, as of small tensors, of which what the host does counts."""
    if batches is None:
        y = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    else:
        y = NormArguments(running_mean, running_var, weight, bias, training, momentum, eps, batches).stock(input)
    return apply_activation(y, residual, activation)


def begin_batch_norm(
    input: Tensor, norm: NormArguments, partial: Tensor | None
) -> Callable[[Tensor | None, Activated], Tensor]:
    """`batch_norm_act` in training up to where it needs the residual: all that it changes, and all but the last pass.

    The rest is the function that it returns, of a residual of the input's shape and dtype, and the activation.
    ``partial`` are statistics of parts of the input, where there are some already.
    """
    if not takes_kernel(norm.named("batch_norm"), input, parameters=norm.vectors, refusal=lambda: norm.refusal(input)):
        y = norm.stock(input)
        return lambda residual, activation: apply_activation(y, residual, activation)
    running = norm.running
    moments = statistics(input.detach(), *running) if partial is None else merge_statistics(partial, *running)

    def finish(residual: Tensor | None, activation: Activated) -> Tensor:
        rest = (norm.weight, norm.bias, *moments)
        if takes_kernel("batch_norm_act", *those_given(input, residual), refusal=activation.refusal):
            return normalise(BatchNorm, (input, residual, *rest), True, norm.eps, activation)
        y = normalise(BatchNorm, (input, None, *rest), True, norm.eps, IDENTITY)
        return apply_activation(y, residual, activation)

    return finish


def apply_activation(y: Tensor, residual: Tensor | None, activation: Activated) -> Tensor:
    """activation(y + residual), by stock operators."""
    return stock_activation(y if residual is None else y + residual, activation)


@or_stock
def channel_statistics(input: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel (dimension 1), without gradients.

    In float32, float64 for float64 inputs.
    """
    input = input.detach()
    refusal = "no dimension of channels" if input.dim() < 2 else None
    if takes_kernel("channel_statistics", input, refusal=lambda: refusal):
        mean, variance = statistics(input, None, None, None, 0.0)
    else:
        others = [dim for dim in range(input.dim()) if dim != 1]
        variance, mean = torch.var_mean(input.to(ACCUMULATOR[input.dtype]), others, correction=0)
    return mean, variance


def _in_training(momentum: float, eps: float, activation: Activated, *, differentiable: bool) -> Callable[..., Tensor]:
    """`_batch_norm` with the input's statistics."""

    def apply(
        input: Tensor,
        residual: Tensor | None,
        mean: Tensor | None,
        variance: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        *rest: Any,  # training, momentum, eps, batches, and the activation
    ) -> Tensor:
        y: Tensor
        running = (mean, variance, rest[3], momentum)
        if differentiable:
            y = BatchNorm.apply(input, residual, weight, bias, None, None, True, eps, activation, *running)
        else:
            y = forward_training(input, residual, *running, weight, bias, eps, *activation.arguments, False)[0]
        return y

    return apply


def _in_evaluation(activation: Activated, input: Tensor, residual: Tensor | None, *arguments: Any) -> Tensor:
    """`_batch_norm` with the running statistics."""
    mean, variance, weight, bias, _, _, eps = arguments[:7]
    return normalise(BatchNorm, (input, residual, weight, bias, mean, variance), False, eps, activation)


def _requires_grad(*operands: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(operand.requires_grad for operand in those_given(*operands))


def normalise(
    function: type[torch.autograd.Function],
    operands: tuple[Any, ...],
    training: bool,
    eps: float,
    activation: Activated,
    *rest: Any,
) -> Tensor:
    """`BatchNorm`, or a function like it that takes ``rest`` besides, where something requires gradients."""
    y: Tensor
    input, residual, weight, bias, mean, variance = operands
    if _requires_grad(input, residual, weight, bias):
        if not training:
            # The running statistics may be updated before the backward pass comes.
            mean, variance = torch.stack((mean, variance)).unbind()
        y = function.apply(input, residual, weight, bias, mean, variance, training, float(eps), activation, *rest)
    else:
        y, _ = forward(input, residual, mean, variance, weight, bias, float(eps), *activation.arguments, False)
    return y
