"""What makes a layer one of fusednn's, and what makes it a drop-in twin of a ``torch.nn`` layer."""

from __future__ import annotations

import copy
import functools
from collections import ChainMap
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import fx, nn

from ..autograd.dispatch import is_beyond_kernels

__all__ = [
    "ALL_TWINS",
    "OTHER_TWINS",
    "TWINS",
    "Layer",
    "Twin",
    "is_untouched",
    "stock_class",
    "tensors_of",
    "twin_class",
]

#: The twin of each ``torch.nn`` class that has one.
TWINS: dict[type[nn.Module], type[nn.Module]] = {}
#: The twins of other libraries' classes, and of users': made when such a layer is first replaced.
OTHER_TWINS: dict[type[nn.Module], type[nn.Module]] = {}
#: Both.
ALL_TWINS: ChainMap[type[nn.Module], type[nn.Module]] = ChainMap(TWINS, OTHER_TWINS)


# Marks a forward method that `torch.fx` records.
_RECORDED = "_fusednn_recorded"


def _recorded(forward: Callable[..., Any], stock: Callable[..., Any] | None) -> Callable[..., Any]:
    """``forward``, except that ``torch.fx`` records it as one call of the layer, as it does for ``torch.nn``'s own.

    Its tracers would otherwise follow our code, and take what depends on the input or on the layer's mode for constant.
    The forward method of its ``stock`` class serves where no kernel could: what we ask a CPU tensor for takes longer
    than that method.
    """

    @functools.wraps(forward)
    def recorded(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        for operand in (*args, *kwargs.values()):
            if isinstance(operand, fx.Proxy) and isinstance(operand.tracer, fx.Tracer):
                tracer = operand.tracer
                return tracer.create_proxy("call_module", tracer.path_of_module(self), args, kwargs)
        if stock is not None and args and is_beyond_kernels(args[0]):
            return stock(self, *args, **kwargs)
        return forward(self, *args, **kwargs)

    setattr(recorded, _RECORDED, True)
    return recorded


class Layer(nn.Module):
    """Base of every layer here: of the twins, and of those that ``torch.nn`` doesn't have."""

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if cls.forward is not nn.Module.forward and not hasattr(cls.forward, _RECORDED):
            cls.forward = _recorded(cls.forward, cls._stock_forward())

    @classmethod
    def _stock_forward(cls) -> Callable[..., Any] | None:
        """What computes the same where there are no kernels, if anything does."""
        return None

    def __prepare_scriptable__(self) -> nn.Module:
        raise NotImplementedError(f"{type(self).__name__} has no torch.nn class that TorchScript could compile instead")


class Twin(Layer):
    """Mixin of every layer that ``torch.nn`` has too, first among its bases: ``class ReLU(Twin, nn.ReLU)``.

    A twin has exactly the attributes of its stock class, so a module becomes its twin, and itself again, by assigning
    ``__class__``.
    """

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__bases__[0] is Twin and len(cls.__bases__) > 1:
            TWINS[cls.__bases__[1]] = cls

    @classmethod
    def _stock_forward(cls) -> Callable[..., Any] | None:
        stock: Any = cls.__bases__[1] if cls.__bases__[0] is Twin and len(cls.__bases__) > 1 else None
        return None if stock is None else stock.forward

    def __prepare_scriptable__(self) -> nn.Module:
        """What ``torch.jit.script`` compiles in our place: the stock layer, with the same parameters and buffers.

        Of a class that is derived from a twin: one of that class with the stock layer's ``forward``, or its own.
        """
        cls, twin, stock = type(self), twin_class(type(self)), stock_class(type(self))
        prepared: nn.Module = copy.copy(self)
        if cls is twin:
            prepared.__class__ = stock
        else:
            derived: Any = type(cls.__name__, (cls,), {"__module__": cls.__module__})
            for name, ours in vars(twin).items():
                if isinstance(ours, FunctionType) and hasattr(stock, name) and getattr(cls, name) is ours:
                    setattr(derived, name, getattr(stock, name))
            if cls.forward is not twin.forward:  # TorchScript reads the source, and finds its names beside the function
                derived.forward = cls.forward.__wrapped__  # type: ignore[attr-defined]
            prepared.__class__ = derived
        return prepared


def twin_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The twin that a class is, or is derived from.  Raises TypeError where there is none."""
    for base in cls.__mro__:
        if base in ALL_TWINS.values():
            return base
    raise TypeError(f"{cls.__name__} is no twin of another class")


def stock_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The class that a twin, or a class derived from one, replaces.  Raises TypeError as `twin_class`."""
    twin = twin_class(cls)
    return next(stock for stock, ours in ALL_TWINS.items() if ours is twin)


def is_untouched(layer: nn.Module) -> bool:
    """Whether a layer's code is its class's, and nothing listens to it alone."""
    listened = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    return not listened and "forward" not in layer.__dict__ and "_conv_forward" not in layer.__dict__


def tensors_of(layer: Any, *names: str) -> list[Any]:
    """Attributes of a layer, or of what stands for one, that are parameters or buffers, or were put in their place."""
    if isinstance(layer, nn.Module) and not torch.compiler.is_compiling():
        parameters, buffers = layer._parameters, layer._buffers
        try:  # where they are kept: the search for them would take as long as a launch
            return [parameters[name] if name in parameters else buffers[name] for name in names]
        except KeyError:
            pass
    return [getattr(layer, name) for name in names]
