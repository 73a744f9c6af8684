"""Negative log likelihood as a layer."""

from torch import Tensor, nn

from ..autograd.nll_loss import nll_loss
from .twin import Twin

__all__ = ["NLLLoss"]


class NLLLoss(Twin, nn.NLLLoss):
    """nll(x, t) = -weight[t] x[t] of log-probabilities x and class indices t; the mean is over the weights.

    Twin of `torch.nn.NLLLoss`: input (C), (N, C) or (N, C, d1, ...), target without C.  Targets that are
    ``ignore_index`` count for nothing; others out of bounds raise IndexError on the CPU, and a device assertion on
    CUDA.  Source: PyTorch's page of ``torch.nn.NLLLoss``.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return nll_loss(input, target, weight=self.weight, ignore_index=self.ignore_index, reduction=self.reduction)
