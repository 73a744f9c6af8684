"""The accuracy rule over several draws of operands."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fusednn.testing import value_and_gradients
from fusednn.testing.accuracy import one_rounding

__all__ = ["check_over_draws"]


def check_over_draws(
    ours: Callable[..., Tensor],
    stock: Callable[..., Tensor],
    draws: Sequence[tuple[Sequence[Tensor], Tensor]],
) -> None:
    """Hold the median over ``draws``, operands and the gradient of the value, of our largest error to twice stock's.

    A gradient of a few channels has a few numbers, of which either may happen to round none by much: ours and PyTorch's
    errors have the same median, and in single draws either is several times the other.  Those are draws that magnify
    what little the statistics are off.  In one of 40 rows behind ReLU our variance is off by 5e-7, and the weight's
    gradient by five roundings, in the interpreter: NumPy adds the rows one after another.  Compiled, in a tree, it is
    off by 5e-8, where PyTorch's deviation is by 3e-7.
    """
    errors: list[list[Tensor]] = []  # of each draw, of value and gradients: ours, stock's, and one rounding
    for tensors, gradient in draws:
        mine, theirs, exact = (
            value_and_gradients(function, [t.to(dtype) for t in tensors], gradient.to(dtype))
            for function, dtype in ((ours, None), (stock, None), (stock, torch.float64))
        )
        results = zip((mine[0], *mine[1]), (theirs[0], *theirs[1]), (exact[0], *exact[1]), strict=True)
        errors.append([_errors(*each) for each in results])
    for place, each in enumerate(zip(*errors, strict=True)):
        own, others, rounding = torch.stack(each).median(0).values
        what = f"gradient of operand {place - 1}" if place else "value"
        assert own <= 2 * others.clamp_min(rounding), f"{what}: errors of {own:.3g}, stock's of {others:.3g}"


def _errors(mine: Tensor, theirs: Tensor, exact: Tensor) -> Tensor:
    largest = [(one.double() - exact).abs().max() for one in (mine, theirs)]
    return torch.stack([*largest, one_rounding(exact.abs().max(), mine.dtype)])
