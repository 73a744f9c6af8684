"""Batch norm's operators.  Where a result is optional, an empty tensor stands for None."""

from typing import Any

import torch
from torch import Tensor

from ..kernels import batch_norm as kernels
from ..kernels import batch_norm_gradients, batch_norm_statistics
from ..kernels.base.channels import plan_of
from ..kernels.base.launch import ACCUMULATOR
from ..kernels.batch_norm_operands import Around, Norm, Running
from ..kernels.functions.activation import IDENTITY, activated
from .operators import operator

__all__ = ["backward", "backward_training", "forward", "forward_training", "merge_statistics", "reduce", "statistics"]


def _fake_statistics(x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    mean, variance = (x.new_empty(x.shape[1], dtype=ACCUMULATOR[x.dtype]) for _ in range(2))
    return mean, variance


@operator(
    "batch_norm_statistics(Tensor x, Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor? batches,"
    " float momentum) -> (Tensor, Tensor)",
    fake=_fake_statistics,
    any_strides=True,
)
def statistics(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, batches: Tensor | None, momentum: float
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel."""
    return batch_norm_statistics.merge_statistics(
        batch_norm_statistics.partial_statistics(x), running_mean, running_var, batches, momentum
    )


merge_statistics = operator(
    "batch_norm_merge(Tensor partial, Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor? batches,"
    " float momentum) -> (Tensor, Tensor)",
    fake=lambda partial, *_: (torch.empty_like(partial[0, 0]), torch.empty_like(partial[0, 0])),
)(batch_norm_statistics.merge_statistics)


#: The operands and options that the others end with, or have before flags: those of `Norm`, and the activation.
_REST = "Tensor? weight, Tensor? bias, float eps, str name, float a, float b"
_GIVEN = f"Tensor mean, Tensor variance, {_REST}"


def _parsed(mean: Any, variance: Any, weight: Any, bias: Any, eps: float, *activation: Any) -> tuple[Norm, Around]:
    """What kernels are given in their place."""
    return Norm(mean, variance, weight, bias, eps), Around(activated(*activation))


def _fake_forward(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    *_, masked = arguments
    return torch.empty_like(x), x.new_empty(kernels.mask_bytes(x) if masked else 0, dtype=torch.uint8)


@operator(
    f"batch_norm_forward(Tensor x, Tensor? residual, {_GIVEN}, bool masked) -> (Tensor, Tensor)",
    fake=_fake_forward,
    any_strides=True,
)
def forward(x: Tensor, residual: Tensor | None, *arguments: Any) -> tuple[Tensor, Tensor]:
    """The result with given statistics, and the activation's mask."""
    *rest, masked = arguments
    y, mask = kernels.batch_norm_forward(x, residual, *_parsed(*rest), masked=masked)
    return y, x.new_empty(0, dtype=torch.uint8) if mask is None else mask


@operator(
    "batch_norm_training(Tensor x, Tensor? residual, Tensor(a!)? running_mean, Tensor(b!)? running_var,"
    f" Tensor? batches, float momentum, {_REST}, bool masked) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=lambda x, *arguments: (*_fake_forward(x, *arguments), *_fake_statistics(x)),
    any_strides=True,
)
def forward_training(x: Tensor, residual: Tensor | None, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`forward` with the statistics of ``x``, which come last, and the update of the running ones."""
    running_mean, running_var, batches, momentum, *rest, masked = arguments
    running = Running(running_mean, running_var, batches, momentum)
    y, mask, mean, variance = kernels.batch_norm_training(
        x, residual, running, *_parsed(None, None, *rest), masked=masked
    )
    return y, x.new_empty(0, dtype=torch.uint8) if mask is None else mask, mean, variance


def _fake_sums(g: Tensor, x: Tensor, residual: Tensor | None, mask: Tensor | None, *_: object) -> tuple[Tensor, Tensor]:
    splits = plan_of(x).splits if x.numel() else 1
    partial = x.new_empty((splits, 2, x.shape[1]), dtype=ACCUMULATOR[x.dtype])
    return partial, x.new_empty(0) if residual is None and mask is None else torch.empty_like(x)


@operator(
    f"batch_norm_reduce(Tensor g, Tensor x, Tensor? residual, Tensor? mask, {_GIVEN}) -> (Tensor, Tensor)",
    fake=_fake_sums,
    any_strides=True,
)
def reduce(
    g: Tensor, x: Tensor, residual: Tensor | None, mask: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor]:
    """Sums of parts of each channel, and the gradient before the activation."""
    partial, dz = batch_norm_gradients.batch_norm_reduce(g, x, residual, mask, *_parsed(*arguments))
    return partial, x.new_empty(0) if dz is None else dz


def _fake_gradients(
    g: Tensor, x: Tensor, partial: Tensor | None, share: float, mean: Tensor, variance: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    weight, *_, affine = rest
    dweight, dbias = (torch.empty_like(weight) if affine else x.new_empty(0) for _ in range(2))
    return torch.empty_like(x), dweight, dbias


@operator(
    f"batch_norm_backward(Tensor g, Tensor x, Tensor? partial, float share, {_GIVEN}, bool affine)"
    " -> (Tensor, Tensor, Tensor)",
    fake=_fake_gradients,
    any_strides=True,
)
def backward(
    g: Tensor, x: Tensor, partial: Tensor | None, share: float, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the input and, where ``affine``, of weight and bias."""
    *rest, affine = arguments
    dx, *gradients, _ = batch_norm_gradients.batch_norm_backward(g, x, partial, share, *_parsed(*rest), affine=affine)
    dweight, dbias = (x.new_empty(0) if gradient is None else gradient for gradient in gradients)
    return dx, dweight, dbias


def _fake_training_gradients(
    g: Tensor, x: Tensor, residual: Tensor | None, mask: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _, dz = _fake_sums(g, x, residual, mask)
    dx, dweight, dbias = _fake_gradients(g, x, None, 0.0, *rest)
    return dx, dz, dweight, dbias


@operator(
    f"batch_norm_training_backward(Tensor g, Tensor x, Tensor? residual, Tensor? mask, {_GIVEN}, bool affine)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_training_gradients,
    any_strides=True,
)
def backward_training(
    g: Tensor, x: Tensor, residual: Tensor | None, mask: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`reduce`, and `backward` with its sums: gradients of the input, before the activation, of weight and bias."""
    *rest, affine = arguments
    norm, around = _parsed(*rest)
    partial, dz = batch_norm_gradients.batch_norm_reduce(g, x, residual, mask, norm, around)
    if dz is not None:
        g, around = dz, Around(IDENTITY)
    share = x.shape[1] / max(x.numel(), 1)
    dx, *gradients, _ = batch_norm_gradients.batch_norm_backward(g, x, partial, share, norm, around, affine=affine)
    dz, dweight, dbias = (x.new_empty(0) if gradient is None else gradient for gradient in (dz, *gradients))
    return dx, dz, dweight, dbias
