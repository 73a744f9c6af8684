"""The accuracy rule over several draws of operands."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fusednn.testing import assert_accurate, value_and_gradients

__all__ = ["check_over_draws"]


def check_over_draws(
    ours: Callable[..., Tensor],
    stock: Callable[..., Tensor],
    draws: Sequence[tuple[Sequence[Tensor], Tensor]],
) -> None:
    """Hold values and gradients of all ``draws``, operands and the gradient of the value, to the largest error that
    stock makes in any of them.

    A gradient of a few channels has a few numbers, of which PyTorch may happen to round none by much: over a dozen
    draws, ours and its errors have the same median, and in single ones either is up to six times the other.
    """
    results: list[list[Tensor]] = []
    for function, dtype in ((ours, None), (stock, None), (stock, torch.float64)):
        found = []
        for tensors, gradient in draws:
            value, gradients = value_and_gradients(function, [t.to(dtype) for t in tensors], gradient.to(dtype))
            found.append((value, *gradients))
        results.append([torch.stack(each) for each in zip(*found, strict=True)])
    for place, (mine, theirs, exact) in enumerate(zip(*results, strict=True)):
        assert_accurate(mine, theirs, exact, f"gradient of operand {place - 1}" if place else "value")
