"""The output layer and its loss as one layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..autograd.linear_cross_entropy import composed, linear_cross_entropy
from .twin import Twin

__all__ = ["LinearCrossEntropyLoss"]


def _loss(function: Callable[..., Tensor], layer: Stock, input: Tensor, target: Tensor) -> Tensor:
    """The layer's loss, as this function computes it."""
    shape = (layer.num_classes, *layer.out_features)
    bias = layer.linear.bias
    return function(
        input,
        layer.linear.weight.reshape(*shape, layer.linear.in_features),
        target,
        linear_bias=None if bias is None else bias.reshape(shape),
        weight=layer.weight,
        reduction=layer.reduction,
        ignore_index=layer.ignore_index,
        label_smoothing=layer.label_smoothing,
        options=layer.options,
    )


if TYPE_CHECKING or hasattr(nn, "LinearCrossEntropyLoss"):
    Stock = nn.LinearCrossEntropyLoss
else:

    class Stock(nn.Module):
        """What torch 2.13 has under this name, for older versions."""

        def __init__(
            self,
            in_features: int,
            num_classes: int,
            *,
            out_features: tuple[int, ...] = (),
            bias: bool = False,
            device: torch.device | None = None,
            dtype: torch.dtype | None = None,
            reduction: str = "mean",
            weight: Tensor | None = None,
            ignore_index: int | None = None,
            label_smoothing: float = 0.0,
            options: Any = None,
        ) -> None:
            if weight is not None and weight.shape != (num_classes,):
                raise RuntimeError(f"expected weight of shape {(num_classes,)}, got {tuple(weight.shape)}")
            if not 0 <= label_smoothing <= 1:
                raise RuntimeError(f"expected label_smoothing from 0 to 1, got {label_smoothing}")
            super().__init__()
            self.reduction = reduction
            self.register_buffer("weight", weight)
            self.num_classes = num_classes
            self.out_features = out_features
            self.ignore_index = ignore_index
            self.label_smoothing = label_smoothing
            outputs = math.prod(out_features, start=num_classes)
            self.linear = nn.Linear(in_features, outputs, bias=bias, device=device, dtype=dtype)
            self.options = options

        def forward(self, input: Tensor, target: Tensor) -> Tensor:
            return _loss(composed, self, input, target)

        def extra_repr(self) -> str:
            names = ("num_classes", "out_features", "reduction", "ignore_index", "label_smoothing", "options")
            return ", ".join(f"{name}={getattr(self, name)}" for name in names)

    Stock.__name__ = Stock.__qualname__ = "LinearCrossEntropyLoss"


class LinearCrossEntropyLoss(Twin, Stock):
    """cross_entropy(linear(input), target), worked through in chunks: all logits never exist at once.

    Twin of `torch.nn.LinearCrossEntropyLoss` (torch 2.13), with its parameters and names also on older versions.  Input
    (in_features) or (N, in_features); target class indices (N, *out_features) or probabilities
    (N, num_classes, *out_features).
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return _loss(linear_cross_entropy, self, input, target)
