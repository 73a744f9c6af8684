"""RReLU with the signature of ``torch.nn.functional.rrelu``."""

from math import inf

from torch import Tensor

from ..kernels.base.random import with_seed
from ..kernels.functions.activation import Activated
from . import stock as F
from .activation import apply_kernel, apply_masked, resolve_activation
from .dispatch import is_number, or_stock, takes_kernel

__all__ = ["rrelu"]


@or_stock
def rrelu(
    input: Tensor,
    lower: float = 1.0 / 8,
    upper: float = 1.0 / 3,
    training: bool = False,
    inplace: bool = False,
) -> Tensor:
    """x where x > 0, else s x, with s uniform in [lower, upper) in training, and their mean otherwise.

    As `torch.nn.functional.rrelu`, with slopes that obey ``torch.manual_seed`` but are other numbers than stock draws.
    Saves one bit an element and a seed.  Source: Xu, Wang, Chen, Li, "Empirical Evaluation of Rectified Activations in
    Convolutional Network" (2015).
    """
    if not takes_kernel("rrelu", input, inplace=inplace, refusal=lambda: _refusal(lower, upper, training, inplace)):
        return F.rrelu(input, lower, upper, training, inplace)
    if training:
        bounds = ("rrelu", float(lower), float(upper))
        return with_seed(input.device, lambda seed: apply_masked(input, seed, bounds, inplace))
    return apply_kernel(input, _mean_slope(lower, upper), inplace)


def _mean_slope(lower: float, upper: float) -> Activated:
    """What RReLU is in evaluation."""
    return resolve_activation("leaky_relu", [(lower + upper) / 2])


def _refusal(lower: object, upper: object, training: object, inplace: bool) -> str | None:
    if not is_number(lower) or not is_number(upper):
        return "a bound is not a Python number"
    if not -inf < lower <= upper < inf:
        return "the bounds are not in order, or not finite"
    if type(training) is not bool:
        return "training is not a boolean"
    return None if training else _mean_slope(lower, upper).refusal(inplace)
