"""The activations that other operations are fused with, as PyTorch's functions: what tests compare with."""

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from fusednn.kernels.functions.activation import ACTIVATIONS

from .samples import WITHOUT_FUNCTION


def _threshold(x: Tensor, threshold: float = 0.0, value: float = 0.0) -> Tensor:
    return F.threshold(x, threshold, value)


#: The stock function of (x, *parameters) for each activation.
STOCK: dict[str, Callable[..., Tensor]] = {
    **{name: getattr(F, name) for name in ACTIVATIONS if hasattr(F, name)},
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "threshold": _threshold,
    **WITHOUT_FUNCTION,
}

#: Other parameters than the defaults, for each activation that has any.
PARAMETERS: dict[str, tuple[float, ...]] = {
    "celu": (0.7,),
    "elu": (0.5,),
    "hardtanh": (-0.5, 2.0),
    "leaky_relu": (-0.3,),
    "softplus": (2.0, 3.0),
    "squareplus": (0.3,),
    "threshold": (0.1, -20.0),
}
