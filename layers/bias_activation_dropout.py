"""Bias, activation, dropout and a residual as one layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..autograd.activation import resolve_activation
from ..autograd.bias_activation_dropout import bias_activation_dropout
from .twin import Layer

__all__ = ["BiasActivationDropout"]


class BiasActivationDropout(Layer):
    """dropout(activation(x + bias)) + residual, for a linear layer or a convolution without a bias of its own.

    >>> block = nn.Sequential(nn.Linear(64, 256, bias=False), BiasActivationDropout(256, 0.1, activation="gelu"))

    One kernel each way.  Where the activation's gradient is 0 or 1 (ReLU, ReLU6, Hardtanh, Threshold, Hardsigmoid) the
    backward pass keeps one bit an element, for LeakyReLU one bit and a seed, otherwise the input and a seed.  In
    evaluation nothing is dropped.

    Args:
        num_features: size of the bias.
        p: probability to drop an element; may be changed between steps (`AnnealedDropout` does), compiling nothing.
        activation: a name of `torch.nn.functional` (``"relu"``, ``"gelu"``, ...), or ``"gelu_tanh"``.
        parameters: the activation's scalar parameters in PyTorch's order; its defaults, where they are missing.
        dim: the dimension of the input that the bias lies along: -1 after a linear layer, 1 after a convolution.
        bias: whether there is a bias.  It starts at 0.

    Shape: input and residual of any shape whose dimension ``dim`` has ``num_features``; the output is alike.

    Raises ValueError for a ``p`` outside [0, 1] and for an unknown activation.  Source: Srivastava et al., "Dropout: A
    Simple Way to Prevent Neural Networks from Overfitting" (JMLR 2014).
    """

    def __init__(
        self,
        num_features: int,
        p: float = 0.5,
        *,
        activation: str = "relu",
        parameters: Sequence[float] = (),
        dim: int = -1,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= p <= 1:
            raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
        resolve_activation(activation, parameters)
        self.num_features = num_features
        self.p = p
        self.activation = activation
        self.parameters_of_activation = tuple(parameters)
        self.dim = dim
        self.bias: nn.Parameter | None
        if bias:
            self.bias = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return bias_activation_dropout(
            input,
            self.bias,
            residual,
            self.p,
            self.activation,
            self.parameters_of_activation,
            self.training,
            self.dim,
        )

    def extra_repr(self) -> str:
        parameters = f", parameters={self.parameters_of_activation}" if self.parameters_of_activation else ""
        return (
            f"{self.num_features}, p={self.p}, activation={self.activation!r}{parameters}, dim={self.dim}, "
            f"bias={self.bias is not None}"
        )
