"""What the layers of a chain are: exactly of which class, whether anything listens to them, who looks on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.modules import module

from ...autograd.decisions import decided_once
from ...autograd.dispatch import tensor_refusal
from ..twin import ALL_TWINS, is_untouched

__all__ = [
    "apart",
    "call_refusal",
    "class_of",
    "computed",
    "is_one_of",
    "know",
    "layer_refusal",
    "observe_chains",
    "observe_modules",
]

#: The stock class of each class whose layers patterns are made of, and the code of each when it was imported.
_STOCK: dict[type[nn.Module], type[nn.Module]] = {}
_FORWARD: dict[type[nn.Module], Any] = {}

#: Hooks of all modules at once, which hear of each layer: of those that it takes to be computed apart.
_GLOBAL_HOOKS: tuple[dict[int, Any], ...] = (
    *(module._global_forward_hooks, module._global_forward_pre_hooks),
    *(module._global_backward_hooks, module._global_backward_pre_hooks),
)
_CALL = nn.Module.__call__
#: Marks the hooks of `observe_modules`, which take neighbours that are computed in one for what they are.
_LOOKS_ON = "_fusednn_looks_on"

_Result = TypeVar("_Result")

#: Those that are told of the layers of each chain, and why these are computed apart.
_Observer = Callable[[Sequence[nn.Module], str | None], None]
_observers: list[_Observer] = []


# --- Classes ----------------------------------------------------------------------------------------------------------


def know(classes: Iterable[type[nn.Module]]) -> None:
    """Let `is_one_of` tell layers of these classes and their twins."""
    for stock in classes:
        for cls in (stock, ALL_TWINS.get(stock, stock)):
            _STOCK[cls], _FORWARD[cls] = stock, cls.forward


def is_one_of(layer: nn.Module, classes: Iterable[type[nn.Module]]) -> bool:
    """Whether a layer is exactly of one of these stock classes, or its twin, with the code that these had."""
    cls = type(layer)
    stock = _STOCK.get(cls)
    return stock is not None and stock in classes and cls.forward is _FORWARD[cls]


def class_of(layer: nn.Module) -> type[nn.Module]:
    """The stock class of a layer that `is_one_of` some."""
    return _STOCK[type(layer)]


# --- Listeners --------------------------------------------------------------------------------------------------------


def call_refusal(input: Tensor) -> str | None:
    """Why a chain isn't computed in one whatever its layers are, or None: no kernel takes its input, or one listens."""
    refusal: str | None = _tensor_refusal(input)
    if refusal is not None:
        return refusal
    if nn.Module.__call__ is not _CALL:
        return "calls of modules are patched"
    if any(_GLOBAL_HOOKS) and any(not hasattr(hook, _LOOKS_ON) for hooks in _GLOBAL_HOOKS for hook in hooks.values()):
        return "a hook listens to all modules"
    return None


@decided_once
def _tensor_refusal(input: Tensor) -> Callable[..., str | None]:
    """`tensor_refusal` as a function of the tensor."""
    refusal = tensor_refusal(input)
    return lambda _: refusal


def layer_refusal(layer: Any, *classes: type[nn.Module]) -> str | None:
    """Why a layer mustn't be computed with others any more, or None, also where there is a function in its place."""
    if not isinstance(layer, nn.Module):
        return None
    if not is_one_of(layer, classes):
        return "a layer is of another class than it was"
    return None if is_untouched(layer) else "a layer has hooks, or code of its own"


@contextmanager
def observe_chains(observer: _Observer) -> Iterator[None]:
    """Call ``observer`` with the layers of each chain that is about to be computed in one, and with () after it.

    Of a chain whose layers are called one by one it is called once, with the layers and the reason, which is else None.
    """
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


@contextmanager
def observe_modules(enter: Callable[[nn.Module, Any], None], leave: Callable[[nn.Module, Any], None]) -> Iterator[None]:
    """Call back around every module that runs: with its arguments before, with its result (None, if it raised) after.

    Layers that others compute don't run.  Looking on keeps nothing from being fused, as hooks of all modules else do.
    """

    def before(module: nn.Module, arguments: Any) -> None:
        enter(module, arguments)

    def after(module: nn.Module, _: Any, result: Any) -> None:
        leave(module, result)

    for hook in (before, after):
        setattr(hook, _LOOKS_ON, True)
    handles = [
        module.register_module_forward_pre_hook(before),
        module.register_module_forward_hook(after, always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def computed(function: Callable[[], _Result], *layers: Any) -> _Result:
    """The result of a chain, which its observers are told of."""
    if not _observers or not (members := _members(layers)):
        return function()
    _tell(members, None)
    try:
        return function()
    finally:
        _tell((), None)


def apart(refusal: str | None, *layers: Any) -> bool:
    """Whether there is a reason to call the layers of a chain one by one, which its observers are told."""
    if refusal is not None and _observers and (members := _members(layers)):
        _tell(members, refusal)
    return refusal is not None


def _members(layers: Sequence[Any]) -> list[nn.Module]:
    """Without what isn't there, and functions."""
    return [layer for layer in layers if isinstance(layer, nn.Module)]


def _tell(members: Sequence[nn.Module], refusal: str | None) -> None:
    for observer in _observers:
        observer(members, refusal)
