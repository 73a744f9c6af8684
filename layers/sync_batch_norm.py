"""Batch norm over the batches of all ranks, as a layer."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..autograd.activation import resolve_activation
from ..autograd.batch_norm import apply_activation
from ..autograd.batch_norm_arguments import NormArguments
from ..autograd.sync_batch_norm import sync_batch_norm, sync_takes_kernel
from .batch_norm import (
    FUSED,
    Activated,
    BatchNormAct1d,
    BatchNormAct2d,
    BatchNormAct3d,
    count_batch,
    vectors_of,
    weight_of_batch,
)
from .batch_norm import forward as local_forward
from .compound import NO_ACTIVATION, NamedActivation
from .twin import Twin

__all__ = ["SyncBatchNorm", "SyncBatchNormAct"]


class SyncBatchNorm(Twin, nn.SyncBatchNorm):
    """(x - mean) / sqrt(variance + eps) * weight + bias, with statistics over the batches of all ranks in training.

    Twin of `torch.nn.SyncBatchNorm`; input (N, C, *), where N may differ from rank to rank.  Saves the input.  As stock
    does, it raises ValueError for CPU tensors where there are several ranks, except in Triton's interpreter.  Source:
    Zhang et al., "Context Encoding for Semantic Segmentation" (CVPR 2018).
    """

    def forward(self, input: Tensor) -> Tensor:
        return forward(self, input)

    @classmethod
    def convert_sync_batchnorm(cls, module: nn.Module, process_group: dist.ProcessGroup | None = None) -> nn.Module:
        """Turn every batch norm of ``module`` into a `SyncBatchNorm`, and every fused one into a `SyncBatchNormAct`.

        As `torch.nn.SyncBatchNorm.convert_sync_batchnorm`: parameters and buffers stay the same tensors; returns
        ``module``, or its replacement where it is a batch norm itself.
        """
        converted = module
        if isinstance(module, _BatchNorm):
            # The stock method knows which attributes travel; it is given a layer without children.
            converted = nn.SyncBatchNorm.convert_sync_batchnorm(module, process_group)
            converted.__class__ = SyncBatchNorm
        for name, child in module.named_children():
            converted.add_module(name, cls.convert_sync_batchnorm(child, process_group))
        if type(converted) in (BatchNormAct1d, BatchNormAct2d, BatchNormAct3d):
            converted.__class__ = SyncBatchNormAct
        return converted


class SyncBatchNormAct(Activated):
    """activation(batch_norm(x) + residual) in one, with statistics over the batches of all ranks in training.

    What `SyncBatchNorm.convert_sync_batchnorm` makes of `BatchNormAct1d`, `BatchNormAct2d` and `BatchNormAct3d`.  Args
    as of `torch.nn.SyncBatchNorm`, all but the first by keyword, and ``activation`` as theirs.
    """

    norm = SyncBatchNorm

    def __init__(self, num_features: int, **options: Any) -> None:
        super().__init__(num_features, **options)


def forward(
    layer: SyncBatchNorm, input: Tensor, residual: Tensor | None = None, activation: NamedActivation = NO_ACTIVATION
) -> Tensor:
    layer._check_input_dim(input)
    layer._check_non_zero_input_channels(input)
    group = _group(layer)
    if group is None:
        return local_forward(layer, input, residual, activation)
    resolved = resolve_activation(*activation)
    momentum, batches = weight_of_batch(layer)
    vectors = vectors_of(layer)
    if not sync_takes_kernel(input, NormArguments(*vectors, True, momentum, layer.eps, batches), residual, resolved):
        return apply_activation(nn.SyncBatchNorm.forward(layer, input), residual, resolved)
    if dist.get_world_size(group) == 1:
        return local_forward(layer, input, residual, activation)
    count_batch(layer)
    rest = (momentum, layer.eps, group)
    return sync_batch_norm(input, *vectors, *rest, batches=batches, residual=residual, activation=resolved)


FUSED[SyncBatchNorm] = FUSED[nn.SyncBatchNorm] = forward


def _group(layer: nn.SyncBatchNorm) -> dist.ProcessGroup | None:
    """The ranks that the layer's statistics are over, or None where there is but this process."""
    if not (layer.training and dist.is_available() and dist.is_initialized()):
        return None
    group: dist.ProcessGroup | None = layer.process_group or dist.group.WORLD
    return group
