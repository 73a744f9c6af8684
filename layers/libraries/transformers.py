"""Hugging Face's transformers: the activations of ``ACT2CLS``, and those of its models that have their own.

Left out are those that clip, and those without a row in the table of activations.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ... import autograd
from ...autograd import stock as F
from ...autograd.activation import apply_kernel, taken
from ...autograd.dispatch import autocast_dtype
from ..replacement.register import register_activation, register_twin
from ..twin import stock_class

__all__ = ["written_out"]

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
register_activation(_ACTIVATIONS + "SiLUActivation", "silu", fingerprints="4529c3499d30")


def written_out(activation: str, *, exact: bool = True, in_float32: bool = False) -> Callable[[Any, Tensor], Tensor]:
    """The ``forward`` of an activation that a class writes out in operators.

    ``exact``: its constants have digits enough for float64.  ``in_float32``: autocast computes one of the operators
    (``pow``, ``softplus``) in float32, so that results of 16-bit inputs are of another dtype there.
    """

    def forward(layer: Any, input: Tensor) -> Tensor:
        theirs = not isinstance(input, Tensor) or (not exact and input.dtype is torch.float64)
        theirs = theirs or (in_float32 and input.dtype.itemsize == 2 and autocast_dtype(input) is not None)
        resolved = None if theirs else taken(activation, input)
        if resolved is None:
            result: Tensor = stock_class(type(layer)).forward(layer, input)
            return result
        return apply_kernel(input, resolved, False)

    return forward


_with_pow = written_out("gelu_tanh", in_float32=True)
register_twin(_ACTIVATIONS + "AccurateGELUActivation", _with_pow, fingerprints="bae35ecb0c1c")
register_twin(_ACTIVATIONS + "NewGELUActivation", _with_pow, fingerprints="ce6abf1b40b4")

register_twin(_ACTIVATIONS + "QuickGELUActivation", written_out("quick_gelu"), fingerprints="d372c97a949c")
register_twin(_ACTIVATIONS + "ReLUSquaredActivation", written_out("relu_squared"), fingerprints="b77a5331cfc1")

_with_few_digits = written_out("gelu_tanh", exact=False)
register_twin(_ACTIVATIONS + "FastGELUActivation", _with_few_digits, fingerprints="e418414e54aa")
register_twin("transformers.models.bloom.modeling_bloom.BloomGelu", _with_few_digits, fingerprints="1e77908a506a")
