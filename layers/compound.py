"""Layers that do more than a layer of ``torch.nn``: that layer is their child, and is computed with the rest in one.

Whoever converts, folds, freezes or quantises a layer knows what its ``torch.nn`` class does, and no more: from a batch
norm that also activates, such tools would make one that doesn't, and say nothing.  So a layer that does more is of no
such class.  It has a layer of it, which tools find, and may exchange for another; what is no longer the layer that it
was made with is called, before the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from ..autograd.activation import resolve_activation
from .twin import Layer

__all__ = ["NO_ACTIVATION", "Activating", "Compound", "NamedActivation"]

#: An activation's name in the table, None for the identity, and its parameters in PyTorch's order.
NamedActivation = tuple[str | None, Sequence[float]]
NO_ACTIVATION: NamedActivation = (None, ())


class Compound(Layer):
    """Base of the layers that have one layer of ``torch.nn``, and do more.

    The child's parameters, buffers and options can be read as the layer's own, its options can be changed so, and a
    checkpoint of the child alone is loaded.  Its parameters can't be assigned, and what is `withheld` can't be read: so
    do tools that take the layer for its child.
    """

    #: The child's name.
    child: ClassVar[str]
    #: Options of the child that are asked for by its own name alone.
    withheld: ClassVar[tuple[str, ...]] = ()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            child = self._child()
            if child is not None and name not in self.withheld and (_is_tensor(child, name) or _is_option(child, name)):
                return getattr(child, name)
            raise AttributeError(self._words(name)) from None

    def __setattr__(self, name: str, value: Any) -> None:
        child = self._child()
        if child is not None and _is_tensor(child, name):
            raise AttributeError(self._words(name))
        if child is not None and name not in self.__dict__ and _is_option(child, name):
            setattr(child, name, value)
        else:
            super().__setattr__(name, value)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *options: Any) -> None:
        child = self._child()
        for name in () if child is None else (*child._parameters, *child._buffers):
            if prefix + name in state_dict:
                state_dict[f"{prefix}{self.child}.{name}"] = state_dict.pop(prefix + name)
        super()._load_from_state_dict(state_dict, prefix, *options)

    def _child(self) -> nn.Module | None:
        """The child, once there is one."""
        child: nn.Module | None = self.__dict__.get("_modules", {}).get(self.child)
        return child

    def _words(self, name: str) -> str:
        child = self._child()
        kind = "" if child is None else f": it is no {type(child).__name__}, but has one, {self.child!r}"
        return f"{type(self).__name__} has no attribute {name!r}{kind}"


class Activating(Layer):
    """Base of the layers that activate the result of their children."""

    def __init__(self, activation: str | None, activation_parameters: Sequence[float], **children: nn.Module) -> None:
        resolve_activation(activation, activation_parameters)
        super().__init__()
        for name, child in children.items():
            setattr(self, name, child)
        self.activation = activation
        self.activation_parameters = tuple(activation_parameters)

    def _pooling(self) -> dict[str, Any]:
        """The arguments of the pooling behind the activation."""
        return {}

    def extra_repr(self) -> str:
        parameters = {"activation_parameters": self.activation_parameters} if self.activation_parameters else {}
        fused = {"activation": self.activation, **parameters, **self._pooling()}
        return ", ".join(f"{name}={value!r}" for name, value in fused.items())


def _is_tensor(layer: nn.Module, name: str) -> bool:
    return name in layer._parameters or name in layer._buffers or isinstance(getattr(layer, name, None), Tensor)


def _is_option(layer: nn.Module, name: str) -> bool:
    return name in layer.__dict__ and not name.startswith("_")
