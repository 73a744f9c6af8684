"""Which class replaces which: `TWINS`, and what makes a class a twin, or keeps it from being one."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch.optim import Optimizer

from .options import check_options

__all__ = ["TWINS", "register", "stock_class"]

#: The twin, a `FusedOptimizer`, of each ``torch.optim`` class that has one.
TWINS: dict[type[Optimizer], type[Any]] = {}


def register(twin: type[Any]) -> None:
    """Make ``class Adam(FusedOptimizer, torch.optim.Adam)`` the twin of its second base.

    Raises TypeError where it can't be one.
    """
    stock = next((base for base in twin.__bases__[1:] if issubclass(base, Optimizer)), Optimizer)
    if refusal := _refusal(twin, stock):
        raise TypeError(f"{twin.__name__} can't be the twin of {stock.__name__}: {refusal}")
    TWINS[stock] = twin
    setattr(twin, "__init__", _constructor(stock, twin.options))  # noqa: B010


def _refusal(twin: type[Any], stock: type[Optimizer]) -> str | None:
    if "_recipe" not in twin.__dict__:
        return "it has no _recipe"
    if not hasattr(stock, "_init_group"):
        return f"{stock.__name__} has no _init_group, which makes the state"
    if len(inspect.signature(stock._init_group).parameters) < 4:
        return f"{stock.__name__}._init_group doesn't take lists of parameters and gradients to fill"
    known = TWINS.get(stock)
    if known is not None and (known.__module__, known.__qualname__) != (twin.__module__, twin.__qualname__):
        return f"{known.__module__}.{known.__qualname__} is; derive from that"
    return None


def stock_class(twin: type[Any]) -> type[Optimizer]:
    """The ``torch.optim`` class that a twin, or a subclass of one, replaces."""
    return next(stock for stock, ours in TWINS.items() if ours in twin.__mro__)


def _constructor(stock: type[Optimizer], options: Mapping[str, Any]) -> Callable[..., None]:
    """The stock constructor, with our options as further keywords."""

    @functools.wraps(stock.__init__)
    def __init__(self: Any, *arguments: Any, **keywords: Any) -> None:  # noqa: N807
        given = {name: keywords.pop(name) for name in options if name in keywords}
        check_options(given)
        stock.__init__(self, *arguments, **keywords)
        self._set_options(given)
        for group in self.param_groups:
            self._check_group(group)

    signature = inspect.signature(stock.__init__)
    ours = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=value) for name, value in options.items()]
    __init__.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *ours])  # type: ignore[attr-defined]
    return __init__
