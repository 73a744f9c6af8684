"""torchvision: frozen batch norms, and stochastic depth.  Its other layers are ``torch.nn``'s, in containers."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...autograd.dispatch import tensor_refusal
from .. import batch_norm
from ..fusion.activations import Activation, activation_of
from ..fusion.norms import FrozenState, Norm
from ..replacement.register import register_drop_path, register_norm
from ..twin import stock_class

__all__ = ["frozen", "frozen_forward", "takes_frozen"]


def frozen(layer: Any, input: Tensor, activation: Activation = None) -> Tensor:
    """activation((x - running_mean) / sqrt(running_var + eps) * weight + bias), which neither measures nor learns."""
    return batch_norm.forward(FrozenState(layer), input, None, activation_of(activation))  # type: ignore[arg-type]


def takes_frozen(layer: Any, input: Tensor) -> bool:
    """Whether `frozen` computes what the layer's own code does: that promotes 16-bit inputs to its buffers' dtype."""
    return input.dim() == 4 and input.dtype is layer.weight.dtype and tensor_refusal(input) is None


def frozen_forward(layer: Any, x: Tensor) -> Tensor:
    """The ``forward`` of a frozen norm's twin."""
    if takes_frozen(layer, x):
        return frozen(layer, x)
    result: Tensor = stock_class(type(layer)).forward(layer, x)
    return result


register_norm("torchvision.ops.misc.FrozenBatchNorm2d", frozen_forward, Norm(frozen=True), fingerprints="79467f730d99")
register_drop_path(
    "torchvision.ops.stochastic_depth.StochasticDepth", lambda layer: (layer.p, layer.mode), fingerprints="e9147c70cd9c"
)
