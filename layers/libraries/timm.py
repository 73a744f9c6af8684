"""timm: batch norm with an activation, also frozen, the activations that it defines itself, ends of blocks, losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...autograd.cross_entropy import cross_entropy
from ...autograd.dispatch import tensor_refusal
from ...autograd.pointwise_loss import binary_cross_entropy_with_logits
from ...autograd.prelu import prelu
from .. import batch_norm
from ..fusion.activations import activation_of
from ..fusion.members import call_refusal, computed
from ..fusion.norms import Norm, activation_within, within_refusal
from ..replacement.register import (
    register_activation,
    register_drop_path,
    register_norm,
    register_scale,
    register_twin,
)
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
    elif call_refusal(x) is None and within_refusal(layer, x, ends=True) is None:
        activation = activation_within(layer)
        result = computed(lambda: batch_norm.forward(layer, x, None, activation_of(activation)), layer, activation)
    else:
        result = layer.act(layer.drop(batch_norm.forward(layer, x)))
    return result


def _frozen_batch_norm_act(layer: Any, x: Tensor) -> Tensor:
    """act(drop((x - running_mean) / sqrt(running_var + eps) * weight + bias)), in one where nothing is dropped."""
    result: Tensor
    if not takes_frozen(layer, x):
        result = stock_class(type(layer)).forward(layer, x)
    elif call_refusal(x) is None and within_refusal(layer, x, ends=True) is None:
        activation = activation_within(layer)
        result = computed(lambda: frozen(layer, x, activation), layer, activation)
    else:
        result = layer.act(layer.drop(frozen(layer, x)))
    return result


_NORMS = "timm.layers.norm_act."
register_norm(_NORMS + "BatchNormAct2d", _batch_norm_act, Norm(activates=True), fingerprints="8d171dd34cca")
register_norm(_NORMS + "FrozenBatchNormAct2d", _frozen_batch_norm_act, Norm(True, True), fingerprints="c199b34ccd94")

# --- Activations ------------------------------------------------------------------------------------------------------
#
# The memory-efficient hard sigmoid and hard swish of `activations_me` have another gradient at -3 and 3.

_ACTIVATIONS = "timm.layers.activations."
for _name, _activation_name, _inplace, _fingerprint in (
    ("GELU", "gelu", None, "7c47ef1a4c80"),
    ("GELUTanh", "gelu_tanh", None, "ea55f6142896"),
    ("QuickGELU", "quick_gelu", None, "ea98139ece22"),
    ("HardSigmoid", "hardsigmoid", "inplace", "527066ec13bf"),
    ("HardSwish", "hardswish", "inplace", "5a30fdd4a939"),
    ("Sigmoid", "sigmoid", "inplace", "b0048eb1746c"),
    ("Swish", "silu", "inplace", "e18ab3898f96"),
    ("Tanh", "tanh", "inplace", "49b62292704b"),
):
    register_activation(_ACTIVATIONS + _name, _activation_name, inplace=_inplace, fingerprints=_fingerprint)
_mish = written_out("mish", in_float32=True)
register_twin(_ACTIVATIONS + "Mish", _mish, fingerprints="f02c245e4826")
register_twin("timm.layers.activations_me.MishMe", _mish, fingerprints="215ce471db3e")
register_activation("timm.layers.activations_me.SwishMe", "silu", fingerprints="94528dcf2d75")


def _prelu(layer: Any, input: Tensor) -> Tensor:
    return prelu(input, layer.weight)


register_twin(_ACTIVATIONS + "PReLU", _prelu, fingerprints="9d2656c72107")

# --- Ends of blocks ---------------------------------------------------------------------------------------------------


def _keeps_its_scale(layer: Any) -> str | None:
    return None if layer.scale_by_keep else "what is kept isn't divided by the chance to be"


register_scale("timm.layers.layer_scale.LayerScale", lambda layer: layer.gamma, fingerprints="2f3c38889834")
register_scale(
    "timm.layers.layer_scale.LayerScale2d", lambda layer: layer.gamma.view(1, -1, 1, 1), fingerprints="d45fe7117362"
)
register_drop_path(
    "timm.layers.drop.DropPath",
    lambda layer: (layer.drop_prob, "row"),
    refuses=_keeps_its_scale,
    fingerprints="37054f5b876d",
)

# --- Losses -----------------------------------------------------------------------------------------------------------
#
# `JsdCrossEntropy` computes in ``__call__``; the loss within it is one of these.

#: No index is ignored.
_NONE = -(2**62)


def _smoothed(layer: Any, x: Tensor, target: Tensor) -> Tensor:
    """(1 - smoothing) times the negative log-likelihood, and smoothing times the mean over all classes."""
    plain = x.dim() == 2 and target.dim() == 1 and target.dtype is torch.int64
    if not plain or layer.smoothing < 0 or layer.confidence != 1.0 - layer.smoothing:
        result: Tensor = stock_class(type(layer)).forward(layer, x, target)
        return result
    return cross_entropy(x, target, ignore_index=_NONE, label_smoothing=layer.smoothing)


def _soft(layer: Any, x: Tensor, target: Tensor) -> Tensor:
    if x.dim() != 2 or x.shape != target.shape or x.dtype is not target.dtype:
        result: Tensor = stock_class(type(layer)).forward(layer, x, target)
        return result
    return cross_entropy(x, target)


def _binary(layer: Any, x: Tensor, target: Tensor) -> Tensor:
    """With targets made as the class makes them."""
    if target.shape != x.shape and (x.dim() != 2 or target.shape != x.shape[:1]):
        result: Tensor = stock_class(type(layer)).forward(layer, x, target)
        return result
    if target.shape != x.shape:
        off = layer.smoothing / x.shape[-1]
        one_hot = torch.full_like(x, off, memory_format=torch.contiguous_format, requires_grad=False)
        target = one_hot.scatter_(1, target.long().view(-1, 1), 1.0 - layer.smoothing + off)
    elif layer.smooth_dense and layer.smoothing:
        target = target * (1.0 - layer.smoothing) + 0.5 * layer.smoothing
    if layer.target_threshold is not None:
        target = target.gt(layer.target_threshold).to(dtype=target.dtype)
    loss = binary_cross_entropy_with_logits(
        x, target, layer.weight, pos_weight=layer.pos_weight, reduction=layer.reduction
    )
    return loss.sum(-1).mean() if layer.sum_classes else loss


_LOSSES = "timm.loss."
register_twin(_LOSSES + "cross_entropy.LabelSmoothingCrossEntropy", _smoothed, fingerprints="1969b87153a9")
register_twin(_LOSSES + "cross_entropy.SoftTargetCrossEntropy", _soft, fingerprints="818a570682cf")
register_twin(_LOSSES + "binary_cross_entropy.BinaryCrossEntropy", _binary, fingerprints="399ca4112894")
