"""GLU as a layer, a drop-in subclass of ``torch.nn``'s; gates of two layers are fused where code computes them."""

from torch import Tensor, nn

from ..autograd.gated import glu
from .twin import Twin

__all__ = ["GLU"]


class GLU(Twin, nn.GLU):
    """first * sigmoid(second), the halves of the input along ``dim``.  Twin of `torch.nn.GLU`.

    Saves the input for the backward pass.  Source: Dauphin et al., "Language Modeling with Gated Convolutional
    Networks" (ICML 2017).
    """

    def forward(self, input: Tensor) -> Tensor:
        return glu(input, self.dim)
