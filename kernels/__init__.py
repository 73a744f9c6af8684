"""Triton kernels: device code, and one launcher per kernel, tensors in and tensors out.

Nothing here knows of autograd or ``torch.nn``.  Each family is a module, or several that bear its name; `shipped` lists
every configuration that the launchers can ask the compiler for.
"""

from . import (
    activation,
    batch_norm,
    batch_norm_gradients,
    batch_norm_pool,
    batch_norm_statistics,
    bias_activation_dropout,
    block_end,
    conv,
    cross_entropy,
    dropout,
    gated,
    gated_channels,
    gated_highway,
    linear_maxout,
    maxout,
    nll_loss,
    optimizer,
    pointwise_loss,
    pool,
    prelu,
    rrelu,
    softmax,
    standout,
)
from .base._triton import AVAILABLE, INTERPRETING, ON_CPU, WHERE
from .base.launch import Configuration, shipped

__all__ = [
    "AVAILABLE",
    "INTERPRETING",
    "ON_CPU",
    "WHERE",
    "Configuration",
    "activation",
    "batch_norm",
    "batch_norm_gradients",
    "batch_norm_pool",
    "batch_norm_statistics",
    "bias_activation_dropout",
    "block_end",
    "conv",
    "cross_entropy",
    "dropout",
    "gated",
    "gated_channels",
    "gated_highway",
    "linear_maxout",
    "maxout",
    "nll_loss",
    "optimizer",
    "pointwise_loss",
    "pool",
    "prelu",
    "rrelu",
    "shipped",
    "softmax",
    "standout",
]
