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
from .cross_entropy import cross_entropy
from .linear_cross_entropy import linear_cross_entropy
from .prelu import prelu
from .rrelu import rrelu
from .softmax import log_softmax, softmax, softmin

__all__ = [
    "celu",
    "cross_entropy",
    "elu",
    "gelu",
    "hardsigmoid",
    "hardswish",
    "hardtanh",
    "leaky_relu",
    "linear_cross_entropy",
    "log_softmax",
    "logsigmoid",
    "mish",
    "prelu",
    "relu",
    "relu6",
    "rrelu",
    "selu",
    "sigmoid",
    "silu",
    "softmax",
    "softmin",
    "softplus",
    "softsign",
    "tanh",
    "threshold",
]
