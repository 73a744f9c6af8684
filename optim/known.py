"""What a step knew of its tensors, so that the next one can see quickly that nothing but gradients changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor

from ..kernels.base.multi_tensor import FlatOperands, Words
from .options import wants
from .recipe import Group, Recipe, with_gradients
from .refusals import numbers_refusal
from .sharding import PLAIN_TYPES

__all__ = ["Known", "KnownGroup", "KnownState"]


def _same_objects(these: Sequence[Any], those: Sequence[Any]) -> bool:
    """Whether two sequences are of the same objects; equality would compare tensors by their elements."""
    return len(these) == len(those) and all(map(is_, these, those))


class Known:
    """Tensors and where they lie; gradients alone may be others, and elsewhere, if they are like those that were.

    This runs in every step over every tensor, hence list by list, and asks no more than can change of a tensor that
    stays the same object: an in-place transposition changes strides, pruning through ``.data`` shapes, a move of the
    module addresses.
    """

    def __init__(self, gradients: Sequence[Tensor], others: Sequence[Tensor]) -> None:
        self._tensors = others
        self._places = _places(others)
        self._gradients = _likeness(gradients)

    def are_in_place(self) -> bool:
        """Whether parameters and state lie where they lay, and as they did."""
        return _places(self._tensors) == self._places

    def addresses(self, gradients: Sequence[Any]) -> Words | None:
        """The addresses of gradients, or None where one of them isn't like the one before it."""
        if not PLAIN_TYPES.issuperset(map(type, gradients)) or _likeness(gradients) != self._gradients:
            return None
        return FlatOperands.row(gradients)


def _places(tensors: Sequence[Tensor]) -> list[list[Any]]:
    return [list(map(Tensor.data_ptr, tensors)), list(map(Tensor.size, tensors)), list(map(Tensor.stride, tensors))]


def _likeness(gradients: Sequence[Any]) -> list[list[Any]]:
    """What a kernel asks of gradients beside their addresses: their shape is their parameter's."""
    layouts = [gradient.layout for gradient in gradients]
    if any(layout is not torch.strided for layout in layouts):
        return [layouts]
    return [
        [gradient.dtype for gradient in gradients],
        list(map(Tensor.stride, gradients)),
        list(map(Tensor.is_neg, gradients)),
    ]


class KnownGroup:
    """What a parameter group's update was made of: the kind of update, and the objects that it works on.

    Hyperparameters are free to change as long as the same kernel with the same operands takes them.
    """

    def __init__(self, group: Group, recipe: Recipe) -> None:
        self._kind = _kind(group, recipe)
        self._parameters = list(group["params"])
        self._has_gradient = [parameter.grad is not None for parameter in self._parameters]
        self._active = with_gradients(group)

    def is_same(self, group: Group, recipe: Recipe) -> bool:
        return (
            _same_objects(group["params"], self._parameters)
            and _kind(group, recipe) == self._kind
            and [parameter.grad is not None for parameter in self._parameters] == self._has_gradient
            and not (self._active and numbers_refusal(group, recipe, self._active[0].device))
        )


def _kind(group: Group, recipe: Recipe) -> list[Any]:
    """All of a group's hyperparameters that choose a kernel, its operands, or whether there is one."""
    penalties = [wants(group, name) != 0 for name in ("l1", "l2", "group_lasso")]
    absent = [wants(group, name) is None for name in ("clip_norm", "clip_value", "averaging")]
    switches = [bool(group.get(name)) for name in ("capturable", "differentiable", "master_weights")]
    number = type(recipe.weight_decay) in (float, int)
    return [recipe.algorithm, number, number and recipe.weight_decay != 0, penalties, absent, switches]


class KnownState:
    """The objects that an optimizer's state consists of.  In their order, since a search would hash each parameter."""

    def __init__(self, state: Mapping[Any, dict[str, Any]]) -> None:
        self._objects = _objects(state)

    def is_same(self, state: Mapping[Any, dict[str, Any]]) -> bool:
        return all(map(_same_objects, _objects(state), self._objects))


def _objects(state: Mapping[Any, dict[str, Any]]) -> tuple[list[Any], list[Any], list[Any]]:
    own = list(state.values())
    return list(state), own, [value for values in own for value in values.values()]
