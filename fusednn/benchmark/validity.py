"""Whether a contestant computes the right thing.  A fast wrong kernel is no result, so this comes before any timing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .cases import Case, Inputs, forward, gradients
from .protocol import WrongResultError

__all__ = ["LIMIT", "check", "check_fresh", "compare"]

# Worst |result - reference| / (1 + |reference|), in units of the dtype's epsilon.  Loose on purpose: the tests hold the
# kernels to PyTorch's own error; this catches a wrong formula, layout or tail.
LIMIT = {torch.bfloat16: 4.0, torch.float16: 4.0, torch.float32: 128.0, torch.float64: 128.0}


def check(case: Case, function: Callable[..., Tensor], inputs: Inputs) -> float:
    """Compare value and gradients with eager PyTorch's in float64; returns the worst error in epsilons of the dtype.

    Raises WrongResultError where it is too large, or where a shape or dtype isn't eager's.
    """
    y = forward(function, inputs)
    found = (y, *gradients(y, inputs))
    for actual, like in zip(found, (inputs.g, *inputs.differentiable), strict=True):
        if (actual.shape, actual.dtype) != (like.shape, like.dtype):
            raise WrongResultError(
                f"{case.id}: {actual.dtype} {tuple(actual.shape)}, not {like.dtype} {tuple(like.shape)}"
            )
    if case.operation.check is not None:
        return case.operation.check(case, y, found[1:], inputs)
    return compare(case, found, inputs, case.operation.stock)


def check_fresh(case: Case, function: Callable[..., Tensor], inputs: Inputs) -> None:
    """Raises WrongResultError where two calls give the same memory: the second's writes would stay in the cache."""
    first, second = (forward(function, inputs) for _ in range(2))
    if first.numel() and first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr():
        raise WrongResultError(f"{case.id}: every call writes its result over the last one's")


def compare(case: Case, found: Sequence[Tensor], inputs: Inputs, stock: Callable[..., Tensor]) -> float:
    """The worst error of (value, *gradients) against ``stock`` in float64, in epsilons of the case's dtype.

    Raises WrongResultError where it is too large.
    """
    exact = inputs.upcast()
    reference = forward(stock, exact)
    worst = 0.0
    names = ("value", "gradient of the first operand", "gradient of another operand")
    for i, (actual, expected) in enumerate(zip(found, (reference, *gradients(reference, exact)), strict=True)):
        error = _worst_error(actual, expected, case.dtype)
        if not error <= LIMIT[case.dtype]:  # NaN fails too
            raise WrongResultError(f"{case.id}: {names[min(i, 2)]} is {error:.3g} epsilons from eager PyTorch's")
        worst = max(worst, error)
    return worst


def _worst_error(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> float:
    difference = (actual.detach().double() - expected.detach()).abs_()
    return float((difference / (1 + expected.detach().abs())).max()) / torch.finfo(dtype).eps
