"""Drop-in layers: subclasses of ``torch.nn``'s, and the tools that put them into existing models."""

from .activation import (
    CELU,
    ELU,
    GELU,
    SELU,
    Hardsigmoid,
    Hardswish,
    Hardtanh,
    LeakyReLU,
    LogSigmoid,
    Mish,
    ReLU,
    ReLU6,
    Sigmoid,
    SiLU,
    Softplus,
    Softsign,
    Tanh,
    Threshold,
)
from .cross_entropy import CrossEntropyLoss
from .explain import Explanation, ExplanationRow, explain
from .linear_cross_entropy import LinearCrossEntropyLoss
from .nll_loss import NLLLoss
from .pointwise_loss import (
    BCELoss,
    BCEWithLogitsLoss,
    HuberLoss,
    KLDivLoss,
    L1Loss,
    MSELoss,
    SmoothL1Loss,
)
from .prelu import PReLU
from .replace import ReplacementReport, ReplacementRow, replace_layers, restore_layers
from .rrelu import RReLU
from .softmax import LogSoftmax, Softmax, Softmax2d, Softmin

__all__ = [
    "CELU",
    "ELU",
    "GELU",
    "SELU",
    "BCELoss",
    "BCEWithLogitsLoss",
    "CrossEntropyLoss",
    "Explanation",
    "ExplanationRow",
    "Hardsigmoid",
    "Hardswish",
    "Hardtanh",
    "HuberLoss",
    "KLDivLoss",
    "L1Loss",
    "LeakyReLU",
    "LinearCrossEntropyLoss",
    "LogSigmoid",
    "LogSoftmax",
    "MSELoss",
    "Mish",
    "NLLLoss",
    "PReLU",
    "RReLU",
    "ReLU",
    "ReLU6",
    "ReplacementReport",
    "ReplacementRow",
    "SiLU",
    "Sigmoid",
    "SmoothL1Loss",
    "Softmax",
    "Softmax2d",
    "Softmin",
    "Softplus",
    "Softsign",
    "Tanh",
    "Threshold",
    "explain",
    "replace_layers",
    "restore_layers",
]
