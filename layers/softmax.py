"""Softmax layers: drop-in subclasses of ``torch.nn``'s.

Each takes tensors of any shape and strides, in float16, bfloat16, float32 or float64, and keeps shape, dtype and memory
format.  The output is saved for the backward pass.
"""

from torch import Tensor, nn

from ..autograd.softmax import log_softmax, softmax, softmin
from .twin import Twin

__all__ = ["LogSoftmax", "Softmax", "Softmax2d", "Softmin"]


class Softmax(Twin, nn.Softmax):
    """softmax(x) = exp(x) / sum(exp(x)) along ``dim``.  Twin of `torch.nn.Softmax`."""

    def forward(self, input: Tensor) -> Tensor:
        return softmax(input, self.dim, _stacklevel=5)


class LogSoftmax(Twin, nn.LogSoftmax):
    """log_softmax(x) = x - log(sum(exp(x))) along ``dim``.  Twin of `torch.nn.LogSoftmax`."""

    def forward(self, input: Tensor) -> Tensor:
        return log_softmax(input, self.dim, _stacklevel=5)


class Softmin(Twin, nn.Softmin):
    """softmin(x) = softmax(-x) along ``dim``, in one pass.  Twin of `torch.nn.Softmin`."""

    def forward(self, input: Tensor) -> Tensor:
        return softmin(input, self.dim, _stacklevel=5)


class Softmax2d(Twin, nn.Softmax2d):
    """Softmax over the channels of each pixel; input (N, C, H, W) or (C, H, W).  Twin of `torch.nn.Softmax2d`."""

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() not in (3, 4):
            return super().forward(input)  # raises
        return softmax(input, -3, _stacklevel=5)
