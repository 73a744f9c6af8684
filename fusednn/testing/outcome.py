"""What a call leaves behind, and whether that of ours is as near to float64 as stock's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from .accuracy import assert_accurate, assert_same_bits

__all__ = ["Outcome", "assert_outcome", "evaluate"]


class Outcome(NamedTuple):
    """Outputs, gradients (None: not reached), and operands that the call may have updated."""

    outputs: list[Tensor]
    gradients: list[Tensor | None]
    updated: list[Tensor]


def evaluate(
    function: Callable[..., Any],
    arguments: Sequence[Any],
    options: Mapping[str, Any],
    dtype: torch.dtype | None = None,
    parameters: Sequence[Tensor] = (),
    *,
    inplace: bool = False,
    arrange: Callable[[Tensor], Tensor] = lambda gradient: gradient,
) -> Outcome:
    """Call, and differentiate with respect to operands and parameters; computed in ``dtype``.

    The call gets tensors that require gradients themselves, and copies of others.  ``arrange`` lays out the gradients
    of the outputs.
    """
    operands: list[Tensor] = []

    def convert(value: object) -> object:
        if isinstance(value, torch.dtype) and value.is_floating_point and dtype is not None:
            return dtype
        if not isinstance(value, Tensor):
            return value
        operand = value.detach() if value.requires_grad else value.clone()
        operand = operand.to(dtype) if operand.is_floating_point() else operand
        operands.append(operand.requires_grad_(value.requires_grad))
        return operand

    first, *rest = tree_map(convert, tuple(arguments))
    options = tree_map(convert, dict(options))
    outputs = tree_leaves(function(first * 1 if inplace else first, *rest, **options))
    wanted = [operand for operand in (*operands, *parameters) if operand.requires_grad]
    ends = [output for output in outputs if output.requires_grad]
    seeds = [arrange(torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view(y.shape).to(y)) for y in ends]
    gradients = torch.autograd.grad(ends, wanted, seeds, allow_unused=True) if ends and wanted else []
    return Outcome(
        [output.detach() for output in outputs],
        list(gradients),
        [operand for operand in operands if not operand.requires_grad],
    )


def assert_outcome(ours: Outcome, stock: Outcome, reference: Outcome, inherent: float = 0.0) -> None:
    """Hold ours to the accuracy rule; ``reference`` is stock's outcome in float64."""
    for what in Outcome._fields:
        for mine, theirs, exact in zip(*(getattr(outcome, what) for outcome in (ours, stock, reference)), strict=True):
            if theirs is None:
                if mine is not None:
                    raise AssertionError(f"{what}: stock has none")
            elif mine is None:
                raise AssertionError(f"{what}: only stock has one")
            elif theirs.is_floating_point():
                assert_accurate(mine, theirs, exact, what, inherent=inherent, chosen=False)
            else:
                assert_same_bits(mine, theirs, what)
