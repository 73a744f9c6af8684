"""Drop-in layers: subclasses of ``torch.nn``'s, and the tools that put them into existing models."""

from . import init, libraries
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
    QuickGELU,
    ReLU,
    ReLU6,
    ReLUSquared,
    Sigmoid,
    SiLU,
    Softplus,
    Softsign,
    Squareplus,
    Tanh,
    Threshold,
)
from .batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d, BatchNormAct1d, BatchNormAct2d, BatchNormAct3d
from .bias_activation_dropout import BiasActivationDropout
from .conv import (
    Conv1d,
    Conv2d,
    Conv3d,
    ConvAct1d,
    ConvAct2d,
    ConvAct3d,
    ConvMaxPool1d,
    ConvMaxPool2d,
    ConvMaxPool3d,
    ConvTranspose1d,
    ConvTranspose2d,
    ConvTranspose3d,
)
from .conv_batch_norm import ConvBatchNormAct1d, ConvBatchNormAct2d, ConvBatchNormAct3d
from .cross_entropy import CrossEntropyLoss
from .drop_connect import DropConnect
from .dropout import AlphaDropout, Dropout, Dropout1d, Dropout2d, Dropout3d, FeatureAlphaDropout
from .dropout_schedule import AnnealedDropout
from .gated import GLU
from .input_norm import GlobalContrastNorm, InputNorm
from .linear_cross_entropy import LinearCrossEntropyLoss
from .maxout import Maxout, MaxoutConv2d
from .nll_loss import NLLLoss
from .pointwise_loss import BCELoss, BCEWithLogitsLoss, HuberLoss, KLDivLoss, L1Loss, MSELoss, SmoothL1Loss
from .pool import MaxPool1d, MaxPool2d, MaxPool3d
from .prelu import PReLU
from .replacement.explain import Explanation, ExplanationRow, KeptRow, explain
from .replacement.fold import fold_batch_norm
from .replacement.functions import FunctionReport, FunctionRow, replace_functions, restore_functions
from .replacement.register import fingerprint, register_activation, register_twin
from .replacement.replace import replace_layers
from .replacement.report import ReplacementReport, ReplacementRow
from .replacement.restore import restore_layers, restored
from .rrelu import RReLU
from .softmax import LogSoftmax, Softmax, Softmax2d, Softmin
from .standout import Standout
from .sync_batch_norm import SyncBatchNorm, SyncBatchNormAct

__all__ = [
    "CELU",
    "ELU",
    "GELU",
    "GLU",
    "SELU",
    "AlphaDropout",
    "AnnealedDropout",
    "BCELoss",
    "BCEWithLogitsLoss",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormAct1d",
    "BatchNormAct2d",
    "BatchNormAct3d",
    "BiasActivationDropout",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvAct1d",
    "ConvAct2d",
    "ConvAct3d",
    "ConvBatchNormAct1d",
    "ConvBatchNormAct2d",
    "ConvBatchNormAct3d",
    "ConvMaxPool1d",
    "ConvMaxPool2d",
    "ConvMaxPool3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "CrossEntropyLoss",
    "DropConnect",
    "Dropout",
    "Dropout1d",
    "Dropout2d",
    "Dropout3d",
    "Explanation",
    "ExplanationRow",
    "FeatureAlphaDropout",
    "FunctionReport",
    "FunctionRow",
    "GlobalContrastNorm",
    "Hardsigmoid",
    "Hardswish",
    "Hardtanh",
    "HuberLoss",
    "InputNorm",
    "KLDivLoss",
    "KeptRow",
    "L1Loss",
    "LeakyReLU",
    "LinearCrossEntropyLoss",
    "LogSigmoid",
    "LogSoftmax",
    "MSELoss",
    "MaxPool1d",
    "MaxPool2d",
    "MaxPool3d",
    "Maxout",
    "MaxoutConv2d",
    "Mish",
    "NLLLoss",
    "PReLU",
    "QuickGELU",
    "RReLU",
    "ReLU",
    "ReLU6",
    "ReLUSquared",
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
    "Squareplus",
    "Standout",
    "SyncBatchNorm",
    "SyncBatchNormAct",
    "Tanh",
    "Threshold",
    "explain",
    "fingerprint",
    "fold_batch_norm",
    "init",
    "libraries",
    "register_activation",
    "register_twin",
    "replace_functions",
    "replace_layers",
    "restore_functions",
    "restore_layers",
    "restored",
]
