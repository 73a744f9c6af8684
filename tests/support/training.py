"""Steps of training: a few, to see that a network learns; one, beside that of another."""

import torch
from torch import Tensor, nn

__all__ = ["assert_same_step", "losses"]


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


def assert_same_step(one: nn.Module, other: nn.Module, x: Tensor) -> None:
    """Two models give the same result, and the same gradients but for the order of their sums."""
    results = [model(x) for model in (one, other)]
    torch.testing.assert_close(*results)
    for y in results:
        y.sum().backward()
    for ours, theirs in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)
