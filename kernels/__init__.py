"""Triton kernels: device code, and one launcher per kernel, tensors in and tensors out.

Nothing here knows of autograd or ``torch.nn``.  Each family is a module; `shipped` lists every configuration that the
launchers can ask the compiler for.
"""

from . import activation, cross_entropy, linear_cross_entropy, nll_loss, pointwise_loss, prelu, rrelu, softmax
from ._triton import AVAILABLE, INTERPRETING
from .launch import Configuration, shipped

__all__ = [
    "AVAILABLE",
    "INTERPRETING",
    "Configuration",
    "activation",
    "cross_entropy",
    "linear_cross_entropy",
    "nll_loss",
    "pointwise_loss",
    "prelu",
    "rrelu",
    "shipped",
    "softmax",
]
