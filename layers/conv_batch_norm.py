"""Convolution, batch norm, activation and max pooling as one layer."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from ..autograd.batch_norm_arguments import NormArguments
from ..autograd.conv import conv_statistics
from ..autograd.conv_batch_norm import batch_norm_act_pool, conv_batch_norm_act
from . import batch_norm
from .batch_norm import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    count_batch,
    normalised,
    uses_batch_statistics,
    vectors_of,
    weight_of_batch,
)
from .compound import Activating, NamedActivation
from .conv import Conv1d, Conv2d, Conv3d, arguments, is_plain, pooled

__all__ = ["ConvBatchNormAct1d", "ConvBatchNormAct2d", "ConvBatchNormAct3d"]


def forward(
    conv: _ConvNd,
    norm: _BatchNorm,
    input: Tensor,
    residual: Tensor | None,
    activation: NamedActivation,
    **pooling: Any,
) -> Tensor:
    """max_pool(activation(norm(conv(x)) + residual)), with ``pooling`` as of `conv_batch_norm_act`.

    What the layers change happens in their order: a batch counts once the convolution has succeeded.
    """
    directions, input, weight, bias, *geometry = arguments(conv, input)
    vectors = vectors_of(norm)
    name, parameters = activation
    rest: dict[str, Any] = {"residual": residual, "activation": name, "activation_parameters": parameters, **pooling}
    momentum, batches = weight_of_batch(norm)
    given = NormArguments(*vectors, uses_batch_statistics(norm), momentum, norm.eps, batches)
    if not given.training:
        return conv_batch_norm_act(directions, input, weight, bias, given, *geometry, **rest)
    z, partial = conv_statistics(directions, input, weight, bias, *geometry)
    norm._check_input_dim(z)
    count_batch(norm)
    return batch_norm_act_pool(z, partial, given, **rest)


def begin(conv: _ConvNd, norm: _BatchNorm, input: Tensor) -> Callable[..., Tensor]:
    """What `forward` does with the batch's statistics, up to where it needs the residual, as of `begin_batch_norm`."""
    z, partial = conv_statistics(*arguments(conv, input))
    return batch_norm.begin(norm, z, partial)


class ConvBatchNormAct(Activating):
    """What the convolutions with batch norm share."""

    conv: _ConvNd
    bn: _BatchNorm
    #: The classes of the children, and their number of directions.
    convolution: ClassVar[type[Conv1d | Conv2d | Conv3d]]
    norm: ClassVar[type[BatchNorm1d | BatchNorm2d | BatchNorm3d]]
    directions: ClassVar[int]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: str | int | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str | None = "relu",
        activation_parameters: Sequence[float] = (),
        pool_size: int | tuple[int, ...] | None = None,
        pool_stride: int | tuple[int, ...] | None = None,
        pool_padding: int | tuple[int, ...] = 0,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
    ) -> None:
        geometry: tuple[Any, Any, Any, Any] = (kernel_size, stride, padding, dilation)
        conv = self.convolution(in_channels, out_channels, *geometry, groups, bias, padding_mode, device, dtype)
        bn = self.norm(out_channels, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        super().__init__(activation, activation_parameters, conv=conv, bn=bn)
        self.pool_size = pool_size
        self.pool_stride = pool_stride
        self.pool_padding = pool_padding

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        conv, bn, activation = self.conv, self.bn, (self.activation, self.activation_parameters)
        if not (is_plain(conv, self.convolution) and is_plain(bn, self.norm)):
            return pooled(self.directions, normalised(bn, conv(input), residual, activation), **self._pooling())
        bn._check_input_dim(input)
        return forward(conv, bn, input, residual, activation, **self._pooling())

    def _pooling(self) -> dict[str, Any]:
        return {"pool_size": self.pool_size, "pool_stride": self.pool_stride, "pool_padding": self.pool_padding}


class ConvBatchNormAct1d(ConvBatchNormAct):
    """max_pool(activation(batch_norm(conv(x)) + residual)) for (N, C, L).  As `ConvBatchNormAct2d`."""

    convolution, norm, directions = Conv1d, BatchNorm1d, 1


class ConvBatchNormAct2d(ConvBatchNormAct):
    """max_pool(activation(batch_norm(conv(x)) + residual)) for (N, C, H, W).

    Args as of `torch.nn.Conv2d`, and keyword-only:

    activation, activation_parameters: as of `fusednn.autograd.batch_norm_act`.
    pool_size, pool_stride, pool_padding: as of `torch.nn.MaxPool2d`; a ``pool_size`` of None leaves the pooling out.
    eps, momentum, affine, track_running_stats: as of `torch.nn.BatchNorm2d`.

    The children ``conv`` and ``bn`` are computed in one; what has hooks, or was put in their place, is called.  In
    evaluation the batch norm is folded into the convolution.  Raises ValueError for inputs that aren't 4-D.
    """

    convolution, norm, directions = Conv2d, BatchNorm2d, 2


class ConvBatchNormAct3d(ConvBatchNormAct):
    """max_pool(activation(batch_norm(conv(x)) + residual)) for (N, C, D, H, W).  As `ConvBatchNormAct2d`."""

    convolution, norm, directions = Conv3d, BatchNorm3d, 3
