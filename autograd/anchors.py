"""What the graph of a second derivative hangs on where it is zero."""

import torch
from torch import Tensor

__all__ = ["anchors_of"]


def anchors_of(*operands: Tensor | None) -> tuple[Tensor, ...]:
    """For each operand that requires gradients an empty tensor which depends on it, or the operand, where it is a leaf:
    the graph holds it anyway.

    Where what is saved for the backward pass (bits, a code) doesn't depend on the operands, neither does the gradient
    that is made of it; its derivative with respect to them is zero, but must exist, as it does in PyTorch.  So the
    gradient, as a differentiable function, takes these besides.  They aren't saved as other tensors are, since hooks of
    saved tensors, which may look for a maximum, never see an empty one of PyTorch's.  Compiled code has no second
    derivatives.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return ()
    needed = (operand for operand in operands if operand is not None and operand.requires_grad)
    return tuple(operand if operand.is_leaf else torch.as_strided_copy(operand, (0,), (1,)) for operand in needed)
