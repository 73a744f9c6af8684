"""torchvision: batch norms that are frozen.  Its other layers are ``torch.nn``'s, in containers."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...autograd.batch_norm import batch_norm_act
from ...autograd.dispatch import tensor_refusal
from ..fusion.members import Activation, activation_of
from ..replacement.register import register_twin
from ..twin import stock_class

__all__ = ["frozen", "takes_frozen"]


def frozen(layer: Any, input: Tensor, activation: Activation = None) -> Tensor:
    """activation((x - running_mean) / sqrt(running_var + eps) * weight + bias), which neither measures nor learns."""
    name, parameters = activation_of(activation)
    vectors = (layer.running_mean, layer.running_var, layer.weight, layer.bias)
    options: dict[str, Any] = {"activation": name, "activation_parameters": parameters}
    return batch_norm_act(input, *vectors, False, 0.0, layer.eps, **options)


def takes_frozen(layer: Any, input: Tensor) -> bool:
    """Whether `frozen` computes what the layer's own code does: that promotes 16-bit inputs to its buffers' dtype."""
    return input.dim() == 4 and input.dtype is layer.weight.dtype and tensor_refusal(input) is None


def _forward(layer: Any, x: Tensor) -> Tensor:
    if takes_frozen(layer, x):
        return frozen(layer, x)
    result: Tensor = stock_class(type(layer)).forward(layer, x)
    return result


register_twin("torchvision.ops.misc.FrozenBatchNorm2d", _forward, fingerprints="4dab14347f6e")
