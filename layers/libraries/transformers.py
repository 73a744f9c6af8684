"""Hugging Face's transformers: the activations of ``ACT2CLS``, those of its models that have their own, and losses.

Left out are those that clip, and those without a row in the table of activations.  What stands at the ends of blocks,
and frozen batch norms, each model has in a class of its own, all of the same code.
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
from ...autograd.cross_entropy import cross_entropy_in_float32
from ...autograd.dispatch import autocast_dtype
from ..fusion.norms import Norm
from ..replacement.register import (
    register_activation,
    register_drop_path,
    register_norm,
    register_scale,
    register_twin,
)
from ..twin import stock_class
from .torchvision import frozen_forward

__all__ = ["causal_lm_loss", "masked_lm_loss", "token_classification_loss", "written_out"]

# --- Activations ------------------------------------------------------------------------------------------------------

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


register_activation(_ACTIVATIONS + "GELUActivation", "gelu", refuses=_calls("gelu"), fingerprints="bdc85cbdda22")
register_activation(
    _ACTIVATIONS + "GELUTanh", "gelu_tanh", refuses=_calls("gelu", approximate="tanh"), fingerprints="bdc85cbdda22"
)
register_activation(_ACTIVATIONS + "MishActivation", "mish", refuses=_calls("mish"), fingerprints="bdc85cbdda22")
register_activation(_ACTIVATIONS + "SiLUActivation", "silu", fingerprints="c653f79bea7b")


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
register_twin(_ACTIVATIONS + "AccurateGELUActivation", _with_pow, fingerprints="50485ed7aadb")
register_twin(_ACTIVATIONS + "NewGELUActivation", _with_pow, fingerprints="29eedddbd466")

register_twin(_ACTIVATIONS + "QuickGELUActivation", written_out("quick_gelu"), fingerprints="2c0d04e6d638")
register_twin(_ACTIVATIONS + "ReLUSquaredActivation", written_out("relu_squared"), fingerprints="83f1835e70c0")

_with_few_digits = written_out("gelu_tanh", exact=False)
register_twin(_ACTIVATIONS + "FastGELUActivation", _with_few_digits, fingerprints="73b812585c9e")
register_twin("transformers.models.bloom.modeling_bloom.BloomGelu", _with_few_digits, fingerprints="4b6884a6436f")

# --- Norms, and ends of blocks ----------------------------------------------------------------------------------------

_MODELS = "transformers.models.*."
register_norm(_MODELS + "*FrozenBatchNorm2d", frozen_forward, Norm(frozen=True), fingerprints="7a4ea12ce5d7")
register_drop_path(_MODELS + "*DropPath", lambda layer: (layer.drop_prob, "row"), fingerprints="90a9ad0447a1")
register_scale(
    _MODELS + "*LayerScale",
    lambda layer: layer.lambda1 if hasattr(layer, "lambda1") else layer.scale,
    fingerprints=("d02e9a4e17d1", "ffd160a9e51d"),
)

# --- Losses -----------------------------------------------------------------------------------------------------------
#
# transformers copies the logits to float32 first.  These compute in float32 too, and read the logits as they are.


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """The cross-entropy of the next tokens, as of transformers' ``ForCausalLMLoss``, in float32.

    >>> model.loss_function = fusednn.layers.libraries.transformers.causal_lm_loss

    Of 16-bit logits, 2 bytes are read forward, 4 moved backward for each; theirs makes two float32 copies besides.
    """
    if shift_labels is None:
        assert labels is not None
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:].contiguous()
    return masked_lm_loss(logits, shift_labels, vocab_size, num_items_in_batch, ignore_index)


def masked_lm_loss(
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    **kwargs: Any,
) -> Tensor:
    """The cross-entropy of the tokens that have labels, as of transformers' ``ForMaskedLMLoss``, in float32.

    A mean; with ``num_items_in_batch``, of batches whose gradients add up, the sum divided by it.
    """
    logits = logits.view(-1, vocab_size)
    labels = labels.view(-1).to(logits.device)
    if num_items_in_batch is None:
        return cross_entropy_in_float32(logits, labels, ignore_index)
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(logits.device)
    return cross_entropy_in_float32(logits, labels, ignore_index, "sum") / num_items_in_batch


def token_classification_loss(logits: Tensor, labels: Tensor, config: Any, **kwargs: Any) -> Tensor:
    """The cross-entropy of each token's class, as of transformers' ``ForTokenClassification``, in float32."""
    options = {name: kwargs[name] for name in ("num_items_in_batch", "ignore_index") if name in kwargs}
    return masked_lm_loss(logits, labels, config.num_labels, **options)
