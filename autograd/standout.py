"""Standout: adaptive dropout, whose keep probability each unit has from a belief network."""

from math import inf
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ..kernels import standout as kernels
from ..kernels.base.random import with_seed
from ..kernels.base.tiles import mask_bytes
from . import stock as F
from .activation import masked_backward
from .anchors import anchors_of
from .dispatch import is_number, or_stock, takes_kernel
from .gradients import LinearGradient
from .operators import operator

__all__ = ["standout"]


_forward = operator(
    "standout(Tensor x, Tensor belief, Tensor seed, float alpha, float beta) -> (Tensor, Tensor)",
    fake=lambda x, *_: (torch.empty_like(x), x.new_empty(mask_bytes(x.numel()), dtype=torch.uint8)),
)(kernels.standout_forward)


class Standout(Function):
    """Saves one bit an element.  The gate is ReLU's; sampling has no gradient, so neither has the belief."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, belief: Tensor, seed: Tensor, alpha: float, beta: float, anchors: tuple[Tensor, ...]
    ) -> Tensor:
        y: Tensor
        y, mask = _forward(x, belief, seed, alpha, beta)
        ctx.save_for_backward(mask)
        ctx.strides = y.stride()
        ctx.anchors = anchors
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (mask,) = ctx.saved_tensors
        arguments = (ctx.strides, "relu", 0.0, 0.0)
        dx = LinearGradient.apply(g, mask, None, masked_backward, arguments, *ctx.anchors)
        return dx, None, None, None, None, None


@or_stock
def standout(input: Tensor, belief: Tensor, alpha: float = 1.0, beta: float = 0.0, training: bool = True) -> Tensor:
    """x m with m drawn from Bernoulli(sigmoid(alpha belief + beta)) for each unit, or x times its mean in evaluation.

    Args:
        input: the units' activations, any shape, float16, bfloat16, float32 or float64.
        belief: the belief network's pre-activations, of the same shape and dtype; with the paper's tied weights, the
            units' own pre-activations.
        alpha: scale of the belief.
        beta: its shift, in logits: larger keeps more.
        training: whether to sample.

    Sampling has no gradient: in training none reaches the belief.  Probabilities are met to 2^-24.  Saves one bit an
    element.  Source: Ba and Frey, "Adaptive dropout for training deep neural networks" (NeurIPS 2013).
    """
    if not takes_kernel("standout", input, belief, refusal=lambda: _refusal(input, belief, alpha, beta, training)):
        probability = F.sigmoid(alpha * belief + beta)
        return input * (torch.bernoulli(probability.detach()) if training else probability)

    belief = belief.detach()

    def compute(seed: Tensor) -> Tensor:
        y: Tensor
        if torch.is_grad_enabled() and input.requires_grad:
            y = Standout.apply(input, belief, seed, float(alpha), float(beta), anchors_of(input))
        else:
            y, _ = _forward(input, belief, seed, float(alpha), float(beta))
        return y

    return with_seed(input.device, compute)


def _refusal(input: Tensor, belief: Tensor, alpha: object, beta: object, training: object) -> str | None:
    if not training:
        return "evaluation takes the mean"
    if input.shape != belief.shape:
        return "the belief is of another shape"
    if not is_number(alpha) or not is_number(beta):
        return "a parameter is not a Python number"
    return None if -inf < alpha < inf and -inf < beta < inf else "a parameter is not finite"
