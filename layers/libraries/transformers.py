"""Hugging Face's transformers: the activations of ``ACT2CLS``, and those of its models that have their own.

Left out are those that clip, and those without a row in the table of activations.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ... import autograd
from ...autograd import stock as F
from ...autograd.activation import apply_kernel, taken
from ..replacement.register import register_activation, register_twin
from ..twin import stock_class

__all__: list[str] = []

_ACTIVATIONS = "transformers.activations."


def _calls(name: str, **options: Any) -> Any:
    """Refuses layers whose attribute ``act`` isn't this function of ``torch.nn.functional``, with these options."""
    functions = (getattr(F, name), getattr(autograd, name))

    def refusal(layer: Any) -> str | None:
        act: Any = layer.act
        given: dict[str, Any] = {}
        if isinstance(act, functools.partial) and not act.args:
            given, act = act.keywords, act.func
        return None if act in functions and given == options else f"doesn't call torch.nn.functional.{name}"

    return refusal


register_activation(_ACTIVATIONS + "GELUActivation", "gelu", refuses=_calls("gelu"), fingerprints="44cac1283b2a")
register_activation(
    _ACTIVATIONS + "GELUTanh", "gelu_tanh", refuses=_calls("gelu", approximate="tanh"), fingerprints="10cb7fda2a7f"
)
register_activation(_ACTIVATIONS + "MishActivation", "mish", refuses=_calls("mish"), fingerprints="6c7cecb81882")
for _name, _activation, _fingerprint in (
    ("AccurateGELUActivation", "gelu_tanh", "bae35ecb0c1c"),
    ("NewGELUActivation", "gelu_tanh", "ce6abf1b40b4"),
    ("SiLUActivation", "silu", "4529c3499d30"),
):
    register_activation(_ACTIVATIONS + _name, _activation, fingerprints=_fingerprint)


def _gelu_tanh(layer: Any, input: Tensor) -> Tensor:
    """GELU's tanh approximation; its code has sqrt(2 / pi) in eight or ten digits, too few for float64."""
    activation = None if input.dtype is torch.float64 else taken("gelu_tanh", input)
    if activation is None:
        result: Tensor = stock_class(type(layer)).forward(layer, input)
        return result
    return apply_kernel(input, activation, False)


register_twin(_ACTIVATIONS + "FastGELUActivation", _gelu_tanh, fingerprints="e418414e54aa")
register_twin("transformers.models.bloom.modeling_bloom.BloomGelu", _gelu_tanh, fingerprints="1e77908a506a")
