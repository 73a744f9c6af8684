"""Layers that are what they were: compared by identity, since a walk over a chain takes longer than its launches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, wraps
from types import CodeType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

__all__ = ["while_unchanged"]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_PLAIN = (bool, int, float, str, type(None))


def while_unchanged(refusal: Callable[..., str | None]) -> Callable[..., str | None]:
    """A function of a chain's layers, or what stands for them, that says why they aren't computed in one, or None.

    Where ``refusal`` had no reason it isn't asked again as long as these are the same objects, of the same classes and
    code, with no hooks and the same attributes.  It may depend on nothing else: not on parameters, buffers or children.
    """
    kept: WeakKeyDictionary[nn.Module, Callable[..., bool]] = WeakKeyDictionary()

    @wraps(refusal)
    def asked(first: nn.Module, *others: Any) -> str | None:
        if torch.compiler.is_compiling():
            return refusal(first, *others)
        are_as_before = kept.get(first)
        if are_as_before is not None:
            try:
                if are_as_before(first, *others):
                    return None
            except KeyError:  # an attribute was deleted, and another set
                pass
        reason = refusal(first, *others)
        if reason is None and all(map(_is_comparable, (first, *others))):
            kept[first] = _comparison((first, *others))
        return reason

    return asked


def _is_comparable(layer: Any) -> bool:
    """Whether all that a layer is can be compared by identity: no attribute of it changes in place."""
    if not isinstance(layer, nn.Module):
        return True
    return all(name.startswith("_") or _is_plain(value) for name, value in layer.__dict__.items())


def _is_plain(value: object) -> bool:
    return type(value) in _PLAIN or (type(value) is tuple and all(type(each) in _PLAIN for each in value))


def _comparison(layers: Sequence[Any]) -> Callable[..., bool]:
    """Whether layers are these, and as these are now.  It holds all but the first, which holds it."""
    conditions = []
    scope: dict[str, Any] = {}
    for place, layer in enumerate(layers):
        name = f"a{place}"
        if place:
            scope[f"l{place}"] = layer
            conditions.append(f"{name} is l{place}")
        if not isinstance(layer, nn.Module):
            continue
        attributes = layer.__dict__
        scope[f"c{place}"], scope[f"f{place}"] = type(layer), type(layer).forward
        conditions += [f"type({name}) is c{place}", f"c{place}.forward is f{place}"]
        conditions.append(f"len(d := {name}.__dict__) == {len(attributes)}")
        conditions += [f"not d[{hooks!r}]" for hooks in _HOOKS]
        for number, (attribute, value) in enumerate(attributes.items()):
            if not attribute.startswith("_"):
                scope[f"v{place}_{number}"] = value
                conditions.append(f"d[{attribute!r}] is v{place}_{number}")
    parameters = ", ".join(f"a{place}" for place in range(len(layers)))
    exec(_compiled(f"def are_as_before({parameters}):\n    return {' and '.join(conditions)}"), scope)
    found: Callable[..., bool] = scope["are_as_before"]
    return found


@cache
def _compiled(source: str) -> CodeType:
    return compile(source, "<unchanged layers>", "exec")
