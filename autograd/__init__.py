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
from .maxout import maxout, maxout_conv2d, maxout_linear
from .prelu import prelu
from .rrelu import rrelu

__all__ = [
    "celu",
    "elu",
    "gelu",
    "hardsigmoid",
    "hardswish",
    "hardtanh",
    "leaky_relu",
    "logsigmoid",
    "maxout",
    "maxout_conv2d",
    "maxout_linear",
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
