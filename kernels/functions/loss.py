"""Pointwise losses: one table of pure device functions.

Each row of `LOSSES` defines a loss once, as a function of an input element x and its target t: its value, and its
derivatives with respect to both.  The device functions neither load nor store.

All take the loss's two scalar parameters ``a`` and ``b``, used or not, and the weight ``p`` of a positive target (1
where there is none), in the type of the arithmetic.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch

from ..base._triton import tl, triton
from ..base.numerics import divide, exp, log, log1p, negative, sigmoid

__all__ = ["LOSSES", "PointwiseLoss", "Reduction"]

#: "weighted_mean" divides by the sum of the weights, "mean" by the number of elements, "batchmean" by that of samples.
Reduction = Literal["none", "mean", "sum", "batchmean", "weighted_mean"]

# --- Device functions: value, and derivatives with respect to x and t, of (x, t, p, a, b) ----------------------------
#
# Comparisons are written the way round that treats NaN as PyTorch does.


@triton.jit
def mse_value(x, t, p, a, b):
    d = x - t
    return d * d


@triton.jit
def mse_gradient(x, t, p, a, b):
    return 2 * (x - t)


@triton.jit
def mse_target_gradient(x, t, p, a, b):
    return 2 * (t - x)


@triton.jit
def l1_value(x, t, p, a, b):
    return tl.abs(x - t)


@triton.jit
def l1_gradient(x, t, p, a, b):
    # The sign of NaN is 0.
    d = x - t
    return tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, 0.0)).to(x.dtype)


@triton.jit
def l1_target_gradient(x, t, p, a, b):
    return negative(l1_gradient(x, t, p, a, b))


@triton.jit
def huber_value(x, t, p, a, b):
    """Huber's loss of threshold a, divided by b: with b = 1 that is PyTorch's, with b = a the smooth L1 loss."""
    z = tl.abs(x - t)
    return tl.where(z < a, 0.5 * z * z / b, (z - 0.5 * a) * divide(a, b))


@triton.jit
def huber_gradient(x, t, p, a, b):
    d = x - t
    slope = divide(a, b)
    return tl.where(d <= -a, -slope, tl.where(d >= a, slope, d / b))


@triton.jit
def huber_target_gradient(x, t, p, a, b):
    return 0 - huber_gradient(x, t, p, a, b)  # as of t - x: 0 where they are equal


@triton.jit
def bce_valid(x, t):
    return (x >= 0) & (x <= 1) & (t >= 0) & (t <= 1)


@triton.jit
def bce_value(x, t, p, a, b):
    # Logarithms are clamped at -100; no operand is NaN here.
    log_x = log(x)
    log_1_minus_x = log1p(-x)
    return (t - 1) * tl.where(log_1_minus_x < -100, -100.0, log_1_minus_x) - t * tl.where(log_x < -100, -100.0, log_x)


@triton.jit
def bce_gradient(x, t, p, a, b):
    variance = (1 - x) * x
    least = 9.999999960041972e-13  # 1e-12 in float32, which PyTorch has in float64 too
    return (x - t) / tl.where(variance < least, least, variance)


@triton.jit
def bce_target_gradient(x, t, p, a, b):
    # Not clamped, in PyTorch either.
    return log1p(-x) - log(x)


@triton.jit
def log_sigmoid(x, COARSE: tl.constexpr = False):
    return tl.where(x > 0, 0.0, x) - log1p(exp(-tl.abs(x), COARSE), COARSE)


@triton.jit
def bce_with_logits_value(x, t, p, a, b, COARSE: tl.constexpr = False):
    # A weight of 1 leaves the formula that has none, also where the target isn't finite.
    return (1 - t) * x - tl.where(p == 1, 1.0, (p - 1) * t + 1) * log_sigmoid(x, COARSE)


@triton.jit
def coarse_bce_with_logits_value(x, t, p, a, b):
    return bce_with_logits_value(x, t, p, a, b, True)


@triton.jit
def bce_with_logits_gradient(x, t, p, a, b):
    s = sigmoid(x)
    return tl.where(p == 1, s - t, (p * t + 1 - t) * s - p * t)


@triton.jit
def bce_with_logits_target_gradient(x, t, p, a, b):
    return tl.where(p == 1, negative(x), log_sigmoid(-x) - p * log_sigmoid(x))


@triton.jit
def kl_div_value(x, t, p, a, b):
    """x is a logarithm; so is t where a isn't 0."""
    if a != 0:
        value = exp(t) * (t - x)
    else:
        value = tl.where(t == 0, 0.0, t * log(t)) - t * x
    return value


@triton.jit
def kl_div_gradient(x, t, p, a, b):
    if a != 0:
        gradient = negative(exp(t))
    else:
        gradient = negative(t)
    return gradient


@triton.jit
def kl_div_target_gradient(x, t, p, a, b):
    if a != 0:
        gradient = exp(t) * (t - x + 1)
    else:
        gradient = log(t) + t / t - x  # t / t: NaN at 0, as in PyTorch
    return gradient


# --- The table ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PointwiseLoss:
    """A loss that is a sum over elements: what the kernels that apply it need to know.

    ``value``, ``gradient`` and ``target_gradient`` are device functions of (x, t, p, a, b).  ``valid(x, t)`` tells
    which elements may be, and ``complaint`` what is wrong with others.  ``uses_positive_weight`` says that p is used,
    ``has_weighted_mean`` that a mean with weights is taken over the weights, not over the elements.  Losses of 16 bits
    have the value ``coarse_value``, where there is one.
    """

    name: str
    value: Any
    gradient: Any
    target_gradient: Any
    valid: Any = None
    complaint: str = ""
    uses_positive_weight: bool = False
    has_weighted_mean: bool = False
    coarse_value: Any = None

    def value_for(self, dtype: torch.dtype) -> Any:
        return self.coarse_value if self.coarse_value is not None and dtype.itemsize == 2 else self.value


#: Every pointwise loss, by name.
LOSSES: dict[str, PointwiseLoss] = {
    row.name: row
    for row in (
        PointwiseLoss("mse_loss", mse_value, mse_gradient, mse_target_gradient, has_weighted_mean=True),
        PointwiseLoss("l1_loss", l1_value, l1_gradient, l1_target_gradient, has_weighted_mean=True),
        PointwiseLoss("huber_loss", huber_value, huber_gradient, huber_target_gradient),
        PointwiseLoss(
            "binary_cross_entropy",
            bce_value,
            bce_gradient,
            bce_target_gradient,
            bce_valid,
            "binary cross-entropy: input or target is not between 0 and 1",
        ),
        PointwiseLoss(
            "binary_cross_entropy_with_logits",
            bce_with_logits_value,
            bce_with_logits_gradient,
            bce_with_logits_target_gradient,
            uses_positive_weight=True,
            coarse_value=coarse_bce_with_logits_value,
        ),
        PointwiseLoss("kl_div", kl_div_value, kl_div_gradient, kl_div_target_gradient),
    )
}
