"""The accuracy rule: our error against float64 is at most twice stock's own, plus one rounding of the output.

Stock's own error is the largest over the tensor, and not less than one rounding of the largest value, which a few lucky
elements may hide.  Nothing here scales with the size of a reduction, so a test can't be made to pass by making it
larger.  And it is not more than a few roundings: where stock's is, as when rounding makes another element the maximum,
an allowance of twice as much would hide what the test is there to see; unless all that it looks at cancels.  In float64
the reference is stock's own result, whose error isn't known: there it is taken to be sixteen roundings of the largest
value, or of 1.

At one place stock's error may be small by luck, which is another on a processor with other vectors.  So where ours is
too large, stock's is looked for at operands a few roundings away, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

__all__ = ["assert_accurate", "assert_same_bits", "one_rounding"]

FLOAT64_ROUNDINGS = 16
MOST_ROUNDINGS = 10
#: Tests' operands are of the order of 1: where all results are smaller than this, what they are sums of cancels.
CANCELLED = 2.0**-7


def assert_accurate(
    ours: Tensor,
    stock: Tensor,
    reference: Tensor,
    what: str = "result",
    *,
    inherent: Tensor | float = 0.0,
    chosen: bool = True,
    nearby: Callable[[], Iterable[tuple[Tensor, Tensor]]] = tuple,
) -> None:
    """Hold ``ours`` to the rule; ``stock`` is PyTorch's result in the same dtype, ``reference`` its result in float64.

    Where a value isn't finite, ours must be what stock or the reference is.  ``inherent`` is an error, per element,
    that follows from rounding what the operation is specified to save for its backward pass.  ``chosen`` says that the
    test chose its inputs, and could take others where stock's error, and so ours, is large.  ``nearby`` makes pairs of
    ``stock`` and ``reference`` at operands a few roundings away.
    """
    if ours.dtype != stock.dtype:
        raise AssertionError(f"{what}: dtype {ours.dtype}, stock {stock.dtype}")
    if ours.shape != stock.shape:
        raise AssertionError(f"{what}: shape {tuple(ours.shape)}, stock {tuple(stock.shape)}")
    ours64, stock64, reference = ours.detach().double(), stock.detach().double(), reference.detach().double()
    finite = ours64.isfinite() & stock64.isfinite() & reference.isfinite()
    same_as_stock = (ours64 == stock64) | (ours64.isnan() & stock64.isnan())
    same_as_reference = (ours64 == reference) | (ours64.isnan() & reference.isnan())
    odd = ~(finite | same_as_stock | same_as_reference)
    if odd.any():
        raise AssertionError(
            f"{what}: {int(odd.sum())} values that are not finite differ from stock: ours {ours64[odd][:4].tolist()}, "
            f"stock {stock64[odd][:4].tolist()}, float64 {reference[odd][:4].tolist()}"
        )
    if not finite.any():
        return
    error = (ours64 - reference)[finite].abs()
    stocks_error = _largest_error(stock64, reference, ours.dtype, chosen)
    inherent = torch.as_tensor(inherent).double().expand(reference.shape)[finite]
    rounding = one_rounding(reference[finite], ours.dtype)
    if not (error <= 2 * stocks_error + rounding + inherent).all():
        for other, exact in nearby():
            error_there = _largest_error(other.detach().double(), exact.detach().double(), ours.dtype, chosen)
            stocks_error = torch.maximum(stocks_error, error_there)
    allowed = 2 * stocks_error + rounding + inherent
    worst = int((error - allowed).argmax())
    if not error[worst] <= allowed[worst]:
        raise AssertionError(
            f"{what}: error {error[worst]:.3g} at {reference[finite][worst]:.6g} in {ours.dtype}, "
            f"{allowed[worst]:.3g} allowed"
        )


def _largest_error(stock: Tensor, reference: Tensor, dtype: torch.dtype, chosen: bool) -> Tensor:
    """Stock's, as the rule takes it."""
    finite = stock.isfinite() & reference.isfinite()
    if not finite.any():
        return reference.new_zeros(())
    largest = reference[finite].abs().max()
    if dtype == torch.float64:
        return FLOAT64_ROUNDINGS * one_rounding(largest.clamp_min(1), dtype)
    rounding = one_rounding(largest, dtype)
    error = torch.maximum((stock - reference)[finite].abs().max(), rounding)
    return error.clamp(max=MOST_ROUNDINGS * rounding) if chosen and largest >= CANCELLED else error


def one_rounding(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance between neighbouring numbers of ``dtype`` at ``values``."""
    info = torch.finfo(dtype)
    return values.abs().clamp_min(info.smallest_normal) * info.eps


def assert_same_bits(first: Tensor, second: Tensor, what: str = "result") -> None:
    """Bit for bit the same values, NaN payloads apart."""
    if not torch.equal(first.isnan(), second.isnan()):
        raise AssertionError(f"{what}: different NaNs")
    if not torch.equal(first.nan_to_num(), second.nan_to_num()):
        raise AssertionError(f"{what}: different bits")
