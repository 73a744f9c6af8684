"""Decisions that are made once for calls that are alike.

Which kernel takes a call, or PyTorch's own operator, and with which arguments, follows from the types and values of its
arguments, from what `fusednn.autograd.plans.guards` ask (dtype, device, shape, strides, whether operands require
gradients, and these are enabled), and from whether small tensors are left to PyTorch.  A function that is
`decided_once` looks at these, and returns another one, of the same arguments, that computes.  It may depend on nothing
else, not on autocast's dtype either, and keeps no operand.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import forward_ad

from ..kernels.base.device import LaunchError, on_refusal
from . import dispatch
from .operators import are_plain, is_watched, looks_on
from .plans import Calls, guards

__all__ = ["decided_once", "forget_decisions"]

#: The call whose decision is kept: shapes that never come back aren't worth it.
_KEPT_CALL = 3
_CONSTANTS = frozenset((bool, float, int, str, type(None), torch.dtype))
_DECISIONS: list[Calls] = []


def decided_once(decide: Callable[..., Callable[..., Any]]) -> Callable[..., Any]:
    """A function of positional arguments that computes what ``decide(*arguments)(*arguments)`` does.

    Everything is decided anew where somebody observes choices, or where modes, transforms or tracers have a say; and
    where a kernel couldn't be launched, which is a reason from then on, as of `fusednn.autograd.dispatch.or_stock`.
    """
    always, where_large = Calls(), Calls()
    _DECISIONS.extend((always, where_large))

    @wraps(decide)
    def decided(*arguments: Any) -> Any:
        if torch.compiler.is_compiling():
            return decide(*arguments)(*arguments)
        calls = where_large if dispatch.leaves_small() else always
        is_kept = not (looks_on() or dispatch.are_observed() or forward_ad._current_level >= 0)
        try:
            found = calls.find(arguments) if is_kept else None
        except (TypeError, RuntimeError):  # a value without a hash, a nested tensor without a shape: these aren't kept
            found = None
        if found is None:
            arguments = unwrap_dead_wrappers(arguments)  # what left a transform: as a `Function` does
            found = decide(*arguments)
            if is_kept and _is_fixed(arguments) and calls.count(arguments) >= _KEPT_CALL:
                calls.keep(arguments, guards(arguments), found)
        try:
            return found(*arguments)
        except LaunchError:
            return decide(*arguments)(*arguments)

    return decided


def _is_fixed(arguments: tuple[Any, ...]) -> bool:
    """Whether nothing else has a say in what is decided of these arguments."""
    return not is_watched() and are_plain(arguments) and all(map(_is_constant, arguments))


def _is_constant(value: object) -> bool:
    """Whether an argument is an operand, or equal to others only where these say the same.  -0.0 in a tuple isn't."""
    if isinstance(value, tuple):
        return type(value) in (tuple, torch.Size) and all(type(each) is int for each in value)
    return isinstance(value, Tensor) or type(value) in _CONSTANTS


def forget_decisions() -> None:
    """Decide everything anew, as in a new process."""
    for calls in _DECISIONS:
        calls.forget()


on_refusal.append(forget_decisions)
