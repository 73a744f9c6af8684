"""Batch norm as layers: drop-in subclasses of ``torch.nn``'s, and layers of one with an activation and a residual.

Inputs (N, C), (N, C, L), (N, C, H, W) and (N, C, D, H, W) in float16, bfloat16, float32 or float64, in any memory
format; the parameters and running statistics of 16-bit inputs may be float32.  Whatever else PyTorch accepts goes to
the stock operator, which raises the stock errors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..autograd.activation import resolve_activation
from ..autograd.batch_norm import apply_activation, batch_norm_act, begin_batch_norm
from ..autograd.batch_norm_arguments import NormArguments
from ..autograd.batch_norm_chain import batch_norm_chain
from ..autograd.batch_norm_pool import batch_norm_pool
from .compound import NO_ACTIVATION, Activating, Compound, NamedActivation
from .twin import Twin, is_untouched, tensors_of

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "BatchNormAct1d", "BatchNormAct2d", "BatchNormAct3d"]


def counted_batches(layer: _BatchNorm) -> Tensor | None:
    """The number of batches so far, where the layer counts them: in training."""
    return layer.num_batches_tracked if layer.training and layer.track_running_stats else None


def count_batch(layer: _BatchNorm) -> None:
    batches = counted_batches(layer)
    if batches is not None:
        batches.add_(1)


def weight_of_batch(layer: _BatchNorm) -> tuple[float, Tensor | None]:
    """The arguments ``momentum`` and ``batches``: the second where the running statistics are averages."""
    if layer.momentum is not None:
        return layer.momentum, None
    return 0.0, counted_batches(layer)


def uses_batch_statistics(layer: _BatchNorm) -> bool:
    """Whether the layer normalises with the batch's statistics: in training, and where it tracks none."""
    return layer.training or (layer.running_mean is None and layer.running_var is None)


def vectors_of(layer: _BatchNorm) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The running statistics that a forward pass uses or updates, none where it stopped tracking them; weight, bias."""
    if layer.training and not layer.track_running_stats:
        weight, bias = tensors_of(layer, "weight", "bias")
        return None, None, weight, bias
    mean, variance, weight, bias = tensors_of(layer, "running_mean", "running_var", "weight", "bias")
    return mean, variance, weight, bias


def forward(
    layer: _BatchNorm, input: Tensor, residual: Tensor | None = None, activation: NamedActivation = NO_ACTIVATION
) -> Tensor:
    """activation(layer(x) + residual)."""
    layer._check_input_dim(input)
    count_batch(layer)
    momentum, batches = weight_of_batch(layer)
    return batch_norm_act(
        input,
        *vectors_of(layer),
        uses_batch_statistics(layer),
        momentum,
        layer.eps,
        batches=batches,
        residual=residual,
        activation=activation[0],
        activation_parameters=activation[1],
    )


def forward_chain(layer: _BatchNorm, input: Tensor, **options: Any) -> Tensor:
    """dropout(activation(layer(x))), with ``options`` as of `batch_norm_chain`."""
    return _chained(batch_norm_chain, layer, input, options)


def forward_pool(layer: _BatchNorm, input: Tensor, **options: Any) -> Tensor:
    """The maximum or the mean over all places of activation(layer(x)), with ``options`` as of `batch_norm_pool`."""
    return _chained(batch_norm_pool, layer, input, options)


def _chained(function: Callable[..., Tensor], layer: _BatchNorm, input: Tensor, options: dict[str, Any]) -> Tensor:
    layer._check_input_dim(input)
    count_batch(layer)
    momentum, batches = weight_of_batch(layer)
    return function(input, *vectors_of(layer), uses_batch_statistics(layer), momentum, layer.eps, batches, **options)


def begin(layer: _BatchNorm, input: Tensor, partial: Tensor | None = None) -> Callable[..., Tensor]:
    """What `forward` does with the batch's statistics, as of `begin_batch_norm`."""
    layer._check_input_dim(input)
    count_batch(layer)
    momentum, batches = weight_of_batch(layer)
    return begin_batch_norm(input, NormArguments(*vectors_of(layer), True, momentum, layer.eps, batches), partial)


class BatchNorm1d(Twin, nn.BatchNorm1d):
    """(x - mean) / sqrt(variance + eps) * weight + bias for each channel of (N, C) or (N, C, L).

    Twin of `torch.nn.BatchNorm1d`; saves the input.  Source: Ioffe and Szegedy, "Batch Normalization" (ICML 2015).
    """

    def forward(self, input: Tensor) -> Tensor:
        return forward(self, input)


class BatchNorm2d(Twin, nn.BatchNorm2d):
    """(x - mean) / sqrt(variance + eps) * weight + bias for each channel of (N, C, H, W).

    Twin of `torch.nn.BatchNorm2d`; saves the input.  Source: Ioffe and Szegedy, "Batch Normalization" (ICML 2015).
    """

    def forward(self, input: Tensor) -> Tensor:
        return forward(self, input)


class BatchNorm3d(Twin, nn.BatchNorm3d):
    """(x - mean) / sqrt(variance + eps) * weight + bias for each channel of (N, C, D, H, W).

    Twin of `torch.nn.BatchNorm3d`; saves the input.  Source: Ioffe and Szegedy, "Batch Normalization" (ICML 2015).
    """

    def forward(self, input: Tensor) -> Tensor:
        return forward(self, input)


#: Batch norm, and what follows it, in one: for each class whose layers can be computed so.
FUSED: dict[type[nn.Module], Callable[..., Tensor]] = dict.fromkeys(
    (BatchNorm1d, BatchNorm2d, BatchNorm3d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), forward
)


def normalised(layer: nn.Module, input: Tensor, residual: Tensor | None, activation: NamedActivation) -> Tensor:
    """activation(layer(x) + residual), in one where the layer is a batch norm that nobody has changed."""
    fused = FUSED.get(type(layer))
    if fused is None or not is_untouched(layer):
        return apply_activation(layer(input), residual, resolve_activation(*activation))
    return fused(layer, input, residual, activation)


class Activated(Activating, Compound):
    """What the fused forms share."""

    child = "bn"
    bn: _BatchNorm
    withheld = ("eps",)  # what folds a batch norm reads it, and would fold no activation
    #: The class of the batch norm.
    norm: ClassVar[type[_BatchNorm]]

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str | None = "relu",
        activation_parameters: Sequence[float] = (),
        **options: Any,  # those that the installed PyTorch's batch norm has besides
    ) -> None:
        bn = self.norm(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype, **options)
        super().__init__(activation, activation_parameters, bn=bn)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return normalised(self.bn, input, residual, (self.activation, self.activation_parameters))


class BatchNormAct1d(Activated):
    """activation(batch_norm(x) + residual) for (N, C) or (N, C, L), in one.

    Args as of `torch.nn.BatchNorm1d`, and ``activation`` and ``activation_parameters`` as of
    `fusednn.autograd.batch_norm_act`.  The child ``bn`` is the batch norm: what tools put in its place is called.
    """

    norm = BatchNorm1d


class BatchNormAct2d(Activated):
    """activation(batch_norm(x) + residual) for (N, C, H, W), in one.

    Args as of `torch.nn.BatchNorm2d`, and ``activation`` and ``activation_parameters`` as of
    `fusednn.autograd.batch_norm_act`.  The child ``bn`` is the batch norm: what tools put in its place is called.
    """

    norm = BatchNorm2d


class BatchNormAct3d(Activated):
    """activation(batch_norm(x) + residual) for (N, C, D, H, W), in one.

    Args as of `torch.nn.BatchNorm3d`, and ``activation`` and ``activation_parameters`` as of
    `fusednn.autograd.batch_norm_act`.  The child ``bn`` is the batch norm: what tools put in its place is called.
    """

    norm = BatchNorm3d
