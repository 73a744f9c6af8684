"""Convolution layers: drop-in subclasses of ``torch.nn``'s, and layers of one with activation and max pooling.

Batches (N, C, L), (N, C, H, W) or (N, C, D, H, W), or without N, contiguous or channels-last, in float16, bfloat16,
float32 or float64; whatever else PyTorch accepts goes to the stock operators, which raise the stock errors.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from ..autograd import stock as F
from ..autograd.activation import resolve_activation
from ..autograd.batch_norm import apply_activation
from ..autograd.conv import (
    conv1d,
    conv2d,
    conv3d,
    conv_act_pool,
    conv_transpose1d,
    conv_transpose2d,
    conv_transpose3d,
)
from ..autograd.convolution import stock_convolution
from ..autograd.pool import max_pool
from .compound import Activating, Compound
from .twin import TWINS, Twin, is_untouched, tensors_of

__all__ = [
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvAct1d",
    "ConvAct2d",
    "ConvAct3d",
    "ConvMaxPool1d",
    "ConvMaxPool2d",
    "ConvMaxPool3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "arguments",
    "is_plain",
    "pooled",
]


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


class Conv3d(Twin, nn.Conv3d):
    """The cross-correlation of volumes with filters: `Conv2d` with a depth.

    Twin of `torch.nn.Conv3d`; cuDNN computes it.  Source: PyTorch's page of ``torch.nn.Conv3d``.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # which people replace
        input, padding = padded(self, input)
        return conv3d(input, weight, bias, self.stride, padding, self.dilation, self.groups)


def _check_padding_mode(layer: _ConvNd) -> None:
    """Raises ValueError as transposed layers of ``torch.nn`` do."""
    if layer.padding_mode != "zeros":
        raise ValueError(f"Only `zeros` padding mode is supported for {type(layer).__name__}")


def _transposed(layer: _ConvTransposeNd, input: Tensor, output_size: list[int] | None) -> tuple[Any, ...]:
    """A call of a layer, as `conv_transpose1d` and its kin take it; the result has the size that is given, if one is.

    Raises ValueError as ``torch.nn``'s layers do.
    """
    _check_padding_mode(layer)
    sizes = (layer.stride, layer.padding, layer.kernel_size)
    extra = layer._output_padding(input, output_size, *sizes, len(layer.kernel_size), layer.dilation)  # type: ignore[arg-type]
    return input, layer.weight, layer.bias, layer.stride, layer.padding, extra, layer.groups, layer.dilation


class ConvTranspose1d(Twin, nn.ConvTranspose1d):
    """What the gradient of a `Conv1d` with the same filters is of its result, and a bias.

    Twin of `torch.nn.ConvTranspose1d`; cuDNN computes it.  Source: PyTorch's page of ``torch.nn.ConvTranspose1d``.
    """

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        return conv_transpose1d(*_transposed(self, input, output_size))


class ConvTranspose2d(Twin, nn.ConvTranspose2d):
    """What the gradient of a `Conv2d` with the same filters is of its result, and a bias.

    Twin of `torch.nn.ConvTranspose2d`; cuDNN computes it.  Source: PyTorch's page of ``torch.nn.ConvTranspose2d``.
    """

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        return conv_transpose2d(*_transposed(self, input, output_size))


class ConvTranspose3d(Twin, nn.ConvTranspose3d):
    """What the gradient of a `Conv3d` with the same filters is of its result, and a bias.

    Twin of `torch.nn.ConvTranspose3d`; cuDNN computes it.  Source: PyTorch's page of ``torch.nn.ConvTranspose3d``.
    """

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        return conv_transpose3d(*_transposed(self, input, output_size))


def is_plain(layer: nn.Module, twin: type[Twin]) -> bool:
    """Whether a layer is of this class, or of the one whose twin that is, and nobody has changed it: so that it can be
    computed with others.
    """
    return (type(layer) is twin or TWINS.get(type(layer)) is twin) and is_untouched(layer)


def arguments(layer: _ConvNd, input: Tensor) -> tuple[Any, ...]:
    """A call of a layer, as `conv_act_pool` takes it: up to ``output_padding``."""
    if layer.transposed:
        _check_padding_mode(layer)
    input, padding = padded(layer, input)
    weight, bias = tensors_of(layer, "weight", "bias")
    return (
        *(weight.dim() - 2, input, weight, bias),
        layer.stride,
        padding,
        layer.dilation,
        layer.groups,
        layer.output_padding if layer.transposed else None,
    )


def product_of(layer: _ConvNd | nn.Linear, input: Tensor) -> Callable[[Tensor | None], Tensor]:
    """A call of a layer, as a function of the bias in the place of its own."""
    if isinstance(layer, nn.Linear):
        return lambda bias: F.linear(input, layer.weight, bias)
    if not layer.transposed:
        return lambda bias: layer._conv_forward(input, layer.weight, bias)
    directions, _, weight, _, *rest = arguments(layer, input)
    return lambda bias: stock_convolution(directions, input, weight, bias, *rest)


def pooled(
    directions: int, input: Tensor, pool_size: Any = None, pool_stride: Any = None, pool_padding: Any = 0
) -> Tensor:
    """max_pool(x), or x where no size is given."""
    return input if pool_size is None else max_pool(directions, input, pool_size, pool_stride, pool_padding)


class ConvAct(Activating, Compound):
    """What the convolutions with an activation share."""

    child = "conv"
    conv: _ConvNd
    #: The class of the convolution, and its number of directions.
    convolution: ClassVar[type[Conv1d | Conv2d | Conv3d]]
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
    ) -> None:
        geometry: tuple[Any, Any, Any, Any] = (kernel_size, stride, padding, dilation)
        conv = self.convolution(in_channels, out_channels, *geometry, groups, bias, padding_mode, device, dtype)
        super().__init__(activation, activation_parameters, conv=conv)

    def forward(self, input: Tensor) -> Tensor:
        conv = self.conv
        if not is_plain(conv, self.convolution):
            resolved = resolve_activation(self.activation, self.activation_parameters)
            return pooled(self.directions, apply_activation(conv(input), None, resolved), **self._pooling())
        return conv_act_pool(
            *arguments(conv, input),
            activation=self.activation,
            activation_parameters=self.activation_parameters,
            **self._pooling(),
        )


class ConvMaxPool(ConvAct):
    """What the convolutions with an activation and max pooling share."""

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
        pool_size: int | tuple[int, ...] = 2,
        pool_stride: int | tuple[int, ...] | None = None,
        pool_padding: int | tuple[int, ...] = 0,
    ) -> None:
        super().__init__(
            *(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias),
            *(padding_mode, device, dtype),
            activation=activation,
            activation_parameters=activation_parameters,
        )
        self.pool_size = pool_size
        self.pool_stride = pool_stride
        self.pool_padding = pool_padding

    def _pooling(self) -> dict[str, Any]:
        return {"pool_size": self.pool_size, "pool_stride": self.pool_stride, "pool_padding": self.pool_padding}


class ConvAct1d(ConvAct):
    """activation(conv(x) + bias) for (N, C, L), in one.  As `ConvAct2d`, of a `torch.nn.Conv1d`."""

    convolution, directions = Conv1d, 1


class ConvAct2d(ConvAct):
    """activation(conv(x) + bias) for (N, C, H, W), in one.

    Args as of `torch.nn.Conv2d`, and keyword-only:

    activation, activation_parameters: as of `fusednn.autograd.conv_act_pool2d`.

    Keeps for the backward pass what the activation's gradient needs: a bit an element for ReLU and its like.  The child
    ``conv`` is the convolution: what tools put in its place is called.
    """

    convolution, directions = Conv2d, 2


class ConvAct3d(ConvAct):
    """activation(conv(x) + bias) for (N, C, D, H, W), in one.  As `ConvAct2d`, of a `torch.nn.Conv3d`."""

    convolution, directions = Conv3d, 3


class ConvMaxPool1d(ConvMaxPool):
    """max_pool(activation(conv(x) + bias)) for (N, C, L), in one.  As `ConvMaxPool2d`, of a `torch.nn.Conv1d`."""

    convolution, directions = Conv1d, 1


class ConvMaxPool2d(ConvMaxPool):
    """max_pool(activation(conv(x) + bias)) for (N, C, H, W), in one.

    Args as of `torch.nn.Conv2d`, and keyword-only:

    activation, activation_parameters: as of `ConvAct2d`.
    pool_size, pool_stride, pool_padding: as of `torch.nn.MaxPool2d`; a ``pool_stride`` of None is the size.

    Only the pooled result is written, and for the backward pass the code of each window, at most a byte.
    """

    convolution, directions = Conv2d, 2


class ConvMaxPool3d(ConvMaxPool):
    """max_pool(activation(conv(x) + bias)) for (N, C, D, H, W), in one.  As `ConvMaxPool2d`, of a `torch.nn.Conv3d`."""

    convolution, directions = Conv3d, 3
