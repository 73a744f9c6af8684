"""The last step of a loss: partial sums, one of each program, added in a fixed order by a single program."""

from functools import cache

import torch
from torch import Tensor

from ._triton import tl, triton
from .launch import COMPUTE, TRITON_TYPE, Configuration, launch
from .numerics import narrow

__all__ = ["ACCUMULATOR", "reduce_loss", "reduction_configuration"]

#: The dtype of partial sums and of statistics, by that of the operands.
ACCUMULATOR = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float32: torch.float32,
    torch.float64: torch.float64,
}

_WIDTH = 2048
# A single program needs about as long for so many as PyTorch's own sum does to start.
_MOST_PARTIALS = 16 * _WIDTH


@triton.jit(do_not_specialize=["count", "averaged"])
def reduction_kernel(
    partial_pointer,  # sums of losses, and of weights, (2, count)
    loss_pointer,  # loss, ()
    total_pointer,  # sum of all weights, ()
    count: tl.int32,
    averaged: tl.int32,  # divide by the sum of the weights
    COMPUTE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    losses = tl.zeros((WIDTH,), COMPUTE)
    weights = tl.zeros((WIDTH,), COMPUTE)
    for first in range(0, count, WIDTH):
        place = first + tl.arange(0, WIDTH)
        losses += tl.load(partial_pointer + place, mask=place < count, other=0)
        weights += tl.load(partial_pointer + count + place, mask=place < count, other=0)
    loss = tl.sum(losses, 0)
    total = tl.sum(weights, 0)
    if averaged:
        loss = loss / total
    tl.store(loss_pointer, narrow(loss, loss_pointer.dtype.element_ty))
    tl.store(total_pointer, total)


@cache
def reduction_configuration(accumulator: torch.dtype, result: torch.dtype) -> Configuration:
    """Sums in ``accumulator``, the loss in ``result``."""
    sums = "*" + TRITON_TYPE[accumulator]
    return Configuration(
        label=f"reduction {TRITON_TYPE[accumulator]} to {TRITON_TYPE[result]}",
        kernel=reduction_kernel,
        signature=(
            ("partial_pointer", sums),
            ("loss_pointer", "*" + TRITON_TYPE[result]),
            ("total_pointer", sums),
            ("count", "i32"),
            ("averaged", "i32"),
        ),
        constants=(("COMPUTE", COMPUTE[accumulator]), ("WIDTH", _WIDTH)),
        threads=256,
    )


def reduce_loss(partial: Tensor, dtype: torch.dtype, *, averaged: bool) -> tuple[Tensor, Tensor]:
    """The sum of losses, divided by that of their weights if ``averaged``, in ``dtype``; and the sum of the weights.

    ``partial`` holds sums of losses and of weights, (2, programs).
    """
    if partial.shape[1] > _MOST_PARTIALS:
        partial = partial.sum(1, keepdim=True)
    loss = torch.empty((), dtype=dtype, device=partial.device)
    total = torch.empty((), dtype=partial.dtype, device=partial.device)
    configuration = reduction_configuration(partial.dtype, dtype)
    launch(configuration, 1, partial, loss, total, partial.shape[1], int(averaged))
    return loss, total
