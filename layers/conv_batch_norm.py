"""Convolution, batch norm, activation and max pooling as one layer."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..autograd.activation import resolve_activation
from ..autograd.conv import conv_statistics2d
from ..autograd.conv_batch_norm import batch_norm_act_pool2d, conv_batch_norm_act2d
from . import batch_norm
from .batch_norm import BatchNorm2d, count_batch, normalised, running_statistics, uses_batch_statistics, weight_of_batch
from .conv import Conv2d, is_plain, padded, pooled
from .twin import Layer, is_untouched, tensors_of

__all__ = ["ConvBatchNormAct2d"]


def forward(
    conv: nn.Conv2d,
    norm: nn.BatchNorm2d,
    input: Tensor,
    residual: Tensor | None,
    activation: str | None,
    activation_parameters: Sequence[float],
    **pooling: Any,
) -> Tensor:
    """max_pool(activation(norm(conv(x)) + residual)), with ``pooling`` as of `conv_batch_norm_act2d`.

    What the layers change happens in their order: a batch counts once the convolution has succeeded.
    """
    input, padding = padded(conv, input)
    weight, bias = tensors_of(conv, "weight", "bias")
    operands = (input, weight, bias)
    weight, bias = tensors_of(norm, "weight", "bias")
    vectors = (*running_statistics(norm), weight, bias)
    geometry: Any = (conv.stride, padding, conv.dilation, conv.groups)
    fused = {"residual": residual, "activation": activation, "activation_parameters": activation_parameters}
    rest: dict[str, Any] = {**fused, **pooling}
    if not uses_batch_statistics(norm):
        return conv_batch_norm_act2d(*operands, *vectors, *geometry, eps=norm.eps, **rest)
    z, partial = conv_statistics2d(*operands, *geometry)
    norm._check_input_dim(z)
    count_batch(norm)
    momentum, batches = weight_of_batch(norm)
    return batch_norm_act_pool2d(z, partial, *vectors, momentum, norm.eps, batches=batches, **rest)


def begin(conv: nn.Conv2d, norm: nn.BatchNorm2d, input: Tensor) -> Callable[..., Tensor]:
    """What `forward` does with the batch's statistics, up to where it needs the residual, as of `begin_batch_norm`."""
    input, padding = padded(conv, input)
    z, partial = conv_statistics2d(input, conv.weight, conv.bias, conv.stride, padding, conv.dilation, conv.groups)
    return batch_norm.begin(norm, z, partial)


class ConvBatchNormAct2d(Layer):
    """max_pool(activation(batch_norm(conv(x)) + residual)) for (N, C, H, W).

    Args as of `torch.nn.Conv2d`, and keyword-only:

    activation, activation_parameters: as of `fusednn.autograd.batch_norm_act`.
    pool_size, pool_stride, pool_padding: as of `torch.nn.MaxPool2d`; a ``pool_size`` of None leaves the pooling out.
    eps, momentum, affine, track_running_stats: as of `torch.nn.BatchNorm2d`.

    The children ``conv`` and ``bn`` are computed in one; what has hooks, or was put in their place, is called.  In
    evaluation the batch norm is folded into the convolution.  Raises ValueError for inputs that aren't 4-D.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str | None = "relu",
        activation_parameters: Sequence[float] = (),
        pool_size: int | tuple[int, int] | None = None,
        pool_stride: int | tuple[int, int] | None = None,
        pool_padding: int | tuple[int, int] = 0,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
    ) -> None:
        resolve_activation(activation, activation_parameters)
        super().__init__()
        self.conv = Conv2d(
            *(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias),
            padding_mode=padding_mode,
            device=device,
            dtype=dtype,
        )
        self.bn = BatchNorm2d(out_channels, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        self.activation = activation
        self.activation_parameters = tuple(activation_parameters)
        self.pool_size = pool_size
        self.pool_stride = pool_stride
        self.pool_padding = pool_padding

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        conv, bn, activation = self.conv, self.bn, (self.activation, self.activation_parameters)
        if not (is_plain(conv) and type(bn) in (BatchNorm2d, nn.BatchNorm2d) and is_untouched(bn)):
            return pooled(normalised(bn, conv(input), residual, *activation), **self._pooling())
        bn._check_input_dim(input)
        return forward(conv, bn, input, residual, *activation, **self._pooling())

    def _pooling(self) -> dict[str, Any]:
        return {"pool_size": self.pool_size, "pool_stride": self.pool_stride, "pool_padding": self.pool_padding}

    def extra_repr(self) -> str:
        parameters = {"activation_parameters": self.activation_parameters} if self.activation_parameters else {}
        fused = {"activation": self.activation, **parameters, **self._pooling()}
        return ", ".join(f"{name}={value!r}" for name, value in fused.items())
