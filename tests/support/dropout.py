"""The dropout functions with one mask, and what they are tried on."""

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor

from fusednn import autograd
from fusednn.testing import random_tensor

FUNCTIONS = ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout")
SHAPES = {
    "dropout": (3, 5, 16, 17),
    "alpha_dropout": (3, 5, 16, 17),
    "dropout1d": (6, 5, 20),
    "dropout3d": (3, 5, 2, 4, 6),
}
P = 0.3
every_function = pytest.mark.parametrize("name", FUNCTIONS)


def sample(name: str, dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    return random_tensor(SHAPES.get(name, (3, 5, 4, 9)), dtype, device, seed)


def seeded(name: str, p: float = P) -> Callable[[Tensor], Tensor]:
    """Our function, with the same mask at every call."""

    def call(x: Tensor) -> Tensor:
        torch.manual_seed(11)
        y: Tensor = getattr(autograd, name)(x, p, training=True)
        return y

    return call


def compiled_and_eager(
    function: Callable[..., Tensor], operands: Sequence[Tensor], wanted: Sequence[Tensor] = ()
) -> Iterator[tuple[Tensor, Tensor]]:
    """Result and gradients of a function that draws, of all operands or those that are ``wanted``, from one seed."""
    torch._dynamo.reset()
    results = []
    for run in (torch.compile(function, fullgraph=True, backend="aot_eager"), function):
        torch.manual_seed(2)
        y = run(*operands)
        results.append((y, *torch.autograd.grad(y.square().sum(), wanted or operands)))
    return zip(*results, strict=True)
