"""DropConnect as a layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..autograd.drop_connect import drop_connect_linear
from .compound import Compound
from .derived import beneath
from .twin import is_untouched

__all__ = ["DropConnect"]


class DropConnect(Compound):
    """y = x (m W / (1 - p))^T + b, with a mask m over the weights that each training step draws anew.

    The child ``linear`` is a `torch.nn.Linear`, called in evaluation.  No mask is stored: the weights are dropped in a
    pass before the matrix product, and again in the backward pass, from a seed.  One mask serves the whole batch;
    the bias is not dropped.

    Args:
        in_features, out_features, bias, device, dtype: as in `torch.nn.Linear`.
        p: probability to drop a weight.

    Shape: (*, in_features) to (*, out_features).  Raises ValueError for a ``p`` outside [0, 1].  In training, raises
    TypeError where ``linear`` has hooks or is no `torch.nn.Linear` any more: its weights can't be dropped.

    Source: Wan, Zeiler, Zhang, LeCun, Fergus, "Regularization of Neural Networks using DropConnect" (ICML 2013), whose
    inference by sampling is replaced by the mean.
    """

    child = "linear"

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
        super().__init__()
        if not 0 <= p <= 1:
            raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
        self.linear = nn.Linear(in_features, out_features, bias, device, dtype)
        self.p = p

    def forward(self, input: Tensor) -> Tensor:
        linear = self.linear
        if not (self.training and self.p):
            result: Tensor = linear(input)
            return result
        if not (beneath(type(linear)) is nn.Linear and is_untouched(linear)):
            raise TypeError(f"can't drop the weights of a {type(linear).__name__} that isn't a plain torch.nn.Linear")
        return drop_connect_linear(input, linear.weight, linear.bias, self.p)

    def extra_repr(self) -> str:
        return f"p={self.p}"
