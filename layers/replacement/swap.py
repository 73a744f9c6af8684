"""A module's class exchanged in place, and put back.

A swap assigns ``__class__``: parameters, buffers, hooks, training mode, parametrizations and the module's identity (so
also its names, shared uses and ``state_dict`` keys) stay what they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..derived import rebased

__all__ = ["REPLACED", "Noted", "all_or_nothing", "exchange", "unique_modules"]

#: Marks, in a module's ``__dict__``, what `replace_layers` swapped: a twin that the user built stays when layers are
#: restored.  It travels with deepcopy and pickle, and never appears in a state_dict.
REPLACED = "_fusednn_replaced"

#: All modules of a model, each with all its names.
Modules = Sequence[tuple[tuple[str, ...], nn.Module]]


def unique_modules(model: nn.Module) -> list[tuple[tuple[str, ...], nn.Module]]:
    """Every module once, with all its names."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return [(tuple(its_names), module) for module, its_names in names.items()]


def exchange(module: nn.Module, old: type[nn.Module], new: type[nn.Module]) -> None:
    """Make a module of class ``old``, or one that is derived from it, one of class ``new``, or derived from that."""
    module.__class__ = rebased(type(module), old, new)


class Noted:
    """A module's class, and what replacing and fusing keep in its ``__dict__``, as they are when this is made."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.cls = type(module)
        self._entries = self._current()

    def put_back(self) -> None:
        """Make the module's class and entries these."""
        self.module.__class__ = self.cls
        self.put_entries_back()

    def put_entries_back(self) -> None:
        for name in self._current():
            del self.module.__dict__[name]
        self.module.__dict__.update(self._entries)

    def _current(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self.module).items() if name.startswith("_fusednn_")}


@contextmanager
def all_or_nothing(modules: Modules) -> Iterator[None]:
    """Puts all modules back as they were where the body raises."""
    notes = [Noted(module) for _, module in modules]
    try:
        yield
    except BaseException:
        for note in notes:
            note.put_back()
        raise
