"""Batch norm's operators.  Where a result is optional, an empty tensor stands for None."""

from typing import Any

import torch
from torch import Tensor

from ..kernels import batch_norm as kernels
from ..kernels import batch_norm_gradients, batch_norm_statistics
from ..kernels.base.channels import plan_of
from ..kernels.base.launch import ACCUMULATOR
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


@operator(
    "batch_norm_forward(Tensor x, Tensor? residual, Tensor mean, Tensor variance, Tensor? weight, Tensor? bias,"
    " float eps, str name, float a, float b, bool masked) -> (Tensor, Tensor)",
    fake=lambda x, residual, mean, variance, weight, bias, eps, name, a, b, masked: (
        torch.empty_like(x),
        x.new_empty(kernels.mask_bytes(x) if masked else 0, dtype=torch.uint8),
    ),
    any_strides=True,
)
def forward(
    x: Tensor,
    residual: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    name: str,
    a: float,
    b: float,
    masked: bool,
) -> tuple[Tensor, Tensor]:
    """The result with given statistics, and the activation's mask."""
    y, mask = kernels.batch_norm_forward(
        x, residual, mean, variance, weight, bias, eps, activated(name, a, b), masked=masked
    )
    return y, x.new_empty(0, dtype=torch.uint8) if mask is None else mask


def _fake_training(
    x: Tensor,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    batches: Tensor | None,
    momentum: float,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    name: str,
    a: float,
    b: float,
    masked: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mask = x.new_empty(kernels.mask_bytes(x) if masked else 0, dtype=torch.uint8)
    return torch.empty_like(x), mask, *_fake_statistics(x)


@operator(
    "batch_norm_training(Tensor x, Tensor? residual, Tensor(a!)? running_mean, Tensor(b!)? running_var,"
    " Tensor? batches, float momentum, Tensor? weight, Tensor? bias, float eps, str name, float a, float b,"
    " bool masked) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_training,
    any_strides=True,
)
def forward_training(
    x: Tensor,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    batches: Tensor | None,
    momentum: float,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    name: str,
    a: float,
    b: float,
    masked: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`forward` with the statistics of ``x``, which come last, and the update of the running ones."""
    y, mask, mean, variance = kernels.batch_norm_training(
        *(x, residual, running_mean, running_var, batches, momentum, weight, bias, eps, activated(name, a, b)),
        masked=masked,
    )
    return y, x.new_empty(0, dtype=torch.uint8) if mask is None else mask, mean, variance


def _fake_sums(g: Tensor, x: Tensor, residual: Tensor | None, mask: Tensor | None, *_: object) -> tuple[Tensor, Tensor]:
    splits = plan_of(x).splits if x.numel() else 1
    partial = x.new_empty((splits, 2, x.shape[1]), dtype=ACCUMULATOR[x.dtype])
    return partial, x.new_empty(0) if residual is None and mask is None else torch.empty_like(x)


@operator(
    "batch_norm_reduce(Tensor g, Tensor x, Tensor? residual, Tensor? mask, Tensor mean, Tensor variance,"
    " Tensor? weight, Tensor? bias, float eps, str name, float a, float b) -> (Tensor, Tensor)",
    fake=_fake_sums,
    any_strides=True,
)
def reduce(
    g: Tensor,
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    name: str,
    a: float,
    b: float,
) -> tuple[Tensor, Tensor]:
    """Sums of parts of each channel, and the gradient before the activation."""
    partial, dz = batch_norm_gradients.batch_norm_reduce(
        g, x, residual, mask, mean, variance, weight, bias, eps, activated(name, a, b)
    )
    return partial, x.new_empty(0) if dz is None else dz


def _fake_gradients(
    g: Tensor, x: Tensor, partial: Tensor | None, share: float, mean: Tensor, variance: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    weight, *_, affine = rest
    dweight, dbias = (torch.empty_like(weight) if affine else x.new_empty(0) for _ in range(2))
    return torch.empty_like(x), dweight, dbias


@operator(
    "batch_norm_backward(Tensor g, Tensor x, Tensor? partial, float share, Tensor mean, Tensor variance,"
    " Tensor? weight, Tensor? bias, float eps, str name, float a, float b, bool affine) -> (Tensor, Tensor, Tensor)",
    fake=_fake_gradients,
    any_strides=True,
)
def backward(
    g: Tensor,
    x: Tensor,
    partial: Tensor | None,
    share: float,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    name: str,
    a: float,
    b: float,
    affine: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the input and, where ``affine``, of weight and bias."""
    dx, *gradients, _ = batch_norm_gradients.batch_norm_backward(
        g, x, partial, share, mean, variance, weight, bias, eps, activated(name, a, b), affine=affine
    )
    dweight, dbias = (x.new_empty(0) if gradient is None else gradient for gradient in gradients)
    return dx, dweight, dbias


def _fake_training_gradients(
    g: Tensor, x: Tensor, residual: Tensor | None, mask: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _, dz = _fake_sums(g, x, residual, mask)
    dx, dweight, dbias = _fake_gradients(g, x, None, 0.0, *rest)
    return dx, dz, dweight, dbias


@operator(
    "batch_norm_training_backward(Tensor g, Tensor x, Tensor? residual, Tensor? mask, Tensor mean, Tensor variance,"
    " Tensor? weight, Tensor? bias, float eps, str name, float a, float b, bool affine)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_training_gradients,
    any_strides=True,
)
def backward_training(
    g: Tensor,
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    name: str,
    a: float,
    b: float,
    affine: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`reduce`, and `backward` with its sums: gradients of the input, before the activation, of weight and bias."""
    vectors = (mean, variance, weight, bias, eps)
    activation = activated(name, a, b)
    partial, dz = batch_norm_gradients.batch_norm_reduce(g, x, residual, mask, *vectors, activation)
    if dz is not None:
        g, activation = dz, IDENTITY
    dx, *gradients, _ = batch_norm_gradients.batch_norm_backward(
        g, x, partial, x.shape[1] / max(x.numel(), 1), *vectors, activation, affine=affine
    )
    dz, dweight, dbias = (x.new_empty(0) if gradient is None else gradient for gradient in (dz, *gradients))
    return dx, dz, dweight, dbias
