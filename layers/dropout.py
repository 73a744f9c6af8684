"""Dropout layers: drop-in subclasses of ``torch.nn``'s.

In training the kernels save a seed and no mask; the mask obeys ``torch.manual_seed`` but is another than stock draws.
In evaluation each is the identity.
"""

from torch import Tensor, nn

from ..autograd.dropout import alpha_dropout, dropout, dropout1d, dropout2d, dropout3d, feature_alpha_dropout
from .twin import Twin

__all__ = ["AlphaDropout", "Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "FeatureAlphaDropout"]


class Dropout(Twin, nn.Dropout):
    """dropout(x) = x / (1 - p) with probability 1 - p, else 0, for each element.  Twin of `torch.nn.Dropout`.

    Saves a seed for the backward pass.  Source: Srivastava et al., "Dropout: A Simple Way to Prevent Neural Networks
    from Overfitting" (JMLR 2014).
    """

    def forward(self, input: Tensor) -> Tensor:
        return dropout(input, self.p, self.training, self.inplace)


class Dropout1d(Twin, nn.Dropout1d):
    """Dropout of whole channels of (N, C, L) or (C, L).  Twin of `torch.nn.Dropout1d`.

    Saves a seed for the backward pass.  Source: Tompson et al., "Efficient Object Localization Using Convolutional
    Networks" (CVPR 2015).
    """

    def forward(self, input: Tensor) -> Tensor:
        return dropout1d(input, self.p, self.training, self.inplace)


class Dropout2d(Twin, nn.Dropout2d):
    """Dropout of whole channels of (N, C, H, W).  Twin of `torch.nn.Dropout2d`.

    Saves a seed for the backward pass.  Source: Tompson et al., "Efficient Object Localization Using Convolutional
    Networks" (CVPR 2015).
    """

    def forward(self, input: Tensor) -> Tensor:
        return dropout2d(input, self.p, self.training, self.inplace)


class Dropout3d(Twin, nn.Dropout3d):
    """Dropout of whole channels of (N, C, D, H, W) or (C, D, H, W).  Twin of `torch.nn.Dropout3d`.

    Saves a seed for the backward pass.  Source: Tompson et al., "Efficient Object Localization Using Convolutional
    Networks" (CVPR 2015).
    """

    def forward(self, input: Tensor) -> Tensor:
        return dropout3d(input, self.p, self.training, self.inplace)


class AlphaDropout(Twin, nn.AlphaDropout):
    """Dropout to SELU's negative saturation, scaled and shifted to keep mean 0 and variance 1.  Twin of
    `torch.nn.AlphaDropout`.

    Saves a seed for the backward pass.  Source: Klambauer, Unterthiner, Mayr, Hochreiter, "Self-Normalizing Neural
    Networks" (NeurIPS 2017).
    """

    def forward(self, input: Tensor) -> Tensor:
        return alpha_dropout(input, self.p, self.training)  # stock ignores inplace


class FeatureAlphaDropout(Twin, nn.FeatureAlphaDropout):
    """Alpha dropout of whole channels of (N, C, *).  Twin of `torch.nn.FeatureAlphaDropout`.

    Saves a seed for the backward pass.  Source: Klambauer, Unterthiner, Mayr, Hochreiter, "Self-Normalizing Neural
    Networks" (NeurIPS 2017).
    """

    def forward(self, input: Tensor) -> Tensor:
        return feature_alpha_dropout(input, self.p, self.training)  # stock ignores inplace
