"""Gradients that can be differentiated again: those of stock operators, and those that are linear."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

__all__ = ["LinearGradient", "stock_gradients"]


def stock_gradients(
    function: Callable[..., Tensor], operands: Sequence[Tensor | None], needed: Sequence[bool], g: Tensor
) -> list[Any]:
    """Gradients of ``function(*operands)``, stock operators, for the operands that are ``needed``; None for others."""
    with torch.enable_grad():
        y = function(*operands)
    wanted = [operand if need else None for operand, need in zip(operands, needed, strict=True)]
    given = [operand for operand in wanted if operand is not None]
    found = iter(torch.autograd.grad(y, given, g, create_graph=True) if given else ())
    return [None if operand is None else next(found) for operand in wanted]


class LinearGradient(Function):
    """``operator(g, *saved, *arguments)`` as a differentiable function, where it is linear in g and its own adjoint.

    So it is where the backward pass multiplies by what bits or a seed tell: its derivative is itself again.  ``saved``
    are two tensors, or one of them None; ``anchors`` as of `fusednn.autograd.anchors`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        g: Tensor,
        mask: Tensor | None,
        seed: Tensor | None,
        operator: Callable[..., Tensor],
        arguments: tuple[Any, ...],
        *anchors: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(mask, seed)
        ctx.operator, ctx.arguments, ctx.anchors = operator, arguments, anchors
        return operator(g, mask, seed, *arguments)

    @staticmethod
    def backward(ctx: Any, gg: Tensor) -> tuple[Tensor | None, ...]:
        dg = LinearGradient.apply(gg, *ctx.saved_tensors, ctx.operator, ctx.arguments, *ctx.anchors)
        return dg, None, None, None, None, *map(torch.zeros_like, ctx.anchors)
