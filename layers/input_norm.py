"""Normalisation of a network's input: by the training set's statistics, or by each example's own."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..autograd.batch_norm import batch_norm, channel_statistics
from .twin import Layer

__all__ = ["GlobalContrastNorm", "InputNorm"]


class InputNorm(Layer):
    """(x - mean) / sqrt(variance + eps) for each feature, with the statistics of the training set.

    Input (N, num_features, *), floating point; `fit` learns the statistics in one pass over the training set, and they
    are frozen from then on.  Before `fit` they are 0 and 1, so that the layer changes (almost) nothing.  Raises
    ValueError for another shape.

    Args:
        num_features: size of dimension 1 of the input.
        eps: added to the variance: a feature that is constant in the training set becomes 0.

    Buffers ``mean``, ``variance`` (biased) and ``count`` (values of each feature so far, int64) travel with the
    state_dict.  Source: LeCun, Bottou, Orr, Mueller, "Efficient BackProp" (1998), section 4.3.
    """

    mean: Tensor
    variance: Tensor
    count: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        self.register_buffer("mean", torch.zeros(num_features, device=device, dtype=dtype))
        self.register_buffer("variance", torch.ones(num_features, device=device, dtype=dtype))
        self.register_buffer("count", torch.zeros((), device=device, dtype=torch.int64))

    @torch.no_grad()
    def fit(self, batches: Tensor | Iterable[Tensor]) -> InputNorm:
        """Learn mean and variance from the training set: one tensor, or batches, each seen once and not kept.

        Batches may differ in size, and may lie on another device.  Forgets what an earlier `fit` learnt.  Returns the
        layer.  Raises ValueError where a batch isn't (N, num_features, *), or there is none, and TypeError where one
        isn't floating point.
        """
        count = 0
        mean = torch.zeros_like(self.mean, dtype=torch.float64)
        deviations = torch.zeros_like(mean)  # sum of squared deviations
        for batch in [batches] if isinstance(batches, Tensor) else batches:
            self._check_input(batch)
            if not batch.is_floating_point():
                raise TypeError(f"expected a floating-point batch, got {batch.dtype}")
            if not batch.numel():
                continue
            added = batch.numel() // self.num_features
            batch_mean, batch_variance = (s.double() for s in channel_statistics(batch.to(mean.device)))
            # Chan, Golub, LeVeque: the mean moves by the new batch's share of the distance.
            distance, count = batch_mean - mean, count + added
            mean += distance * (added / count)
            deviations += batch_variance * added + distance.square() * (added * (count - added) / count)
        if not count:
            raise ValueError("fit needs at least one example")
        self.mean.copy_(mean)
        self.variance.copy_(deviations / count)
        self.count.fill_(count)
        return self

    def forward(self, input: Tensor) -> Tensor:
        self._check_input(input)
        mean, variance = self.mean, self.variance
        if mean.dtype != input.dtype and not (mean.dtype is torch.float32 and input.dtype.itemsize == 2):
            mean, variance = mean.to(input.dtype), variance.to(input.dtype)
        return batch_norm(input, mean, variance, eps=self.eps)

    def _check_input(self, input: Tensor) -> None:
        if input.dim() < 2 or input.shape[1] != self.num_features:
            raise ValueError(f"expected input (N, {self.num_features}, *), got {tuple(input.shape)}")

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}"


class GlobalContrastNorm(Layer):
    """scale (x - mean) / sqrt(variance + eps), with the mean and the variance of each example over all its elements.

    Input (N, *), floating point, with more than one element an example (ValueError otherwise); keeps shape, dtype and
    memory format.

    Args:
        scale: deviation of the output.
        eps: regularises examples of little contrast: one without any becomes 0.

    Source: Goodfellow, Bengio, Courville, "Deep Learning" (2016), equation 12.3, with eps as its lambda.
    """

    def __init__(self, scale: float = 1.0, eps: float = 1e-8) -> None:
        super().__init__()
        self.scale = scale
        self.eps = eps

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() < 2 or input.numel() == len(input) > 0:
            raise ValueError(f"expected input (N, *), of more than one element an example, got {tuple(input.shape)}")
        # Batch norm of one row whose channels are the examples.  Within an example the order doesn't matter: that of
        # the memory makes the matrix a view.
        order = sorted(range(1, input.dim()), key=input.stride, reverse=True)
        matrix = input.permute(0, *order).flatten(1)
        weight = None
        if self.scale != 1 and matrix.numel():
            weight = torch.full_like(matrix[:, 0], self.scale)
        normed = batch_norm(matrix.unsqueeze(0), None, None, weight, training=True, eps=self.eps)
        inverse = [1 + order.index(dim) for dim in range(1, input.dim())]
        result: Tensor = normed.squeeze(0).unflatten(1, [input.shape[dim] for dim in order]).permute(0, *inverse)
        return result

    def extra_repr(self) -> str:
        return f"scale={self.scale}, eps={self.eps}"
