"""Classes that are derived from a layer's at run time, and the same classes on another base.

``torch.nn.utils.parametrize``, ``fully_shard`` and ``replicate`` assign a module a class of their own making, derived
from the one that it had.  A layer can still become its twin, and itself again: the class beneath is exchanged.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

__all__ = ["beneath", "rebased"]

# Names, in a class that `rebased` made, the class that it was made of.
_ORIGIN = "_fusednn_origin"
_OF_EACH_CLASS = {"__dict__", "__weakref__", "__doc__", _ORIGIN}


def beneath(cls: type[nn.Module]) -> type[nn.Module]:
    """The class from which tools of PyTorch's derived ``cls`` at run time; mostly ``cls`` itself.

    Such a class lies under a module of PyTorch's but can't be imported from there, and leaves ``forward`` alone.
    """
    while cls.__module__.partition(".")[0] == "torch" and _by_name(cls) is not cls:
        bases = [base for base in cls.__bases__ if issubclass(base, nn.Module)]
        if len(bases) != 1 or cls.forward is not bases[0].forward:
            break
        cls = bases[0]
    return cls


def rebased(cls: type[Any], old: type[Any], new: type[Any]) -> type[Any]:
    """``cls`` with ``new`` in the place of ``old`` among its bases, and theirs.

    What was rebased, and is rebased again, is the class that it was, unless it has changed in between.
    """
    if cls is old:
        return new
    if old is new:
        return cls
    bases = tuple(rebased(base, old, new) if issubclass(base, old) else base for base in cls.__bases__)
    origin = vars(cls).get(_ORIGIN)
    if origin is not None and origin.__bases__ == bases and _contents(origin) == _contents(cls):
        known: type[Any] = origin
        return known
    return type(cls.__name__, bases, {**_contents(cls), _ORIGIN: cls})


def _by_name(cls: type[Any]) -> Any:
    return getattr(sys.modules.get(cls.__module__), cls.__name__, None)


def _contents(cls: type[Any]) -> dict[str, Any]:
    return {name: value for name, value in vars(cls).items() if name not in _OF_EACH_CLASS}
