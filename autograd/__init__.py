"""Operations as functions: signatures of ``torch.nn.functional``, gradients by kernels.

One ``torch.autograd.Function`` per kind of operation; `dispatch` decides between kernel and stock operator.
"""

from .activation import (
    celu,
    elu,
    gelu,
    hardsigmoid,
    hardswish,
    hardtanh,
    leaky_relu,
    logsigmoid,
    mish,
    relu,
    relu6,
    selu,
    sigmoid,
    silu,
    softplus,
    softsign,
    tanh,
    threshold,
)
from .batch_norm import batch_norm, batch_norm_act, channel_statistics
from .prelu import prelu
from .rrelu import rrelu

__all__ = [
    "batch_norm",
    "batch_norm_act",
    "celu",
    "channel_statistics",
    "elu",
    "gelu",
    "hardsigmoid",
    "hardswish",
    "hardtanh",
    "leaky_relu",
    "logsigmoid",
    "mish",
    "prelu",
    "relu",
    "relu6",
    "rrelu",
    "selu",
    "sigmoid",
    "silu",
    "softplus",
    "softsign",
    "tanh",
    "threshold",
]
