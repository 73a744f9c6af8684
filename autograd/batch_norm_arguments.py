"""The arguments of batch norm as one value, what PyTorch makes of them, and why kernels don't take them."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.functions.activation import Activated
from . import stock as F
from .dispatch import is_number

__all__ = ["NormArguments", "norm_and_rest", "those_given"]


def those_given(*tensors: Tensor | None) -> tuple[Tensor, ...]:
    """Those that aren't None."""
    return tuple(tensor for tensor in tensors if tensor is not None)


class NormArguments(NamedTuple):
    """What `torch.nn.functional.batch_norm` is given besides its input, in its order.

    ``batches``, the number of them so far, takes the place of the momentum in training, where there is one.
    """

    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    training: bool
    momentum: float
    eps: float
    batches: Tensor | None = None

    @property
    def vectors(self) -> tuple[Tensor, ...]:
        """Those of the channels that there are."""
        return those_given(self.running_mean, self.running_var, self.weight, self.bias)

    @property
    def running(self) -> tuple[Any, ...]:
        """What operators are given that update the running statistics."""
        return self.running_mean, self.running_var, self.batches, float(self.momentum)

    def named(self, name: str) -> str:
        """The operation's name: stock's reads the number of batches on the host, which breaks graphs."""
        return name if self.batches is None else "cumulative_batch_norm"

    def stock(self, input: Tensor) -> Tensor:
        """By PyTorch's operator."""
        momentum = self.momentum if self.batches is None or not self.training else 1.0 / float(self.batches)
        vectors = (self.running_mean, self.running_var, self.weight, self.bias)
        return F.batch_norm(input, *vectors, self.training, momentum, self.eps)

    def refusal(self, input: Any, residual: Any = None, activation: Activated | None = None) -> str | None:
        """Why the kernels don't take these arguments, or None."""
        reason = self.refusal_in_any_mode(input, residual)
        if reason is None and not self.training and self.running_mean is None:
            return "running statistics are missing"
        if reason is None and self.training and input.numel() == input.shape[1]:
            return "one value per channel"
        return reason or (None if activation is None else activation.refusal())

    def refusal_in_any_mode(self, input: Any, residual: Any) -> str | None:
        """Why the kernels take these arguments neither in training nor in evaluation, or None."""
        running, batches, vectors = those_given(self.running_mean, self.running_var), self.batches, self.vectors
        training: Any = self.training
        if type(training) is not bool:
            return "training is not a boolean"
        if not isinstance(input, Tensor) or not all(isinstance(tensor, Tensor) for tensor in vectors):
            return "not a tensor"
        if batches is not None and not (
            isinstance(batches, Tensor)
            and (batches.dtype, batches.numel(), batches.device) == (torch.int64, 1, input.device)
        ):
            return "the number of batches is not one int64 beside the input"
        if not is_number(self.momentum):
            return "momentum is not a Python number"
        if not is_number(self.eps) or self.eps <= 0:
            return "eps is not a positive number"
        if input.dim() < 2:
            return "no dimension of channels"
        if any(vector.shape != input.shape[1:2] for vector in vectors):
            return "statistics and parameters are not vectors of the channels"
        if len(running) == 1:
            return "running statistics are missing"
        if any(statistic.requires_grad or not statistic.is_contiguous() for statistic in running):
            return "running statistics require gradients, or are strided"
        if residual is not None and (not isinstance(residual, Tensor) or residual.shape != input.shape):
            return "the residual has another shape"
        return None


def norm_and_rest(arguments: tuple[Any, ...]) -> tuple[NormArguments, tuple[Any, ...]]:
    """Those of batch norm, which a decision's arguments begin with, and the others."""
    count = len(NormArguments._fields)
    return NormArguments(*arguments[:count]), arguments[count:]
