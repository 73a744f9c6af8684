"""Why the kernels don't take a parameter group: the only place where this is decided, in the words of `explain`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from math import inf
from typing import Any

import torch
from torch import Tensor

from ..kernels.base.launch import memory_refusal
from .options import has_master, wants
from .recipe import Group, Recipe, gradient_dtype
from .sharding import PLAIN_TYPES, has_whole_rows, is_distributed, layout, local

__all__ = ["NO_GRADIENTS", "numbers_refusal", "tensors_refusal", "traits"]

NO_GRADIENTS = "no gradients"


def traits(
    group: Group, recipe: Recipe, parameters: Sequence[Any], own: Sequence[Mapping[str, Any]]
) -> tuple[Any, ...]:
    """All that `tensors_refusal` depends on: the same traits, the same answer."""
    options = [group.get(name) for name in ("capturable", "group_lasso", "master_weights")]
    decays = type(recipe.weight_decay) in (float, int) and recipe.weight_decay != 0
    keys = [tuple(state) for state in own]
    return (recipe.algorithm, options, decays, keys, *_tensor_traits(parameters, own))


def _tensor_traits(parameters: Sequence[Any], own: Sequence[Mapping[str, Any]]) -> Iterator[Any]:
    """What isn't plain is unlike any other.  This runs in every step over every tensor, hence list by list."""
    values = [value for state in own for value in state.values()]
    tensors = [*parameters, *(parameter.grad for parameter in parameters)]
    tensors += [value for value in values if isinstance(value, Tensor)]
    plain = PLAIN_TYPES.issuperset(map(type, tensors))
    if not plain or any(tensor.layout is not torch.strided for tensor in tensors):
        yield object()
        return
    yield [type(value) for value in values]
    yield [tensor.dtype for tensor in tensors]
    yield [tensor.device for tensor in tensors]
    yield [tensor.shape for tensor in tensors]
    yield [tensor.stride() for tensor in tensors]
    yield [tensor.is_neg() or tensor.is_inference() for tensor in tensors]
    yield [parameter.data_ptr() for parameter in parameters]


def tensors_refusal(
    group: Group, recipe: Recipe, parameters: Sequence[Any], own: Sequence[Mapping[str, Any]]
) -> str | None:
    """Why the kernels don't take parameters, their gradients and their state, or None."""
    for parameter, state in zip(parameters, own, strict=True):
        refusal = _tensor_refusal(parameter) or _tensor_refusal(parameter.grad)
        if refusal := refusal or _state_refusal(group, recipe, parameter, state):
            return refusal
    return "parameters share memory" if _overlap(parameters) else None


def numbers_refusal(group: Group, recipe: Recipe, device: torch.device) -> str | None:
    """Why the kernels don't take a group's hyperparameters, or None."""
    if group.get("capturable") and device.type == "cpu":
        return "capturable is for GPUs"
    refusals = (_number_refusal(value, device) for value in (group["lr"], *recipe[1:]))
    return next(filter(None, refusals), None)


def _number_refusal(value: Any, device: torch.device) -> str | None:
    """Of what isn't plainly a number stock is asked."""
    if type(value) in (float, int):
        return None if -inf < value < inf else "a hyperparameter is not finite"
    if type(value) is not Tensor:
        return f"a hyperparameter is a {type(value).__name__}"
    if value.dim() or value.dtype not in (torch.float32, torch.float64) or value.requires_grad:
        return "a hyperparameter is not a plain tensor of one number"
    return None if value.device.type == "cpu" or value.device == device else "a hyperparameter is on another device"


def _state_refusal(group: Group, recipe: Recipe, parameter: Any, own: Mapping[str, Any]) -> str | None:
    """Why the kernels don't take a parameter's gradient and state beside it, or None."""
    if any(stride == 0 and size > 1 for size, stride in zip(parameter.shape, parameter.stride(), strict=True)):
        return "a parameter's memory overlaps itself"
    if wants(group, "group_lasso") and not has_whole_rows(parameter):
        return "a group of the group lasso is spread over processes"
    row = recipe.row
    needed = () if row.made_lazily else (*row.states, *(["step"] if row.counted else ()))
    if own and not all(key in own for key in needed):
        return "state is missing"
    step = own.get("step")
    if step is not None and not isinstance(step, Tensor):
        return "the step is not a tensor"
    if step is not None and step.device.type != "cpu" and step.device != parameter.device:
        return "the step is on another device"
    if group.get("capturable") and step is not None and step.device != parameter.device:
        return "the step is not on the parameter's device"
    tensors = [own[key] for key in row.states if own.get(key) is not None]
    if len({tensor.dtype for tensor in tensors}) > 1:
        return "states differ in dtype"
    state_dtype = tensors[0].dtype if tensors else parameter.dtype
    if row.lerped and not has_master(group, parameter) and gradient_dtype(recipe, parameter) != state_dtype:
        return "the gradient differs in dtype from its average"
    for tensor in (parameter.grad, *tensors, *(own[key] for key in ("master", "average") if key in own)):
        if tensor.shape != parameter.shape or tensor.device != parameter.device:
            return "gradient or state is not like its parameter"
        if (refusal := _tensor_refusal(tensor)) or layout(tensor) != layout(parameter):
            return refusal or "gradient or state is distributed otherwise than its parameter"
    return None


def _tensor_refusal(tensor: Any) -> str | None:
    """Why no kernel works on the memory of this tensor, or None."""
    if is_distributed(tensor):
        if any(placement.is_partial() for placement in tensor.placements):
            return "a distributed tensor is a partial sum"
        with torch.no_grad():
            tensor = tensor.to_local()
    if type(tensor) not in PLAIN_TYPES:
        return f"{type(tensor).__name__} is not a plain tensor"
    if refusal := memory_refusal(tensor):
        return refusal
    if tensor.is_neg() or tensor.is_inference():
        return "a negated view" if tensor.is_neg() else "a tensor made in inference mode"
    return None


def _overlap(parameters: Sequence[Any]) -> bool:
    """Whether the memory of two parameters, from the first element to the last, has bytes in common."""
    extents = []
    for tensor in map(local, parameters):
        if tensor.numel():
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            extents.append((str(tensor.device), tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.itemsize))
    extents.sort()
    return any(here == there and end > start for (here, _, end), (there, start, _) in pairwise(extents))
