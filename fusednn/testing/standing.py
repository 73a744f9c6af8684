"""What every comparison with stock also checks: operands untouched, outputs fully written, the same bits twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ..autograd import plans
from ..autograd.operators import forget_plans
from .accuracy import assert_accurate, assert_same_bits, one_rounding
from .bounds import checked_bounds

__all__ = ["check_against_stock", "leaf", "poisoned_memory", "value_and_gradients"]

#: Every function that gives memory as it comes.
_ALLOCATORS: list[tuple[Any, str]] = [
    *((torch, name) for name in ("empty", "empty_like", "empty_permuted", "empty_strided")),
    *((Tensor, name) for name in ("new_empty", "new_empty_strided")),
]
#: How many times stock's error is looked for beside the operands.
_NEARBY = 3


@contextmanager
def poisoned_memory(byte: int) -> Iterator[None]:
    """Fill fresh memory with ``byte``: an element that a kernel leaves unwritten shows."""

    def poison(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate_poisoned(*args: Any, **kwargs: Any) -> Tensor:
            tensor = allocate(*args, **kwargs)
            with torch.no_grad(), _disable_current_modes():  # of which one records what a plan repeats
                storage = torch.tensor([], dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
                storage.fill_(byte)
            return tensor

        return allocate_poisoned

    with ExitStack() as patches:
        for owner, name in _ALLOCATORS:
            patches.enter_context(mock.patch.object(owner, name, poison(getattr(owner, name))))
        poisoned = {device: poison(allocate) for device, allocate in plans.ALLOCATORS.items()}
        patches.enter_context(mock.patch.dict(plans.ALLOCATORS, poisoned))
        forget_plans()  # those made before keep what they allocate by
        patches.callback(forget_plans)
        yield


def leaf(tensor: Tensor) -> Tensor:
    """A leaf that requires gradients and shares the layout (holes and repeats included) of ``tensor``."""
    return tensor.detach().requires_grad_(tensor.is_floating_point())


def value_and_gradients(
    function: Callable[..., Tensor], tensors: Sequence[Tensor], gradient: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The value at ``tensors``, and their gradients where the value's is ``gradient``."""
    leaves = [leaf(tensor) for tensor in tensors]
    y = function(*leaves)
    return y.detach(), torch.autograd.grad(y, leaves, gradient)


def check_against_stock(
    ours: Callable[..., Tensor],
    stock: Callable[..., Tensor],
    tensors: Sequence[Tensor],
    gradient: Tensor,
    *,
    float32_constants: bool = False,
    saved_output_scale: float = 0.0,
) -> None:
    """Value and gradients of ``ours(*tensors)``: accurate, in the input's memory format, fully written, the same twice;
    the operands untouched, and nothing touched beside them.  Raises AssertionError.

    ``saved_output_scale`` is |d gradient / d output| where the operation reads its gradient off its saved output, whose
    rounding is then an error inherent to the gradient.  ``float32_constants`` says that stock computes with constants
    rounded to float32 in float64 too, and can't be a better reference than that.
    """
    before = [tensor.clone() for tensor in (*tensors, gradient)]
    with poisoned_memory(0xA5):
        y, gradients = value_and_gradients(ours, tensors, gradient)
    with poisoned_memory(0x5A), checked_bounds():
        y_again, gradients_again = value_and_gradients(ours, tensors, gradient)
    assert_same_bits(y, y_again, "value, run twice over different memory")
    for first, second in zip(gradients, gradients_again, strict=True):
        assert_same_bits(first, second, "gradient, run twice over different memory")
    for tensor, copy in zip((*tensors, gradient), before, strict=True):
        assert_same_bits(tensor, copy, "operand, after the call")

    def results(tensors: Sequence[Tensor], gradient: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Stock's, value and gradients, each beside the one in float64."""
        y, gradients = value_and_gradients(stock, tensors, gradient)
        y64, gradients64 = value_and_gradients(stock, [t.double() for t in tensors], gradient.double())
        return list(zip((y, *gradients), (y64, *gradients64), strict=True))

    @cache
    def beside() -> list[list[tuple[Tensor, Tensor]]]:
        return [results([_nearer_to_zero(t, n) for t in tensors], gradient) for n in range(1, 1 + _NEARBY)]

    def nearby(place: int) -> Callable[[], list[tuple[Tensor, Tensor]]]:
        return lambda: [each[place] for each in beside()]

    (y_stock, y_reference), *gradients_expected = results(tensors, gradient)
    float64_error = torch.finfo(torch.float32).eps if float32_constants and y.dtype == torch.float64 else 0.0
    inherent = float64_error * y_reference.abs().nan_to_num()
    assert_accurate(y, y_stock, y_reference, "value", inherent=inherent, nearby=nearby(0))
    if y.shape == tensors[0].shape:
        kept = torch.empty_like(tensors[0]).stride()  # the input's memory format; stock's own results mostly keep it
        if y.stride() != kept:
            raise AssertionError(f"strides {y.stride()}, not {kept}")
    rounding = saved_output_scale * one_rounding(y.double(), y.dtype).nan_to_num() + float64_error
    for n, (ours_, expected) in enumerate(zip(gradients, gradients_expected, strict=True), 1):
        inherent = rounding * gradient.abs().double() if ours_.shape == gradient.shape else torch.zeros(())
        assert_accurate(ours_, *expected, "gradient", inherent=inherent, nearby=nearby(n))


def _nearer_to_zero(tensor: Tensor, steps: int) -> Tensor:
    """Each value a few roundings smaller, so none leaves its range; in the same layout."""
    if not tensor.is_floating_point():
        return tensor
    moved = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    return moved.copy_(tensor * (1 - 2 * steps * torch.finfo(tensor.dtype).eps))
