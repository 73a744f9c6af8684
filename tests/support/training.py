"""A few steps of training, to see that a network learns."""

import torch
from torch import Tensor, nn

__all__ = ["losses"]


def losses(model: nn.Module, x: Tensor, target: Tensor, *, steps: int, lr: float) -> list[float]:
    """The cross-entropies of so many steps of gradient descent, each before its step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    values = []
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    return values
