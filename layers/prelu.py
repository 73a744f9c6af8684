"""PReLU as a layer."""

from torch import Tensor, nn

from ..autograd.prelu import prelu
from .twin import Twin

__all__ = ["PReLU"]


class PReLU(Twin, nn.PReLU):
    """prelu(x) = max(0, x) + weight min(0, x), with a learnt slope for all or for each channel.

    Twin of `torch.nn.PReLU`; input (N, C, *) where there is a slope per channel, any shape otherwise.  Saves the input.
    Source: He, Zhang, Ren, Sun, "Delving Deep into Rectifiers" (ICCV 2015).
    """

    def forward(self, input: Tensor) -> Tensor:
        return prelu(input, self.weight)
