"""Batch norm over the batches of all ranks: two collectives between the steps of `fusednn.autograd.batch_norm`.

Forward, ranks gather each other's (count, mean, sum of squared deviations) of each channel, and merge them in the order
of the ranks, weighted by count: ranks may hold batches of different sizes, or none.  Backward, they add up the sums
that the input's gradient needs.  The parameters' gradients stay each rank's own, as data parallel training wants them.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ..kernels.functions.activation import IDENTITY, Activated
from .batch_norm import BatchNorm, gradients, normalise
from .batch_norm_arguments import NormArguments, those_given
from .batch_norm_operators import merge_statistics, statistics
from .dispatch import takes_kernel

__all__ = ["sync_batch_norm", "sync_takes_kernel"]


class SyncBatchNorm(Function):
    """`BatchNorm` with statistics of ``total`` values per channel, held by the ranks of ``group``."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *common, ctx.total, ctx.group = arguments
        return BatchNorm.forward(ctx, *common)

    recipe = staticmethod(BatchNorm.recipe)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        def combine(sums: Tensor) -> tuple[Tensor, float]:
            everywhere = sums.clone()
            dist.all_reduce(everywhere, group=ctx.group)
            return everywhere / ctx.total, 1.0

        return gradients(ctx, g, combine)


def sync_takes_kernel(
    input: Tensor, norm: NormArguments, residual: Tensor | None, activation: Activated = IDENTITY
) -> bool:
    """Whether `sync_batch_norm` takes these arguments: it has no stock path of its own.

    The answer must be the same on every rank, so it doesn't depend on the size of the batch.
    """
    operands = those_given(input, residual)

    def refusal() -> str | None:
        return norm.refusal_in_any_mode(input, residual) or activation.refusal()

    return takes_kernel("sync_batch_norm", *operands, parameters=norm.vectors, empty=True, refusal=refusal)


def sync_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
    group: dist.ProcessGroup,
    *,
    batches: Tensor | None = None,
    residual: Tensor | None = None,
    activation: Activated = IDENTITY,
) -> Tensor:
    """activation(batch_norm(x) + residual) in training, with the statistics of the batches of all ranks of ``group``.

    Arguments as of `fusednn.autograd.batch_norm_act`; the input may be empty on some ranks.  Every rank has to call it,
    and has to run the backward pass if one does.  Once differentiable.
    """
    local = _local_statistics(input.detach())
    gathered = local.new_empty((dist.get_world_size(group), *local.shape))
    dist.all_gather(list(gathered.unbind()), local, group)
    mean, variance = merge_statistics(gathered, running_mean, running_var, batches, float(momentum))
    total = gathered[:, 0, 0].sum()
    operands = (input, residual, weight, bias, mean, variance)
    return normalise(SyncBatchNorm, operands, True, eps, activation, total, group)


def _local_statistics(x: Tensor) -> Tensor:
    """(3, channels): count, mean, and sum of squared deviations; zeros where there are no elements."""
    mean, variance = statistics(x, None, None, None, 0.0)
    count = x.numel() // x.shape[1]
    if not count:
        return torch.zeros((3, x.shape[1]), dtype=mean.dtype, device=x.device)
    return torch.stack((torch.full_like(mean, count), mean, variance * count))
