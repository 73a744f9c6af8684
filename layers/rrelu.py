"""RReLU as a layer."""

from torch import Tensor, nn

from ..autograd.rrelu import rrelu
from .twin import Twin

__all__ = ["RReLU"]


class RReLU(Twin, nn.RReLU):
    """rrelu(x) = x where x > 0, else s x: s uniform in [lower, upper) in training, their mean in evaluation.

    Twin of `torch.nn.RReLU`; obeys ``torch.manual_seed``, but draws other numbers than stock.  Saves one bit an
    element.  Source: Xu, Wang, Chen, Li, "Empirical Evaluation of Rectified Activations in Convolutional Network"
    (2015).
    """

    def forward(self, input: Tensor) -> Tensor:
        return rrelu(input, self.lower, self.upper, self.training, self.inplace)
