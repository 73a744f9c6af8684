"""The pointwise losses under test: our function, stock's, and operands in the range of each.  Logits that hurt."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fusednn import autograd
from fusednn.testing import check_against_stock, random_tensor

REDUCTIONS = ("none", "mean", "sum")


def odd_lines(lines: int, length: int, device: str) -> Tensor:
    """Zeros, but for five lines of -inf, NaN and infinities; in the last of these all but one element is -inf."""
    infinity = float("inf")
    x = torch.zeros(lines, length, device=device)
    x[0] = -infinity
    x[1, 2] = float("nan")
    x[2, 1] = infinity
    x[3, 3] = -infinity
    x[4, : length - 1] = -infinity
    return x


@dataclass(frozen=True)
class Loss:
    """A loss with some arguments.  ``weights`` are tensors that it takes by name, in any dtype."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)

    def ours(self, **options: Any) -> Callable[[Tensor, Tensor], Tensor]:
        return partial(self._call, getattr(autograd, self.name), **options)

    def stock(self, **options: Any) -> Callable[[Tensor, Tensor], Tensor]:
        return partial(self._call, getattr(F, self.name), **options)

    def _call(self, function: Callable[..., Tensor], x: Tensor, t: Tensor, **options: Any) -> Tensor:
        weights = {name: weight.to(x.device, x.dtype) for name, weight in self.weights.items()}
        return function(x, t, **self.arguments, **weights, **options)

    def operands(self, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
        """Input and target, in the range of the loss and about its knees."""
        x, t = (random_tensor(shape, torch.float64, device, seed) for seed in (0, 1))
        if self.name == "binary_cross_entropy":
            x = x.sigmoid().clamp(0.02, 0.98)
        if self.name.startswith("binary") or (self.name == "kl_div" and "log_target" not in self.arguments):
            t = t.sigmoid().clamp(0.02, 0.98)
        return x.to(dtype), t.to(dtype)

    def check(self, x: Tensor, t: Tensor, gradient: Tensor | None = None, **options: Any) -> None:
        """Hold value and gradients to stock's; ``gradient`` is that of the loss, 0.75 by default."""
        ours, stock = self.ours(**options), self.stock(**options)
        if gradient is None:
            gradient = torch.full_like(stock(x, t).detach(), 0.75)
        check_against_stock(ours, stock, [x, t], gradient)

    def __str__(self) -> str:
        return "-".join([self.name, *map(str, self.arguments.values()), *self.weights])


LOSSES = [
    Loss("mse_loss"),
    Loss("l1_loss"),
    Loss("smooth_l1_loss", {"beta": 0.5}),
    Loss("smooth_l1_loss", {"beta": 0}),
    Loss("huber_loss", {"delta": 1.5}),
    Loss("binary_cross_entropy"),
    Loss("binary_cross_entropy_with_logits"),
    Loss("binary_cross_entropy_with_logits", {}, {"pos_weight": torch.tensor([0.3, 1.0, 1.7, 5.0, 0.0])}),
    Loss("kl_div"),
    Loss("kl_div", {"log_target": True}),
]
