"""Standout as a layer."""

from __future__ import annotations

from torch import Tensor

from ..autograd.standout import standout
from .twin import Layer

__all__ = ["Standout"]


class Standout(Layer):
    """standout(x, z) = x m with m drawn from Bernoulli(sigmoid(alpha z + beta)); in evaluation, x times its mean.

    >>> z = linear(x)
    >>> y = Standout(alpha=1.0, beta=0.5)(z.relu(), z)   # the paper's tied weights

    Sampled in the pass that applies it; saves one bit an element.  No gradient reaches the belief z in training.

    Args:
        alpha: scale of the belief.
        beta: its shift, in logits: larger keeps more.

    Shape: input and belief of any one shape and dtype.  Source: Ba and Frey, "Adaptive dropout for training deep neural
    networks" (NeurIPS 2013).
    """

    def __init__(self, alpha: float = 1.0, beta: float = 0.0) -> None:
        super().__init__()
        self.alpha = alpha
        self.beta = beta

    def forward(self, input: Tensor, belief: Tensor) -> Tensor:
        return standout(input, belief, self.alpha, self.beta, self.training)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, beta={self.beta}"
