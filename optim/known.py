"""What a step knew of its tensors, so that the next one can see quickly that nothing but gradients changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from operator import is_
from typing import Any

import numpy as np
from torch import Tensor
from torch._C._dynamo.guards import TensorGuards

from ..kernels.base.multi_tensor import Words, addresses
from .options import wants
from .recipe import Group, Recipe, with_gradients
from .refusals import numbers_refusal

__all__ = ["Known", "KnownGroup", "KnownState"]


def _same_objects(these: Sequence[Any], those: Sequence[Any]) -> bool:
    """Whether two sequences are of the same objects; equality would compare tensors by their elements."""
    return len(these) == len(those) and all(map(is_, these, those))


class Known:
    """Tensors and where they lie; gradients alone may be others, and elsewhere, if they are like those that were.

    This runs in every step over every tensor, hence list by list and in C++, by the guards of PyTorch's compiler: they
    ask for type, dtype, device, shape, strides and what else an operator is chosen by.  All may change of a tensor that
    stays the same object: an in-place transposition changes strides, pruning through ``.data`` shapes, a move of the
    module addresses.
    """

    def __init__(self, gradients: Sequence[Tensor], others: Sequence[Tensor]) -> None:
        self._tensors = others
        self._addresses = addresses(others)
        self._are_alike, self._gradients_are_alike = _guards(others), _guards(gradients)
        self._found: list[int] = []
        self._row = np.empty(0, dtype=np.int64)

    def are_in_place(self) -> bool:
        """Whether parameters and state lie where they lay, and as they did."""
        return self._are_alike(*self._tensors) and addresses(self._tensors) == self._addresses

    def addresses(self, gradients: Sequence[Any]) -> Words | None:
        """The addresses of gradients, the same row for the same ones; None where one isn't like the one before it."""
        if not self._gradients_are_alike(*gradients):
            return None
        found = addresses(gradients)
        if found != self._found:
            self._found, self._row = found, np.array(found, dtype=np.int64)
        return self._row


def _guards(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """Whether tensors are like these, which are all different ones."""
    found: Callable[..., bool]
    found = TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
    return found


class KnownGroup:
    """What a parameter group's update was made of: the kind of update, and the objects that it works on.

    Hyperparameters are free to change as long as the same kernel with the same operands takes them.
    """

    def __init__(self, group: Group, recipe: Recipe) -> None:
        self._kind = _kind(group, recipe)
        self._parameters = list(group["params"])
        self._idle = [parameter for parameter in self._parameters if parameter.grad is None]
        active = with_gradients(group)
        self._device = active[0].device if active else None

    def is_same(self, group: Group, recipe: Recipe) -> bool:
        """That gradients which were there still are is seen where they are asked for: `Known.addresses`."""
        return (
            _same_objects(group["params"], self._parameters)
            and _kind(group, recipe) == self._kind
            and all(parameter.grad is None for parameter in self._idle)
            and not (self._device and numbers_refusal(group, recipe, self._device))
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
    return list(state), own, list(chain.from_iterable(map(dict.values, own)))
