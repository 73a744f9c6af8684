"""Registration of kernels as PyTorch operators, ``torch.ops.fusednn.*``.

``torch.compile``, ``torch.export`` and every other tracer see an operator as one opaque call with known result shapes.
``torch.library.Library`` definitions cost about a microsecond a call, the friendlier ``torch.library.custom_op``
several.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils.flop_counter import register_flop_formula

__all__ = ["IMPLEMENTATIONS", "given", "operator"]

_LIBRARY = torch.library.Library("fusednn", "FRAGMENT")
# Kernels take any strides, so the compiler needn't copy; but results follow them, so it mustn't change them either.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)

#: What each operator calls: for those who count what it launches.
IMPLEMENTATIONS: dict[OpOverload[..., Any], Callable[..., Any]] = {}


def operator(
    schema: str, *, fake: Callable[..., Any], flops: Callable[..., int] | None = None
) -> Callable[[Callable[..., Any]], OpOverload[..., Any]]:
    """Make the decorated function the operator that ``schema`` declares, for CUDA and (interpreted) CPU tensors.

    ``fake`` makes results of the right shape, strides and dtype without computing them; ``flops`` counts, from the same
    arguments, the operations of its matrix products and convolutions as PyTorch counts its own: two for each
    multiplication.
    """

    def register(function: Callable[..., Any]) -> OpOverload[..., Any]:
        name = schema.partition("(")[0]
        _LIBRARY.define(schema, tags=_TAGS)
        for key in ("CUDA", "CPU"):
            _LIBRARY.impl(name, function, key)
        torch.library.register_fake(f"fusednn::{name}", fake, lib=_LIBRARY)
        if flops is not None:
            formula = partial(_counted, flops)
            register_flop_formula(getattr(torch.ops.fusednn, name), get_raw=True)(formula)
        overload: OpOverload[..., Any] = getattr(torch.ops.fusednn, name).default
        IMPLEMENTATIONS[overload] = function
        return overload

    return register


def given(result: Tensor) -> Tensor | None:
    """An operator's result to save for the backward pass: None for the empty tensor that stands for it.

    PyTorch saves nothing there, and hooks that measure or compress what is saved don't expect anything empty.
    """
    return result if result.numel() else None


def _counted(flops: Callable[..., int], *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    """A formula as `torch.utils.flop_counter` calls it, which also hands over the results."""
    return flops(*args, **kwargs)
