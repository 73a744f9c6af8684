"""Pointwise losses as layers: drop-in subclasses of ``torch.nn``'s.

Each compares an input with a target of the same shape, in any strides, in float16, bfloat16, float32 or float64, and
gives the loss of each element (``reduction="none"``), their sum or their mean; whatever else PyTorch accepts goes to
the stock operator, which raises the stock errors.  The operands are all that is kept for the backward pass.
"""

from torch import Tensor, nn

from ..autograd import pointwise_loss as functional
from .twin import Twin

__all__ = [
    "BCELoss",
    "BCEWithLogitsLoss",
    "HuberLoss",
    "KLDivLoss",
    "L1Loss",
    "MSELoss",
    "SmoothL1Loss",
]


class MSELoss(Twin, nn.MSELoss):
    """mse(x, t) = (x - t)^2.  Twin of `torch.nn.MSELoss`.

    Source: PyTorch's page of ``torch.nn.MSELoss``.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.mse_loss(input, target, reduction=self.reduction)


class L1Loss(Twin, nn.L1Loss):
    """l1(x, t) = |x - t|.  Twin of `torch.nn.L1Loss`.

    Source: PyTorch's page of ``torch.nn.L1Loss``.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.l1_loss(input, target, reduction=self.reduction)


class SmoothL1Loss(Twin, nn.SmoothL1Loss):
    """smooth_l1(x, t) = (x - t)^2 / (2 beta) where |x - t| < beta, else |x - t| - beta / 2.

    Twin of `torch.nn.SmoothL1Loss`.  Source: Girshick, "Fast R-CNN" (ICCV 2015).
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.smooth_l1_loss(input, target, reduction=self.reduction, beta=self.beta)


class HuberLoss(Twin, nn.HuberLoss):
    """huber(x, t) = (x - t)^2 / 2 where |x - t| < delta, else delta (|x - t| - delta / 2).

    Twin of `torch.nn.HuberLoss`.  Source: Huber, "Robust Estimation of a Location Parameter" (1964).
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.huber_loss(input, target, reduction=self.reduction, delta=self.delta)


class BCELoss(Twin, nn.BCELoss):
    """bce(x, t) = -weight (t log x + (1 - t) log(1 - x)), logarithms clamped at -100.  Twin of `torch.nn.BCELoss`.

    An input or target outside [0, 1] raises RuntimeError on the CPU, and a device assertion on CUDA.
    Source: PyTorch's page of ``torch.nn.BCELoss``.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.binary_cross_entropy(input, target, weight=self.weight, reduction=self.reduction)


class BCEWithLogitsLoss(Twin, nn.BCEWithLogitsLoss):
    """bce(x, t) = -weight (pos_weight t log sigmoid(x) + (1 - t) log(1 - sigmoid(x))).

    Twin of `torch.nn.BCEWithLogitsLoss`.  Weights broadcast, and are read as they are.
    Source: PyTorch's page of ``torch.nn.BCEWithLogitsLoss``.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.binary_cross_entropy_with_logits(
            input, target, self.weight, pos_weight=self.pos_weight, reduction=self.reduction
        )


class KLDivLoss(Twin, nn.KLDivLoss):
    """kl_div(x, t) = t (log t - x), or exp(t) (t - x) with log_target=True, of a logarithm x.

    Twin of `torch.nn.KLDivLoss`; reduction="batchmean" divides the sum by the number of samples.
    Source: Kullback and Leibler, "On Information and Sufficiency" (1951).
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.kl_div(input, target, reduction=self.reduction, log_target=self.log_target)
