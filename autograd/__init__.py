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
    quick_gelu,
    relu,
    relu6,
    relu_squared,
    selu,
    sigmoid,
    silu,
    softplus,
    softsign,
    squareplus,
    tanh,
    threshold,
)
from .batch_norm import batch_norm, batch_norm_act, channel_statistics
from .bias_activation_dropout import bias_activation_dropout
from .block_end import block_end
from .conv import (
    conv1d,
    conv2d,
    conv3d,
    conv_act_pool2d,
    conv_transpose1d,
    conv_transpose2d,
    conv_transpose3d,
)
from .conv_batch_norm import conv_batch_norm_act2d
from .cross_entropy import cross_entropy
from .drop_connect import drop_connect_linear
from .dropout import alpha_dropout, dropout, dropout1d, dropout2d, dropout3d, feature_alpha_dropout
from .gated import gated, gated_channels, gated_halves, glu, highway
from .linear_cross_entropy import linear_cross_entropy
from .maxout import maxout, maxout_conv2d, maxout_linear
from .nll_loss import nll_loss
from .pointwise_loss import (
    binary_cross_entropy,
    binary_cross_entropy_with_logits,
    huber_loss,
    kl_div,
    l1_loss,
    mse_loss,
    smooth_l1_loss,
)
from .pool import max_pool1d, max_pool2d, max_pool3d
from .prelu import prelu
from .rrelu import rrelu
from .softmax import log_softmax, softmax, softmin
from .standout import standout
from .sync_batch_norm import sync_batch_norm

__all__ = [
    "alpha_dropout",
    "batch_norm",
    "batch_norm_act",
    "bias_activation_dropout",
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "block_end",
    "celu",
    "channel_statistics",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_act_pool2d",
    "conv_batch_norm_act2d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "cross_entropy",
    "drop_connect_linear",
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "elu",
    "feature_alpha_dropout",
    "gated",
    "gated_channels",
    "gated_halves",
    "gelu",
    "glu",
    "hardsigmoid",
    "hardswish",
    "hardtanh",
    "highway",
    "huber_loss",
    "kl_div",
    "l1_loss",
    "leaky_relu",
    "linear_cross_entropy",
    "log_softmax",
    "logsigmoid",
    "max_pool1d",
    "max_pool2d",
    "max_pool3d",
    "maxout",
    "maxout_conv2d",
    "maxout_linear",
    "mish",
    "mse_loss",
    "nll_loss",
    "prelu",
    "quick_gelu",
    "relu",
    "relu6",
    "relu_squared",
    "rrelu",
    "selu",
    "sigmoid",
    "silu",
    "smooth_l1_loss",
    "softmax",
    "softmin",
    "softplus",
    "softsign",
    "squareplus",
    "standout",
    "sync_batch_norm",
    "tanh",
    "threshold",
]
