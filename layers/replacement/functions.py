"""Our functions in the place of ``torch.nn.functional``'s, for code that calls functions rather than layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F

from ... import autograd
from ..table import format_table

__all__ = ["FunctionReport", "FunctionRow", "replace_functions", "restore_functions"]

# By name, what ``torch.nn.functional`` held when the library was imported, and what takes its place.
_STOCK: dict[str, Callable[..., Any]] = {name: getattr(F, name) for name in autograd.__all__ if hasattr(F, name)}
_OURS: dict[str, Callable[..., Any]] = {name: getattr(autograd, name) for name in _STOCK}


@dataclass(frozen=True)
class FunctionRow:
    """One function of ``torch.nn.functional``, whether it changed, and why or why not."""

    name: str
    changed: bool
    reason: str


@dataclass(frozen=True)
class FunctionReport:
    """What `replace_functions` or `restore_functions` did, a row per function; prints as a table.

    As a context manager, it puts back at the end of the ``with`` block what it says it replaced.
    """

    rows: tuple[FunctionRow, ...]

    @property
    def changed(self) -> list[FunctionRow]:
        return [row for row in self.rows if row.changed]

    def __enter__(self) -> FunctionReport:
        return self

    def __exit__(self, *_: object) -> None:
        for row in self.changed:
            _exchange(row.name, _OURS, _STOCK)

    def __str__(self) -> str:
        body = [(row.name, "changed" if row.changed else "left", row.reason) for row in self.rows]
        table = format_table(("torch.nn.functional", "result", "reason"), body)
        return f"{table}\n{len(self.changed)} of {len(self.rows)} functions changed"


def replace_functions() -> FunctionReport:
    """Put each function of `fusednn.autograd` in the place of its namesake in ``torch.nn.functional``.

    >>> fusednn.replace_functions()              # until fusednn.restore_functions()
    >>> with fusednn.replace_functions():        # or for a while
    ...     train(model)

    From then on ``F.relu(x)``, and layers of ``torch.nn`` that call it, take the kernel where one takes the input.  A
    function that something else has replaced stays.  So do:

    - names that were bound before: ``from torch.nn.functional import relu``, default arguments, compiled code;
    - functions of ``torch`` (``torch.relu``, ``torch.softmax``) and methods (``x.relu()``): they are what
      ``torch.nn.functional`` itself is made of.  Layers that call them (``nn.Sigmoid``, ``nn.Tanh``) have twins.

    ``torch.jit.script`` compiles functions by their source, and none of ours: restore them before.

    Returns:
        A report of what was replaced, and what was left and why; nothing is replaced twice.
    """
    return FunctionReport(tuple(_exchange(name, _STOCK, _OURS) for name in _STOCK))


def restore_functions() -> FunctionReport:
    """Undo `replace_functions`: ``torch.nn.functional`` has its own functions again.

    What something else has put in the place of ours stays.
    """
    return FunctionReport(tuple(_exchange(name, _OURS, _STOCK) for name in _STOCK))


def _exchange(name: str, old: dict[str, Callable[..., Any]], new: dict[str, Callable[..., Any]]) -> FunctionRow:
    held = getattr(F, name)
    whose = "fusednn's" if new is _OURS else "PyTorch's"
    if held is new[name]:
        return FunctionRow(name, False, f"{whose} already")
    if held is not old[name]:
        return FunctionRow(name, False, f"something else is in its place: {held!r}")
    setattr(F, name, new[name])
    return FunctionRow(name, True, f"{whose} now")
