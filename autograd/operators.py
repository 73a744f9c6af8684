"""Registration of kernels as PyTorch operators, ``torch.ops.fusednn.*``.

``torch.compile``, ``torch.export`` and every other tracer see an operator as one opaque call with known result shapes.
``torch.library.Library`` definitions cost about a microsecond a call, the friendlier ``torch.library.custom_op``
several.
"""

from collections.abc import Callable, Iterator
from functools import partial, reduce, wraps
from operator import or_
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils.flop_counter import register_flop_formula

from .dispatch import PLAIN_TYPES
from .plans import Plans

__all__ = ["IMPLEMENTATIONS", "are_plain", "forget_plans", "given", "is_watched", "looks_on", "operator"]

_LIBRARY = torch.library.Library("fusednn", "FRAGMENT")
_PLANS: list[Plans] = []
# Kernels take any strides, so the compiler needn't copy.  But results follow them, and it mustn't change them either,
# unless no argument, no result's shape and no code kept for the backward pass depends on them.
_STRIDES = {False: torch.Tag.needs_exact_strides, True: torch.Tag.flexible_layout}

#: What each operator calls: for those who count what it launches.
IMPLEMENTATIONS: dict[OpOverload[..., Any], Callable[..., Any]] = {}


def operator(
    schema: str,
    *,
    fake: Callable[..., Any],
    flops: Callable[..., int] | None = None,
    planned: bool = True,
    any_strides: bool = False,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make the decorated function the operator that ``schema`` declares, for CUDA and (interpreted) CPU tensors.

    ``fake`` makes results of the right shape, strides and dtype without computing them; ``flops`` counts, from the same
    arguments, the operations of its matrix products and convolutions as PyTorch counts its own: two for each
    multiplication.  What comes back takes positional arguments, and calls the operator only where something would see
    it: PyTorch's dispatcher takes as long as a launch.  Elsewhere what the function does for operands of these shapes
    is remembered, unless it depends on more than its arguments, and isn't to be ``planned``.  ``any_strides``:
    compiled code may give it operands of other strides than those that were traced.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        name = schema.partition("(")[0]
        _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, _STRIDES[any_strides]))
        for key in ("CUDA", "CPU"):
            _LIBRARY.impl(name, function, key)
        torch.library.register_fake(f"fusednn::{name}", fake, lib=_LIBRARY)
        if flops is not None:
            formula = partial(_counted, flops)
            register_flop_formula(getattr(torch.ops.fusednn, name), get_raw=True)(formula)
        overload: OpOverload[..., Any] = getattr(torch.ops.fusednn, name).default
        IMPLEMENTATIONS[overload] = function
        plans = Plans(function)
        _PLANS.append(plans)

        @wraps(function)
        def call(*arguments: Any) -> Any:
            if torch.compiler.is_compiling():
                return overload(*arguments)
            if looks_on():
                return overload(*map(_in_memory, arguments))
            if planned and (plan := plans.find(arguments)) is not None:
                return plan(*arguments)
            if is_watched() or not are_plain(arguments):
                return overload(*map(_in_memory, arguments))
            return plans.call(*arguments) if planned else function(*arguments)

        return call

    return register


def looks_on() -> bool:
    """Whether somebody would see an operator of whom the operands' guards don't know."""
    return torch._C._is_torch_function_mode_enabled() or torch._C._autograd._profiler_enabled()


def is_watched() -> bool:
    """Whether a mode, transform or tracer would see an operator.  The guards of operands don't hold there."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
    )


def are_plain(arguments: tuple[Any, ...]) -> bool:
    """Whether the operands are nothing but their elements, which PyTorch's dispatcher has no work to do on first."""
    return all(
        type(each) in PLAIN_TYPES and _dispatch_keys(each).raw_repr() in _PLAIN_KEYS
        for each in arguments
        if isinstance(each, Tensor)
    )


def _in_memory(argument: Any) -> Any:
    """Zeros without memory, as PyTorch makes them of gradients that aren't there, as zeros of the same strides: its
    dispatcher would give the kernels one zero that is expanded.
    """
    if isinstance(argument, Tensor) and argument._is_zerotensor():
        return torch.empty_strided(
            argument.shape, argument.stride(), dtype=argument.dtype, device=argument.device
        ).zero_()
    return argument


def _plain_keys() -> Iterator[int]:
    """What PyTorch dispatches on for a tensor that is nothing but its elements, outside and inside inference mode."""
    for device in ("CPU", "CUDA"):
        inference = _keys(device, f"Autocast{device}")
        yield inference.raw_repr()
        yield (inference | _keys("ADInplaceOrView", f"Autograd{device}")).raw_repr()


def _keys(*names: str) -> Any:
    keys = (torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name)) for name in names)
    return reduce(or_, keys)


_dispatch_keys = torch._C._dispatch_keys
#: Negated views, tensors of zeros without memory, batches and the like have other keys.
_PLAIN_KEYS = frozenset(_plain_keys())


def forget_plans() -> None:
    """Let every operator look at its operands anew, as in a new process."""
    for plans in _PLANS:
        plans.forget()


def given(result: Tensor) -> Tensor | None:
    """An operator's result to save for the backward pass: None for the empty tensor that stands for it.

    PyTorch saves nothing there, and hooks that measure or compress what is saved don't expect anything empty.
    """
    return result if result.numel() else None


def _counted(flops: Callable[..., int], *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    """A formula as `torch.utils.flop_counter` calls it, which also hands over the results."""
    return flops(*args, **kwargs)
