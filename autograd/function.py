"""Functions with gradients that are applied to plain tensors alone, as they are behind a decision."""

from typing import Any

import torch

__all__ = ["Function"]


class Function(torch.autograd.Function):
    """An `torch.autograd.Function` whose ``apply`` is PyTorch's in C++.

    What PyTorch does before, in Python, takes as long as a launch: it looks for transforms, in which no kernel is
    taken, and unwraps arguments that left one, which `fusednn.autograd.decisions.decided_once` does.  A compiler never
    sees this ``apply``: it traces ``forward`` and ``backward``.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.apply = super(torch.autograd.Function, cls).apply  # type: ignore[method-assign, misc]
