"""Maxout layers: the maximum over pieces, each an ordinary linear layer or convolution of its own.

``torch.nn`` has none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import sqrt
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..autograd import stock as F
from ..autograd.dropout import dropout
from ..autograd.maxout import maxout_conv2d, maxout_linear
from .init import he_uniform_
from .twin import Layer

__all__ = ["Maxout", "MaxoutConv2d"]


class Maxout(Layer):
    """y = max over p of (x W_p^T + b_p): a linear layer with a learnt, convex, piecewise linear activation.

    Input (*, in_features), output (*, out_features).  For the backward pass it saves its input and one byte for each
    output; the ``pieces`` times wider product stays out of memory where one kernel makes product and maximum.

    Args:
        in_features, out_features: sizes of input and output.
        pieces: linear layers that each output is the maximum of.
        bias: whether the pieces have biases.
        device, dtype: of the parameters.
        dropout: in training, the probability of dropping a feature; the others are multiplied by 1 / (1 - dropout).
        dropout_on: drop features of the "input", as the paper does, or of the "output".

    Attributes:
        weight: (pieces, out_features, in_features); each piece initialised as `torch.nn.Linear`'s.  `init` has the
            initialisers of Glorot and He.
        bias: (pieces, out_features), or None.

    Raises:
        ValueError: ``pieces`` is not a positive integer, ``dropout`` not a probability, or ``dropout_on`` neither of
            the two.

    Source: Goodfellow, Warde-Farley, Mirza, Courville, Bengio, "Maxout Networks" (ICML 2013).
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        pieces: int = 2,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        dropout: float = 0.0,
        dropout_on: Literal["input", "output"] = "input",
    ) -> None:
        super().__init__()
        _check_pieces(pieces)
        if not 0.0 <= dropout <= 1.0:
            raise ValueError(f"dropout must be a probability, not {dropout}")
        if dropout_on not in ("input", "output"):
            raise ValueError(f'dropout_on must be "input" or "output", not {dropout_on!r}')
        self.in_features = in_features
        self.out_features = out_features
        self.pieces = pieces
        self.dropout = dropout
        self.dropout_on = dropout_on
        self.weight = nn.Parameter(torch.empty(pieces, out_features, in_features, device=device, dtype=dtype))
        shape = (pieces, out_features)
        self.register_parameter("bias", nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) if bias else None)
        self.reset_parameters()

    @classmethod
    def from_linear(cls, linear: nn.Linear, activation: nn.ReLU | nn.LeakyReLU) -> Maxout:
        """A Maxout of two pieces whose outputs and gradients are those of ``linear`` followed by ``activation``.

        ReLU is max(0, z), LeakyReLU max(negative_slope z, z).  The parameters are copies.  Inputs must be finite: 0
        times infinity is NaN.

        Raises:
            TypeError: the activation is neither ReLU nor LeakyReLU.
            ValueError: ``negative_slope`` is above 1, so that the function isn't convex.
        """
        if not isinstance(activation, nn.ReLU | nn.LeakyReLU):
            raise TypeError(f"the activation must be ReLU or LeakyReLU, not {type(activation).__name__}")
        slope = activation.negative_slope if isinstance(activation, nn.LeakyReLU) else 0.0
        if slope > 1:
            raise ValueError(f"max(z, {slope} z) is not LeakyReLU with that slope: it must be 1 at most")
        like = linear.weight
        has_bias = linear.bias is not None
        layer = cls(linear.in_features, linear.out_features, 2, has_bias, like.device, like.dtype)
        with torch.no_grad():
            # Where z is 0 the first piece wins, and its slope is the activation's gradient there.
            layer.weight.copy_(torch.stack([slope * like, like]))
            if layer.bias is not None:
                layer.bias.copy_(torch.stack([slope * linear.bias, linear.bias]))
        return layer.train(linear.training)

    def reset_parameters(self) -> None:
        """Initialise each piece as `torch.nn.Linear` does: uniform in +-1 / sqrt(in_features)."""
        _reset(self.weight, self.bias)

    def forward(self, input: Tensor) -> Tensor:
        p = self.dropout if self.training else 0.0
        if p and self.dropout_on == "input":
            # The weight's gradient needs the input as it was multiplied.  Dropped once, in memory, it costs what
            # dropping it on load in the forward pass and once more in the backward pass would.
            return maxout_linear(dropout(input, p), self.weight, self.bias)
        return maxout_linear(input, self.weight, self.bias, dropout=p)

    def extra_repr(self) -> str:
        text = f"in_features={self.in_features}, out_features={self.out_features}, pieces={self.pieces}"
        text += f", bias={self.bias is not None}"
        return text + (f", dropout={self.dropout}, dropout_on={self.dropout_on!r}" if self.dropout else "")


class MaxoutConv2d(Layer):
    """The maximum over the pieces of convolutions that share their input.

    Input (N, in_channels, H, W) or (in_channels, H, W); output as `torch.nn.Conv2d`'s with ``out_channels``.  The
    convolution is PyTorch's, of all pieces at once; one pass adds the biases and takes the maximum, in either memory
    format, and saves one byte for each output.

    Args:
        pieces: convolutions that each output channel is the maximum of.
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype: as
            `torch.nn.Conv2d`'s.

    Attributes:
        weight: (pieces, out_channels, in_channels / groups, kernel height, kernel width); each piece initialised as
            `torch.nn.Conv2d`'s.  ``model.to(memory_format=torch.channels_last)`` orders each piece's memory so.
        bias: (pieces, out_channels), or None.

    Raises:
        ValueError: ``pieces`` is not a positive integer, or as `torch.nn.Conv2d`.

    Source: Goodfellow, Warde-Farley, Mirza, Courville, Bengio, "Maxout Networks" (ICML 2013).
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | str | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        pieces: int = 2,
    ) -> None:
        super().__init__()
        _check_pieces(pieces)
        # Stock's own constructor checks the arguments and brings them into form.
        stock = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, "meta"
        )
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.pieces = pieces
        self.kernel_size = stock.kernel_size
        self.stride = stock.stride
        self.padding = stock.padding
        self.dilation = stock.dilation
        self.groups = groups
        self.padding_mode = padding_mode
        self.weight = nn.Parameter(torch.empty(pieces, *stock.weight.shape, device=device, dtype=dtype))
        shape = (pieces, out_channels)
        self.register_parameter("bias", nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise each piece as `torch.nn.Conv2d` does: uniform in +-1 / sqrt(fan_in)."""
        _reset(self.weight, self.bias)

    def forward(self, input: Tensor) -> Tensor:
        padding: int | str | Sequence[int] = self.padding
        if self.padding_mode != "zeros":
            input, padding = F.pad(input, self._around(), self.padding_mode), 0
        return maxout_conv2d(input, self.weight, self.bias, self.stride, padding, self.dilation, self.groups)

    def _around(self) -> list[int]:
        """The padding at (left, right, top, bottom)."""
        if self.padding == "valid":
            return [0] * 4
        around = []
        for i in (1, 0):
            if self.padding == "same":
                total = self.dilation[i] * (self.kernel_size[i] - 1)
                around += [total // 2, total - total // 2]
            else:
                around += [int(self.padding[i])] * 2
        return around

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MaxoutConv2d:
        """Stock's, which converts parameters, with the pieces and channels of the 5-dimensional weight as one.

        Otherwise ``channels_last``, which is for 4 dimensions, would raise.
        """

        def convert(tensor: Tensor) -> Tensor:
            if tensor.dim() != 5:
                return fn(tensor)
            converted: Tensor = fn(tensor.flatten(0, 1)).unflatten(0, tensor.shape[:2])
            return converted

        super()._apply(convert, recurse)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        defaults = {"padding": (0, 0), "dilation": (1, 1), "groups": 1, "padding_mode": "zeros"}
        for name, default in defaults.items():
            if getattr(self, name) != default:
                text += f", {name}={getattr(self, name)}"
        return text + ("" if self.bias is not None else ", bias=False") + f", pieces={self.pieces}"


def _check_pieces(pieces: int) -> None:
    if type(pieces) is not int or pieces < 1:
        raise ValueError(f"pieces must be a positive integer, not {pieces!r}")


def _reset(weight: Tensor, bias: Tensor | None) -> None:
    if weight.numel():
        he_uniform_(weight, a=sqrt(5))
        if bias is not None:
            bound = 1 / sqrt(weight[0, 0].numel())
            nn.init.uniform_(bias, -bound, bound)
