"""timm: batch norm with an activation, also frozen, and the activations that it defines itself."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...autograd.dispatch import tensor_refusal
from ...autograd.prelu import prelu
from .. import batch_norm
from ..fusion.members import activation_of, call_refusal, computed
from ..fusion.norms import Norm, activation_within, refusal_within
from ..replacement.register import register_activation, register_norm, register_twin
from ..twin import stock_class
from .torchvision import frozen, takes_frozen
from .transformers import written_out

__all__: list[str] = []

# --- Norms ------------------------------------------------------------------------------------------------------------


def _batch_norm_act(layer: Any, x: Tensor) -> Tensor:
    """act(drop(batch_norm(x))), in one where nothing is dropped."""
    result: Tensor
    if x.dim() != 4 or tensor_refusal(x):
        result = stock_class(type(layer)).forward(layer, x)
    elif call_refusal(x) is None and refusal_within(layer, x, ends=True) is None:
        activation = activation_within(layer)
        result = computed(lambda: batch_norm.forward(layer, x, None, *activation_of(activation)), layer, activation)
    else:
        result = layer.act(layer.drop(batch_norm.forward(layer, x)))
    return result


def _frozen_batch_norm_act(layer: Any, x: Tensor) -> Tensor:
    """act(drop((x - running_mean) / sqrt(running_var + eps) * weight + bias)), in one where nothing is dropped."""
    result: Tensor
    if not takes_frozen(layer, x):
        result = stock_class(type(layer)).forward(layer, x)
    elif call_refusal(x) is None and refusal_within(layer, x, ends=True) is None:
        activation = activation_within(layer)
        result = computed(lambda: frozen(layer, x, activation), layer, activation)
    else:
        result = layer.act(layer.drop(frozen(layer, x)))
    return result


_NORMS = "timm.layers.norm_act."
register_norm(_NORMS + "BatchNormAct2d", _batch_norm_act, Norm(activates=True), fingerprints="a8c4bd1b74dc")
register_norm(_NORMS + "FrozenBatchNormAct2d", _frozen_batch_norm_act, Norm(True, True), fingerprints="4dcff3a8b7b8")

# --- Activations ------------------------------------------------------------------------------------------------------
#
# The memory-efficient hard sigmoid and hard swish of `activations_me` have another gradient at -3 and 3.

_ACTIVATIONS = "timm.layers.activations."
for _name, _activation_name, _inplace, _fingerprint in (
    ("GELU", "gelu", None, "813bee56035c"),
    ("GELUTanh", "gelu_tanh", None, "bc91fc1a51ec"),
    ("QuickGELU", "quick_gelu", None, "f0b0765a6e67"),
    ("HardSigmoid", "hardsigmoid", "inplace", "7424682cc827"),
    ("HardSwish", "hardswish", "inplace", "77783226d9d7"),
    ("Sigmoid", "sigmoid", "inplace", "84c0c7a699fe"),
    ("Swish", "silu", "inplace", "7d71b546de1a"),
    ("Tanh", "tanh", "inplace", "5ead6686d3c1"),
):
    register_activation(_ACTIVATIONS + _name, _activation_name, inplace=_inplace, fingerprints=_fingerprint)
_mish = written_out("mish", in_float32=True)
register_twin(_ACTIVATIONS + "Mish", _mish, fingerprints="72fad20217da")
register_twin("timm.layers.activations_me.MishMe", _mish, fingerprints="c04854f10f71")
register_activation("timm.layers.activations_me.SwishMe", "silu", fingerprints="7f9b1dd27461")


def _prelu(layer: Any, input: Tensor) -> Tensor:
    return prelu(input, layer.weight)


register_twin(_ACTIVATIONS + "PReLU", _prelu, fingerprints="9e5c902152ab")
