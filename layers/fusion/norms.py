"""Batch norms that chains are made of: ``torch.nn``'s, frozen ones, and those with an activation of their own."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from ...autograd.dispatch import autocast_dtype
from .activations import Activation, activation_refusal
from .members import class_of, know, layer_refusal

__all__ = [
    "IMAGE_NORMS",
    "NORMS",
    "FrozenState",
    "Norm",
    "activation_within",
    "is_identity",
    "join",
    "state_of",
    "within_refusal",
]


class Norm(NamedTuple):
    """How layers of a class differ from ``torch.nn``'s batch norms."""

    frozen: bool = False  # it neither measures nor learns; all that it has are buffers
    activates: bool = False  # what its children ``drop`` and ``act`` do comes behind it


#: Norms of images, and all; registered ones join.
IMAGE_NORMS: dict[type[nn.Module], Norm] = {nn.BatchNorm2d: Norm()}
NORMS: dict[type[nn.Module], Norm] = {
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm3d, nn.SyncBatchNorm), Norm()),
    **IMAGE_NORMS,
}


class FrozenState:
    """What a frozen norm is to `fusednn.layers.batch_norm`: one in evaluation."""

    training = False
    track_running_stats = True
    momentum = 0.0

    def __init__(self, layer: Any) -> None:
        self.running_mean, self.running_var = layer.running_mean, layer.running_var
        self.weight, self.bias, self.eps = layer.weight, layer.bias, getattr(layer, "eps", 1e-5)

    def _check_input_dim(self, input: Tensor) -> None:
        """Refused before."""


def join(cls: type[nn.Module], norm: Norm) -> None:
    """Let layers of a class, norms of images, be parts of chains."""
    IMAGE_NORMS[cls] = NORMS[cls] = norm
    know((cls,))


def state_of(layer: Any) -> Any:
    """What `fusednn.layers.batch_norm` is given in a layer's place: itself, unless it is frozen."""
    return FrozenState(layer) if NORMS[class_of(layer)].frozen else layer


def activation_within(layer: Any) -> Activation:
    """The activation that a norm has itself."""
    activates = layer is not None and NORMS[class_of(layer)].activates
    return None if not activates or is_identity(layer.act) else layer.act


def within_refusal(layer: Any, input: Tensor, ends: bool) -> str | None:
    """Why a norm can't be computed with others for what is within it, or None; ``ends``: its own activation may be the
    chain's last.
    """
    frozen, activates = NORMS[class_of(layer)]
    if frozen and (input.dtype is not layer.weight.dtype or autocast_dtype(input) is not None):
        return "a frozen norm's buffers have another dtype"
    if (frozen or activates) and input.dim() != 4:
        return "not a batch of images"
    if not activates:
        return None
    if not is_identity(layer.drop):
        return "the norm drops"
    if is_identity(layer.act):
        return None
    if not ends:
        return "the norm has got an activation"
    return activation_refusal(layer.act)


def is_identity(layer: Any) -> bool:
    """Whether a layer hands on what it is given, and nothing listens to it."""
    return type(layer) is nn.Identity and layer_refusal(layer, nn.Identity) is None
