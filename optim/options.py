"""What our optimizers can do beside the update, by keyword, and how plain PyTorch does it.

The kernels do all of it on the way; groups that they don't take get it from `plain_options`, with the same result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from math import inf
from numbers import Real
from typing import Any

import torch
from torch import Tensor

__all__ = ["OPTIONS", "check_options", "clip_norm_squares", "plain_options", "prepare_options"]

#: The keywords, and the values that ask for nothing.
OPTIONS: dict[str, Any] = {
    "clip_norm": None,
    "clip_value": None,
    "l1": 0.0,
    "l2": 0.0,
    "group_lasso": 0.0,
    "averaging": None,
    "master_weights": False,
}


def check_options(options: Mapping[str, Any]) -> None:
    """Raise ValueError where an option of ours has no meaning."""
    for name, has_meaning in _MEANINGS.items():
        if name in options and not has_meaning(options[name]):
            raise ValueError(f"Invalid {name} value: {options[name]}")


def _is_number(value: Any) -> bool:
    """Whether the host knows its value, and it isn't a yes or no."""
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_limit(value: Any) -> bool:
    return value is None or (_is_number(value) and value > 0)


def _is_strength(value: Any) -> bool:
    return _is_number(value) and 0 <= value < inf


def _is_averaging(value: Any) -> bool:
    return value is None or (value == "mean" if isinstance(value, str) else _is_number(value) and 0 <= value < 1)


_MEANINGS: dict[str, Callable[[Any], bool]] = {
    "clip_norm": _is_limit,
    "clip_value": _is_limit,
    "l1": _is_strength,
    "l2": _is_strength,
    "group_lasso": _is_strength,
    "averaging": _is_averaging,
}


def wants(group: Mapping[str, Any], name: str) -> Any:
    """A group's option, or the value that asks for nothing."""
    return group.get(name, OPTIONS[name])


def has_master(group: Mapping[str, Any], parameter: Tensor) -> bool:
    return bool(wants(group, "master_weights")) and parameter.is_floating_point() and parameter.itemsize == 2


def prepare_options(group: Mapping[str, Any], parameters: Iterable[Tensor], state: Any) -> None:
    """Make the state that a group's options need and that isn't there yet.

    ``master`` is a float32 copy of a 16-bit parameter, beside which all state is float32.  ``average`` is float32 for
    16-bit parameters too; ``averages`` counts the weights that it is of.
    """
    averaged = wants(group, "averaging") is not None
    for parameter in parameters:
        if not (averaged or has_master(group, parameter)):
            continue
        own = state[parameter]
        if has_master(group, parameter) and "master" not in own:
            for key, value in own.items():
                if isinstance(value, Tensor) and value.dtype == parameter.dtype and value.shape == parameter.shape:
                    own[key] = value.float()
            own["master"] = parameter.detach().float()
        if averaged and "average" not in own:
            wide = torch.float32 if parameter.itemsize == 2 else parameter.dtype
            own["average"] = torch.zeros_like(parameter, dtype=wide, memory_format=torch.preserve_format)
            own["averages"] = torch.zeros((), dtype=torch.float32, device=parameter.device)


def clip_norm_squares(groups: Iterable[Mapping[str, Any]]) -> Tensor | None:
    """Sum of the squares of all gradients that groups want clipped by their norm; None where none does."""
    gradients = [
        parameter.grad
        for group in groups
        if wants(group, "clip_norm") is not None
        for parameter in group["params"]
        if parameter.grad is not None
    ]
    if not gradients:
        return None
    norm: Any = torch.nn.utils.get_total_norm(gradients)
    if hasattr(norm, "full_tensor"):  # of distributed gradients
        norm = norm.full_tensor()
    squares: Tensor = norm.double().square()
    return squares


@contextmanager
def plain_options(group: Mapping[str, Any], state: Any, squares: Tensor | None) -> Iterator[None]:
    """Around the stock update of a group: what its options ask for, in PyTorch's own operators."""
    parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
    gradients = [parameter.grad for parameter in parameters]
    low = [parameter.data for parameter in parameters]
    # Stock takes an empty state for one that it still has to make: ours joins it afterwards.
    prepare_options(group, [parameter for parameter in parameters if state.get(parameter)], state)
    for parameter in parameters:
        gradient = _clipped(parameter.grad, group, squares)
        if has_master(group, parameter):
            # The stock update then works on the master copy, and makes its state of the same type.
            parameter.grad = None
            master = state.get(parameter, {}).get("master")
            parameter.data = parameter.data.float() if master is None else master
            gradient = gradient.to(parameter.dtype)
        parameter.grad = gradient
    try:
        yield
        for parameter in parameters:
            _apply_penalties(parameter, group)
    finally:
        for parameter, gradient, data in zip(parameters, gradients, low, strict=True):
            master = parameter.data
            if master is not data and master.dtype != data.dtype:
                parameter.grad = None
                parameter.data = data
                data.copy_(master)
                state[parameter]["master"] = master
            parameter.grad = gradient
    prepare_options(group, parameters, state)
    if wants(group, "averaging") is not None:
        for parameter in parameters:
            _average(parameter, group, state[parameter])


def _clipped(gradient: Any, group: Mapping[str, Any], squares: Tensor | None) -> Any:
    clip_norm, clip_value = wants(group, "clip_norm"), wants(group, "clip_value")
    if clip_norm is not None and squares is not None:
        coefficient = (clip_norm / (squares.sqrt() + 1e-6)).clamp(max=1.0)
        gradient = gradient * coefficient.to(gradient.device, gradient.dtype)
    if clip_value is not None:
        gradient = gradient.clamp(-clip_value, clip_value)
    return gradient


def _apply_penalties(parameter: Tensor, group: Mapping[str, Any]) -> None:
    lr, l1, l2 = group["lr"], wants(group, "l1"), wants(group, "l2")
    if l1 or l2:
        parameter.copy_(parameter.sign() * (parameter.abs() - lr * l1).clamp(min=0) / (1 + lr * l2))
    if (strength := wants(group, "group_lasso")) and parameter.dim() > 1 and parameter.numel():
        rows = parameter.flatten(1)
        norms = rows.norm(dim=1).view(-1, *[1] * (parameter.dim() - 1))
        bound = lr * strength * rows.shape[1] ** 0.5
        parameter.mul_(torch.where(norms <= bound, 0.0, 1 - bound / norms))


def _average(parameter: Tensor, group: Mapping[str, Any], own: dict[str, Any]) -> None:
    averaging = wants(group, "averaging")
    own["averages"] += 1
    share = 1 / own["averages"]
    if averaging != "mean":
        share = torch.where(own["averages"] <= 1, 1.0, 1 - averaging)
    weights = own["master"] if has_master(group, parameter) else parameter.to(own["average"].dtype)
    own["average"].add_((weights - own["average"]) * share.to(own["average"].dtype))
