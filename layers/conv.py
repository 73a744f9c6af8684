"""Convolution layers: drop-in subclasses of ``torch.nn``'s, and layers of one with activation and max pooling.

Images (N, C, H, W) or (C, H, W), contiguous or channels-last, in float16, bfloat16, float32 or float64; whatever else
PyTorch accepts goes to the stock operators, which raise the stock errors.
"""

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ..autograd import stock as F
from ..autograd.activation import resolve_activation
from ..autograd.batch_norm import apply_activation
from ..autograd.conv import conv1d, conv2d, conv_act_pool2d
from ..autograd.pool import max_pool2d
from .compound import Compound
from .twin import Twin, is_untouched

__all__ = ["Conv1d", "Conv2d", "ConvAct2d", "ConvMaxPool2d", "is_plain", "padded", "pooled"]


def padded(layer: _ConvNd, input: Tensor) -> tuple[Tensor, Any]:
    """The input, padded where that isn't with zeros, and the padding that is left to the convolution."""
    if layer.padding_mode == "zeros":
        return input, layer.padding
    return F.pad(input, layer._reversed_padding_repeated_twice, mode=layer.padding_mode), 0


class Conv1d(Twin, nn.Conv1d):
    """y[n, o, i] = bias[o] + sum over (c, k) of weight[o, c, k] x[n, c, stride i + dilation k - padding].

    Twin of `torch.nn.Conv1d`; cuDNN computes it.  Source: PyTorch's page of ``torch.nn.Conv1d``.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # which people replace
        input, padding = padded(self, input)
        return conv1d(input, weight, bias, self.stride, padding, self.dilation, self.groups)


class Conv2d(Twin, nn.Conv2d):
    """y[n, o, i, j] = bias[o] + sum over (c, k, l) of weight[o, c, k, l] x[n, c, i', j'], with
    i' = stride i + dilation k - padding, and j' likewise.

    Twin of `torch.nn.Conv2d`; cuDNN computes it.  Source: PyTorch's page of ``torch.nn.Conv2d``.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # which people replace
        input, padding = padded(self, input)
        return conv2d(input, weight, bias, self.stride, padding, self.dilation, self.groups)


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer is a convolution of images that nobody has changed, so that it can be computed with others."""
    return type(layer) in (Conv2d, nn.Conv2d) and is_untouched(layer)


def pooled(input: Tensor, pool_size: Any = None, pool_stride: Any = None, pool_padding: Any = 0) -> Tensor:
    """max_pool(x), or x where no size is given."""
    return input if pool_size is None else cast("Tensor", max_pool2d(input, pool_size, pool_stride, pool_padding))


class ConvAct2d(Compound):
    """activation(conv(x) + bias), in one.

    Args as of `torch.nn.Conv2d`, and keyword-only:

    activation, activation_parameters: as of `fusednn.autograd.conv_act_pool2d`.

    Keeps for the backward pass what the activation's gradient needs: a bit an element for ReLU and its like.  The child
    ``conv`` is the convolution: what tools put in its place is called.
    """

    child = "conv"

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
    ) -> None:
        resolve_activation(activation, activation_parameters)
        super().__init__()
        self.conv = Conv2d(
            *(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias),
            padding_mode=padding_mode,
            device=device,
            dtype=dtype,
        )
        self.activation = activation
        self.activation_parameters = tuple(activation_parameters)

    def forward(self, input: Tensor) -> Tensor:
        conv = self.conv
        if not is_plain(conv):
            resolved = resolve_activation(self.activation, self.activation_parameters)
            return pooled(apply_activation(conv(input), None, resolved), **self._pooling())
        input, padding = padded(conv, input)
        return conv_act_pool2d(
            *(input, conv.weight, conv.bias, conv.stride, padding, conv.dilation, conv.groups),
            activation=self.activation,
            activation_parameters=self.activation_parameters,
            **self._pooling(),
        )

    def _pooling(self) -> dict[str, Any]:
        """The pooling's arguments."""
        return {}

    def extra_repr(self) -> str:
        parameters = {"activation_parameters": self.activation_parameters} if self.activation_parameters else {}
        fused = {"activation": self.activation, **parameters, **self._pooling()}
        return ", ".join(f"{name}={value!r}" for name, value in fused.items())


class ConvMaxPool2d(ConvAct2d):
    """max_pool(activation(conv(x) + bias)), in one.

    Args as of `torch.nn.Conv2d`, and keyword-only:

    activation, activation_parameters: as of `ConvAct2d`.
    pool_size, pool_stride, pool_padding: as of `torch.nn.MaxPool2d`; a ``pool_stride`` of None is the size.

    Only the pooled result is written, and for the backward pass the code of each window, at most a byte.
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
        pool_size: int | tuple[int, int] = 2,
        pool_stride: int | tuple[int, int] | None = None,
        pool_padding: int | tuple[int, int] = 0,
    ) -> None:
        super().__init__(
            *(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias),
            padding_mode=padding_mode,
            device=device,
            dtype=dtype,
            activation=activation,
            activation_parameters=activation_parameters,
        )
        self.pool_size = pool_size
        self.pool_stride = pool_stride
        self.pool_padding = pool_padding

    def _pooling(self) -> dict[str, Any]:
        return {"pool_size": self.pool_size, "pool_stride": self.pool_stride, "pool_padding": self.pool_padding}
