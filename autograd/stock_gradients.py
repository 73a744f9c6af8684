"""Gradients that can be differentiated again: those of stock operators."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["stock_gradients"]


def stock_gradients(
    y: Tensor, operands: Sequence[Tensor | None], needed: Sequence[bool], g: Tensor
) -> list[Tensor | None]:
    """Gradients of the operands that are ``needed``, None for others, from ``y`` as stock operators computed it."""
    wanted = [operand for operand, need in zip(operands, needed, strict=True) if need and operand is not None]
    found = iter(torch.autograd.grad(y, wanted, g, create_graph=True)) if wanted else iter(())
    return [
        next(found) if need and operand is not None else None for operand, need in zip(operands, needed, strict=True)
    ]
