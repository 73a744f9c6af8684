"""Swapping the layers of an existing model for their twins, alone or fused with their neighbours."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from ...autograd.recompute import DEPTH
from ..derived import beneath
from ..fusion.host import fuse_neighbours, is_searched, recompute_in, serve_functions
from ..twin import ALL_TWINS, TWINS, Layer, is_untouched
from .kept import result_of, result_of_chain
from .register import is_registered, refusal_of, twin_of
from .report import ReplacementReport, ReplacementRow
from .swap import REPLACED, all_or_nothing, exchange, unique_modules

__all__ = ["reason_to_keep_apart", "replace_layers"]

#: What `replace_layers` accepts to choose layers: names with wildcards and classes, or a predicate.
Selection = Iterable[str | type[nn.Module]] | str | type[nn.Module] | Callable[[str, nn.Module], bool]


def replace_layers(
    model: nn.Module,
    *,
    include: Selection | None = None,
    exclude: Selection | None = None,
    fuse: bool = False,
    recompute: bool = False,
    recompute_depth: int = DEPTH,
    recast_parameters: bool = False,
) -> ReplacementReport:
    """Swap every layer of ``model`` that has a fusednn twin for it, in place: ``torch.nn``'s, and registered ones.

    Args:
        model: any module; itself swapped if it is such a layer.
        include: swap only these layers: names as in ``model.named_modules()``, with shell wildcards (``"features.*"``),
            layer classes, a mixture of both, or a predicate of (name, module).  All, by default.
        exclude: leave these; wins over ``include``.
        fuse: also compute neighbouring layers in one, where kernels take the input:

            - Conv2d, BatchNorm2d, a residual that is added, an activation, MaxPool2d, of which any may be missing; also
              in one and three dimensions, and with transposed convolutions;
            - a batch norm, a residual that is added, an activation;
            - an activation, MaxPool2d (or in one or three dimensions), whatever comes before them;
            - Linear or a convolution, an activation or PReLU, dropout of elements, or of a convolution's channels;
            - Linear or a convolution, a batch norm, an activation or PReLU, Dropout; also with an activation before the
              norm, or a residual before PReLU;
            - a convolution, a batch norm, an activation or PReLU, and the maximum or the mean over all places;
            - Linear, and the maximum over pieces of its features;
            - an activation, and the product with what it gates (SwiGLU, GEGLU); a highway's t h + (1 - t) x, or lerp;
            - a scale (LayerScale), what drops samples (DropPath), a residual that is added;
            - GELU, SiLU, Mish and the like that code writes out in operators or layers.

            Functions and methods (``F.relu(x)``, ``x.relu()``, ``x += y``) count as the layers do.  What the code of
            modules calls besides becomes ours there, and stays PyTorch's elsewhere: functions (``F.softmax(x, -1)``),
            also in helpers of the same package, and layers that are made to be called once (``nn.Softmax(-1)(x)``).
        recompute: also run the model's forward pass in `fusednn.recompute`: what is made of kept tensors in one pass
            over memory is made again in the backward pass, not kept.
        recompute_depth, recast_parameters: that function's ``depth`` and ``recast_parameters``.

    Returns:
        A report of what was replaced, what was left, and why.  A layer used under several names is one row.

    Layers are matched by exact class, beneath those that PyTorch's tools derive (`torch.nn.utils.parametrize`,
    ``fully_shard``): a subclass that may override behaviour is left alone.  Where anything raises, nothing has changed.

    Neighbours are found in ``nn.Sequential`` by position, elsewhere in the graph of the code (``torch.fx``) of each
    module that calls layers.  Code that can't be traced, or does more than its graph tells, keeps its layers apart.
    Layers that have hooks or parametrizations, and values that are used twice, aren't fused.  No layer moves, and none
    changes beyond the swap: the module that calls them runs its code with a single call for neighbours.  It runs its
    own code for any call that is unlike those that were traced, or when something that the code looked at has changed,
    and calls neighbours one by one where one of them has got a hook, another class or unusual options, where a hook
    listens to all modules (``register_module_forward_hook``), or where no kernel takes the input.
    """
    report = ReplacementReport()
    modules = unique_modules(model)
    rows: dict[nn.Module, ReplacementRow] = {}
    with all_or_nothing(modules):
        for names, module in modules:
            stock = beneath(type(module))
            reason = _reason_to_leave(names, module, include, exclude)
            if reason is None:
                exchange(module, stock, ALL_TWINS[stock])
                module.__dict__[REPLACED] = True
                rows[module] = ReplacementRow(names, stock.__name__, True, "swapped for its twin")
            elif _is_layer(module):
                rows[module] = ReplacementRow(names, stock.__name__, False, reason)
        chains: list[list[nn.Module]] = []
        if fuse:
            report.functions = [
                ReplacementRow(names, beneath(type(module)).__name__, True, ", ".join(served))
                for names, module in modules
                if _reason_not_selected(names, module, include, exclude) is None and (served := serve_functions(module))
            ]
            report.untraced, chains = _fuse(modules, rows, include, exclude)
        if recompute:
            refusal = recompute_in(model, depth=recompute_depth, recast_parameters=recast_parameters)
            report.recompute = f"depth {recompute_depth}" if refusal is None else f"no: {refusal}"
            if refusal is None:
                _tell_results(rows, chains)
    report.rows = list(rows.values())
    return report


def _fuse(
    modules: list[tuple[tuple[str, ...], nn.Module]],
    rows: dict[nn.Module, ReplacementRow],
    include: Selection | None,
    exclude: Selection | None,
) -> tuple[list[ReplacementRow], list[list[nn.Module]]]:
    """Fuse neighbours and say so in ``rows``; returns rows of the modules whose code can't be traced, and chains."""
    names_of = {module: names for names, module in modules}

    def refuses(_: str, layer: nn.Module) -> str | None:
        return reason_to_keep_apart(layer) or _reason_not_selected(names_of[layer], layer, include, exclude)

    untraced = []
    told: list[list[nn.Module]] = []
    for names, module in modules:
        if not is_searched(module):
            continue
        fusion = fuse_neighbours(module, refuses)
        if fusion.untraced is not None:
            untraced.append(ReplacementRow(names, beneath(type(module)).__name__, False, fusion.untraced))
        for layer, reason in fusion.stops.items():
            if reason == rows[layer].reason:
                continue
            rows[layer] = replace(rows[layer], reason=f"{rows[layer].reason}; not fused: {reason}")
        hosts: dict[nn.Module, list[str]] = {}
        for chain in fusion.chains:
            if any(chain in (longer[: len(chain)], longer[-len(chain) :]) for longer in told):
                continue  # the module around this one calls its layers, with one more
            told.append(chain)
            first, *others = chain
            with_them = ", ".join(names_of[layer][0] for layer in others) or "the functions behind it"
            rows[first] = replace(rows[first], replaced=True, reason=f"fused with {with_them}")
            for layer in others:
                hosts.setdefault(layer, []).append(names_of[first][0])
        for layer, firsts in hosts.items():
            rows[layer] = replace(rows[layer], replaced=True, reason=f"fused into {', '.join(firsts)}")
    return untraced, told


def _tell_results(rows: dict[nn.Module, ReplacementRow], chains: list[list[nn.Module]]) -> None:
    """Say in ``rows`` what becomes of each result that there is: inside of a chain there is none."""
    results = {layer: result_of(layer) for layer in rows}
    for _, *others in chains:
        for layer in others:
            results.pop(layer, None)
    results.update((chain[0], result_of_chain(chain)) for chain in chains)
    for layer, result in results.items():
        rows[layer] = replace(rows[layer], computed=result)


def _is_layer(module: nn.Module) -> bool:
    """Whether a report should speak of the module: it computes by itself, or derives from a layer that has a twin."""
    if not any(True for _ in module.children()) or isinstance(module, tuple(TWINS)):
        return True
    return is_registered(beneath(type(module)))


def _reason_to_leave(
    names: tuple[str, ...], module: nn.Module, include: Selection | None, exclude: Selection | None
) -> str | None:
    cls = beneath(type(module))
    if issubclass(cls, Layer):
        return "already a fusednn layer"
    if issubclass(cls, LazyModuleMixin) and cls.cls_to_become in TWINS:
        return "not initialised: replace it after its first batch"
    if refusal := refusal_of(module, cls):
        return refusal
    if twin_of(cls) is None:
        base = next((stock for stock in cls.__mro__ if stock in TWINS or is_registered(stock)), None)
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


def reason_to_keep_apart(layer: nn.Module) -> str | None:
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
        issubclass(beneath(type(module)), item) if isinstance(item, type) else any(fnmatchcase(n, item) for n in names)
        for item in selection
    )
