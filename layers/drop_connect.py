"""DropConnect as a layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..autograd.drop_connect import drop_connect_linear
from .twin import Layer

__all__ = ["DropConnect"]


class DropConnect(Layer, nn.Linear):
    """y = x (m W / (1 - p))^T + b, with a mask m over the weights that each training step draws anew.

    A `torch.nn.Linear` otherwise, and just that in evaluation.  The mask is never stored: the weights are dropped in a
    pass before the matrix product, and again in the backward pass, from a seed.  One mask serves the whole batch; the
    bias is not dropped.

    Args:
        in_features, out_features, bias, device, dtype: as in `torch.nn.Linear`.
        p: probability to drop a weight.

    Shape: (*, in_features) to (*, out_features).  Raises ValueError for a ``p`` outside [0, 1].  Source: Wan, Zeiler,
    Zhang, LeCun, Fergus, "Regularization of Neural Networks using DropConnect" (ICML 2013), whose inference by sampling
    is replaced by the mean.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        p: float = 0.5,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        if not 0 <= p <= 1:
            raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
        self.p = p

    def forward(self, input: Tensor) -> Tensor:
        return drop_connect_linear(input, self.weight, self.bias, self.p, self.training)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, p={self.p}"
