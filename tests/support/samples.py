"""The activations under test: our function, stock's, our layer, and inputs that hurt."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusednn import autograd
from fusednn.autograd.activation import STOCK
from fusednn.layers.twin import TWINS
from fusednn.testing import check_against_stock


def stock_quick_gelu(input: Tensor) -> Tensor:
    return STOCK["quick_gelu"](input, 0.0, 0.0)


def stock_relu_squared(input: Tensor) -> Tensor:
    return STOCK["relu_squared"](input, 0.0, 0.0)


def stock_squareplus(input: Tensor, b: float = 4.0) -> Tensor:
    return STOCK["squareplus"](input, b, 0.0)


#: What PyTorch has no function of, by name.
WITHOUT_FUNCTION: dict[str, Callable[..., Tensor]] = {
    "quick_gelu": stock_quick_gelu,
    "relu_squared": stock_relu_squared,
    "squareplus": stock_squareplus,
}


@dataclass(frozen=True)
class Case:
    """One activation with some arguments.  ``slopes`` asks for a weight operand with one slope per channel."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    slopes: bool = False

    @property
    def ours(self) -> Callable[..., Tensor]:
        return partial(getattr(autograd, self.name), **self.arguments)

    @property
    def stock(self) -> Callable[..., Tensor]:
        return partial(WITHOUT_FUNCTION.get(self.name) or getattr(F, self.name), **self.arguments)

    def check(self, operands: list[Tensor], gradient: Tensor) -> None:
        """Hold value and gradients to stock's."""
        check_against_stock(
            self.ours,
            self.stock,
            operands,
            gradient,
            float32_constants=self.name in _FLOAT32_CONSTANTS,
            saved_output_scale=self._saved_output_scale,
        )

    @property
    def _saved_output_scale(self) -> float:
        # ELU's gradient is y + alpha below 0, CELU's y / alpha + 1; a sigmoid's y - y^2, a tanh's 1 - y^2.
        if self.name in _SAVED_OUTPUT_SCALES:
            return _SAVED_OUTPUT_SCALES[self.name]
        return 1.0 / self.arguments.get("alpha", 1.0) if self.name == "celu" else 0.0

    @property
    def inplace(self) -> bool:
        without = ("gelu", "logsigmoid", "prelu", "sigmoid", "softplus", "softsign", "tanh")
        return self.name not in (*without, *WITHOUT_FUNCTION)

    def operands(self, x: Tensor) -> list[Tensor]:
        if not self.slopes:
            return [x]
        return [x, torch.linspace(-0.5, 0.9, x.shape[1], dtype=x.dtype, device=x.device)]

    def __str__(self) -> str:
        return "-".join([self.name, *(f"{value}" for value in self.arguments.values())])


# Stock rounds 1/6 and 1/alpha to float32 even in float64.
_FLOAT32_CONSTANTS = ("celu", "hardsigmoid")
_SAVED_OUTPUT_SCALES = {"elu": 1.0, "selu": 1.0, "sigmoid": 1.0, "tanh": 2.0}


CASES = [
    Case("celu"),
    Case("celu", {"alpha": 0.3}),
    Case("elu"),
    Case("elu", {"alpha": 2.5}),
    Case("gelu"),
    Case("gelu", {"approximate": "tanh"}),
    Case("hardsigmoid"),
    Case("hardswish"),
    Case("hardtanh"),
    Case("hardtanh", {"min_val": -0.5, "max_val": 2.0}),
    Case("leaky_relu"),
    Case("leaky_relu", {"negative_slope": -0.7}),
    Case("logsigmoid"),
    Case("mish"),
    Case("prelu", slopes=True),
    Case("quick_gelu"),
    Case("relu"),
    Case("relu6"),
    Case("relu_squared"),
    Case("rrelu"),
    Case("selu"),
    Case("sigmoid"),
    Case("silu"),
    Case("softplus"),
    Case("softplus", {"beta": 3.0, "threshold": 1.0}),
    Case("softsign"),
    Case("squareplus"),
    Case("squareplus", {"b": 0.3}),
    Case("tanh"),
    Case("threshold", {"threshold": 0.1, "value": -20.0}),
]

#: The activation layer of each ``torch.nn`` class.
LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    stock: ours
    for stock, ours in TWINS.items()
    if ours.__module__.rpartition(".")[2] in ("activation", "prelu", "rrelu")
}
