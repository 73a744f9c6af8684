"""Swapping the layers of an existing model for their twins, and back.

A swap assigns ``__class__``: parameters, buffers, hooks, training mode, parametrizations and the module's identity (so
also its names, shared uses and ``state_dict`` keys) stay what they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.utils import parametrize

from ..chain import is_untouched
from ..fuse import fuse_neighbours, is_searched, unfuse
from ..table import format_table
from ..twin import TWINS, Layer, stock_class

__all__ = ["ReplacementReport", "ReplacementRow", "replace_layers", "restore_layers"]

#: What `replace_layers` accepts to choose layers: names with wildcards and classes, or a predicate.
Selection = Iterable[str | type[nn.Module]] | str | type[nn.Module] | Callable[[str, nn.Module], bool]

# Marks, in a module's ``__dict__``, what `replace_layers` swapped: a twin that the user built stays when layers are
# restored.  It travels with deepcopy and pickle, and never appears in a state_dict.
_MARK = "_fusednn_replaced"


@dataclass(frozen=True)
class ReplacementRow:
    """One layer: all its names in the model, its ``torch.nn`` class, and what happened to it."""

    names: tuple[str, ...]
    layer: str
    replaced: bool
    reason: str


@dataclass
class ReplacementReport:
    """What `replace_layers` or `restore_layers` did, a row per layer; prints as a table.

    ``untraced`` has a row for each module in whose code no neighbours could be looked for, to fuse them, and why.
    """

    rows: list[ReplacementRow] = field(default_factory=list)
    untraced: list[ReplacementRow] = field(default_factory=list)

    @property
    def replaced(self) -> list[ReplacementRow]:
        return [row for row in self.rows if row.replaced]

    @property
    def left(self) -> list[ReplacementRow]:
        return [row for row in self.rows if not row.replaced]

    def __str__(self) -> str:
        body = [
            (_readable(row.names), row.layer, "replaced" if row.replaced else "left", row.reason) for row in self.rows
        ]
        table = format_table(("layer", "class", "result", "reason"), body)
        lines = [table, f"{len(self.replaced)} of {len(self.rows)} layers replaced"]
        alike: dict[tuple[str, str], list[str]] = {}
        for row in self.untraced:
            alike.setdefault((row.layer, row.reason), []).append(_readable(row.names))
        for (layer, reason), names in alike.items():
            which = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} alike"
            lines.append(f"no neighbours fused in {which} ({layer}): {reason}")
        return "\n".join(lines)


def replace_layers(
    model: nn.Module, *, include: Selection | None = None, exclude: Selection | None = None, fuse: bool = False
) -> ReplacementReport:
    """Swap every ``torch.nn`` layer of ``model`` that has a fusednn twin for it, in place.

    Args:
        model: any module; itself swapped if it is such a layer.
        include: swap only these layers: names as in ``model.named_modules()``, with shell wildcards (``"features.*"``),
            layer classes, a mixture of both, or a predicate of (name, module).  All, by default.
        exclude: leave these; wins over ``include``.
        fuse: also compute neighbouring layers in one, where kernels take the input:

            - Conv2d, BatchNorm2d, a residual that is added, an activation, MaxPool2d, of which any may be missing;
            - a batch norm, a residual that is added, an activation;
            - Linear, an activation, Dropout;
            - Linear, and the maximum over pieces of its features.

            Functions and methods (``F.relu(x)``, ``x.relu()``, ``x += y``) count as the layers do.

    Returns:
        A report of what was replaced, what was left, and why.  A layer used under several names is one row.

    Layers are matched by exact class, parametrized ones too: a subclass that may override behaviour is left alone.

    Neighbours are found in ``nn.Sequential`` by position, elsewhere in the graph of the code (``torch.fx``) of each
    module that calls layers.  Code that can't be traced, or does more than its graph tells, keeps its layers apart.
    Layers that have hooks or parametrizations, and values that are used twice, aren't fused.  No layer moves, and none
    changes beyond the swap: the module that calls them runs its code with a single call for neighbours.  It runs its
    own code for any call that is unlike those that were traced, and calls neighbours one by one where one of them has
    got a hook, another class or unusual options, or where no kernel takes the input.  Hooks of all modules at once
    (``register_module_forward_hook``) don't see neighbours that are computed in one.
    """
    report = ReplacementReport()
    modules = _unique_modules(model)
    rows: dict[nn.Module, ReplacementRow] = {}
    for names, module in modules:
        stock = _plain_class(module)
        reason = _reason_to_leave(names, module, include, exclude)
        if reason is None:
            _assign_class(module, TWINS[stock])
            module.__dict__[_MARK] = True
            rows[module] = ReplacementRow(names, stock.__name__, True, "swapped for its twin")
        elif _is_layer(module):
            rows[module] = ReplacementRow(names, stock.__name__, False, reason)
    if fuse:
        report.untraced = _fuse(modules, rows, include, exclude)
    report.rows = list(rows.values())
    return report


def _fuse(
    modules: list[tuple[tuple[str, ...], nn.Module]],
    rows: dict[nn.Module, ReplacementRow],
    include: Selection | None,
    exclude: Selection | None,
) -> list[ReplacementRow]:
    """Fuse neighbours and say so in ``rows``; returns rows of the modules whose code can't be traced."""
    names_of = {module: names for names, module in modules}

    def refuses(_: str, layer: nn.Module) -> str | None:
        return _reason_to_keep_apart(layer) or _reason_not_selected(names_of[layer], layer, include, exclude)

    untraced = []
    for names, module in modules:
        if not is_searched(module):
            continue
        fusion = fuse_neighbours(module, refuses)
        if fusion.untraced is not None:
            untraced.append(ReplacementRow(names, _plain_class(module).__name__, False, fusion.untraced))
        for layer, reason in fusion.stops.items():
            if reason == rows[layer].reason:
                continue
            rows[layer] = replace(rows[layer], reason=f"{rows[layer].reason}; not fused: {reason}")
        hosts: dict[nn.Module, list[str]] = {}
        for first, *others in fusion.chains:
            with_them = ", ".join(names_of[layer][0] for layer in others) or "the functions behind it"
            rows[first] = replace(rows[first], replaced=True, reason=f"fused with {with_them}")
            for layer in others:
                hosts.setdefault(layer, []).append(names_of[first][0])
        for layer, firsts in hosts.items():
            rows[layer] = replace(rows[layer], replaced=True, reason=f"fused into {', '.join(firsts)}")
    return untraced


def restore_layers(model: nn.Module) -> ReplacementReport:
    """Undo `replace_layers`: every layer that it swapped is of its ``torch.nn`` class again, and none is fused.

    Layers that were built as fusednn's stay.  Returns a report of what was restored.
    """
    report = ReplacementReport()
    modules = _unique_modules(model)
    apart = {layer for _, module in modules for layer in unfuse(module)}
    for names, module in modules:
        if module.__dict__.pop(_MARK, False) and isinstance(module, Layer):  # torch.jit.script may have restored it
            stock = stock_class(_plain_class(module))
            _assign_class(module, stock)
            report.rows.append(ReplacementRow(names, stock.__name__, True, "stock again"))
        elif module in apart:
            report.rows.append(ReplacementRow(names, _plain_class(module).__name__, True, "no longer fused"))
    return report


def _readable(names: tuple[str, ...]) -> str:
    return ", ".join(name or "(model)" for name in names)


def _unique_modules(model: nn.Module) -> list[tuple[tuple[str, ...], nn.Module]]:
    """Every module once, with all its names."""
    names: dict[int, list[str]] = {}
    modules: dict[int, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
        modules[id(module)] = module
    return [(tuple(names[key]), module) for key, module in modules.items()]


def _plain_class(module: nn.Module) -> type[nn.Module]:
    """The module's class, without the subclass that a parametrization injects."""
    cls = type(module)
    return cls.__bases__[0] if parametrize.is_parametrized(module) else cls


def _assign_class(module: nn.Module, cls: type[nn.Module]) -> None:
    if parametrize.is_parametrized(module):
        injected = {k: v for k, v in vars(type(module)).items() if k not in ("__dict__", "__weakref__", "__doc__")}
        cls = type(f"Parametrized{cls.__name__}", (cls,), injected)
    module.__class__ = cls


def _is_layer(module: nn.Module) -> bool:
    """Whether a report should speak of the module: it computes by itself, or derives from a layer that has a twin."""
    return not any(True for _ in module.children()) or isinstance(module, tuple(TWINS))


def _reason_to_leave(
    names: tuple[str, ...], module: nn.Module, include: Selection | None, exclude: Selection | None
) -> str | None:
    cls = _plain_class(module)
    if issubclass(cls, Layer):
        return "already a fusednn layer"
    if cls not in TWINS:
        base = next((stock for stock in cls.__mro__ if stock in TWINS), None)
        return f"subclass of {base.__name__}, may override it" if base else "no fusednn twin"
    if "forward" in module.__dict__:
        return "forward is overridden on the instance"
    return _reason_not_selected(names, module, include, exclude)


def _reason_not_selected(
    names: tuple[str, ...], module: nn.Module, include: Selection | None, exclude: Selection | None
) -> str | None:
    if exclude is not None and _selects(exclude, names, module):
        return "excluded"
    if include is not None and not _selects(include, names, module):
        return "not included"
    return None


def _reason_to_keep_apart(layer: nn.Module) -> str | None:
    """Why a layer must not be fused, whatever its neighbours are, or None."""
    if is_untouched(layer):
        return None
    return "forward is overridden on the instance" if "forward" in layer.__dict__ else "has hooks"


def _selects(selection: Selection, names: tuple[str, ...], module: nn.Module) -> bool:
    if isinstance(selection, (str, type)):
        selection = (selection,)
    elif callable(selection):
        predicate = selection
        return any(predicate(name, module) for name in names)
    return any(
        issubclass(_plain_class(module), item) if isinstance(item, type) else any(fnmatchcase(n, item) for n in names)
        for item in selection
    )
