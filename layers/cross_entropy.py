"""Cross-entropy as a layer."""

from torch import Tensor, nn

from ..autograd.cross_entropy import cross_entropy
from .twin import Twin

__all__ = ["CrossEntropyLoss"]


class CrossEntropyLoss(Twin, nn.CrossEntropyLoss):
    """-sum(weight q log softmax(x)) over the classes, softmax and loss in one pass.

    Twin of `torch.nn.CrossEntropyLoss`; input (C), (N, C) or (N, C, d1, ...), target class indices or probabilities.
    Saves the log-sum-exp of each sample, not its probabilities.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )
