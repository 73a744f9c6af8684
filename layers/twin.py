"""What makes a layer one of fusednn's, and what makes it a drop-in twin of a ``torch.nn`` layer."""

from __future__ import annotations

import copy

from torch import nn

__all__ = ["TWINS", "Layer", "Twin", "stock_class"]

#: The twin of each ``torch.nn`` class that has one.
TWINS: dict[type[nn.Module], type[nn.Module]] = {}


class Layer(nn.Module):
    """Base of every layer here: of the twins, and of those that ``torch.nn`` doesn't have."""


class Twin(Layer):
    """Mixin of every layer that ``torch.nn`` has too, first among its bases: ``class ReLU(Twin, nn.ReLU)``.

    A twin has exactly the attributes of its stock class, so a module becomes its twin, and itself again, by assigning
    ``__class__``.
    """

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__bases__[0] is Twin:
            TWINS[cls.__bases__[1]] = cls

    def __prepare_scriptable__(self) -> nn.Module:
        """What ``torch.jit.script`` compiles in our place: the stock layer, with the same parameters and buffers."""
        stock: nn.Module = copy.copy(self)
        stock.__class__ = stock_class(type(self))
        return stock


def stock_class(twin: type[nn.Module]) -> type[nn.Module]:
    """The ``torch.nn`` class that a twin replaces."""
    return next(stock for stock, ours in TWINS.items() if ours is twin)
