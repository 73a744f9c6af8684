"""Undoing `replace_layers`, for good or for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ..derived import beneath
from ..fusion.host import unfuse
from ..twin import ALL_TWINS, Layer, stock_class
from .report import ReplacementReport, ReplacementRow
from .swap import REPLACED, Modules, Noted, all_or_nothing, exchange, unique_modules

__all__ = ["restore_layers", "restored"]


def restore_layers(model: nn.Module) -> ReplacementReport:
    """Undo `replace_layers`: every layer that it swapped is of its ``torch.nn`` class again, and none is fused.

    Layers that were built as fusednn's stay.  Returns a report of what was restored.

    Raises TypeError, and changes nothing, where a layer got a class of the user's that is derived from ours after it
    was replaced: the class would have to be another one.
    """
    modules = unique_modules(model)
    _check(modules)
    report = ReplacementReport()
    with all_or_nothing(modules):
        apart = {layer for _, module in modules for layer in unfuse(module)}
        for names, module in modules:
            if module.__dict__.pop(REPLACED, False) and isinstance(module, Layer):  # TorchScript may have restored it
                twin = beneath(type(module))
                exchange(module, twin, stock_class(twin))
                report.rows.append(ReplacementRow(names, twin.__name__, True, "stock again"))
            elif module in apart:
                report.rows.append(ReplacementRow(names, beneath(type(module)).__name__, True, "no longer fused"))
    return report


@contextmanager
def restored(model: nn.Module) -> Iterator[nn.Module]:
    """Within the context ``model`` is as it was before `replace_layers`; afterwards it is replaced, and fused, again.

    >>> with fusednn.layers.restored(model):
    ...     summary = count_flops(model)   # a tool that looks at ``type(module)``

    Modules that the body puts in the place of others stay, as do those that it gives another class.  Raises TypeError
    as `restore_layers`.
    """
    notes = [Noted(module) for _, module in unique_modules(model)]
    restore_layers(model)
    stock = [beneath(type(note.module)) for note in notes]
    try:
        yield model
    finally:
        for note, cls in zip(notes, stock, strict=True):
            if beneath(type(note.module)) is cls:  # parametrized, perhaps, or no longer so
                exchange(note.module, cls, beneath(note.cls))
                note.put_entries_back()


def _check(modules: Modules) -> None:
    """Raise TypeError where a layer can't be restored."""
    changed = [
        f"{names[0] or '(model)'} ({type(module).__name__})"
        for names, module in modules
        if REPLACED in module.__dict__ and isinstance(module, Layer) and beneath(type(module)) not in ALL_TWINS.values()
    ]
    if changed:
        raise TypeError(
            f"can't restore {', '.join(changed)}: their classes were derived from fusednn's after replacing.  "
            "Give them back the classes that they had.  Nothing was changed"
        )
