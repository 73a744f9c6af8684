"""What an optimizer's class says of a parameter group: the kernels' algorithm, and its numbers."""

from typing import Any, NamedTuple

import torch

from ..kernels.functions.optimizer import ALGORITHMS, Algorithm

__all__ = ["Group", "Recipe", "gradient_dtype", "with_gradients"]

Group = dict[str, Any]


class Recipe(NamedTuple):
    """A group's update: an algorithm of the kernels, and its numbers.  Any of them may be a one-element tensor."""

    algorithm: str
    a: Any = 0.0
    b: Any = 0.0
    c: Any = 0.0
    eps: Any = 0.0
    weight_decay: Any = 0.0
    decoupled_weight_decay: Any = 0.0

    @property
    def row(self) -> Algorithm:
        return ALGORITHMS[self.algorithm]

    def numbers(self) -> dict[str, Any]:
        """By the names that the kernels' settings have."""
        return {name: value for name, value in self._asdict().items() if name != "algorithm"}


def with_gradients(group: Group) -> list[Any]:
    """The parameters that a step updates."""
    return [parameter for parameter in group["params"] if parameter.grad is not None]


def gradient_dtype(recipe: Recipe, parameter: Any) -> torch.dtype:
    """Of the gradient as stock's update sees it: weight decay adds the parameter."""
    dtype: torch.dtype = parameter.grad.dtype
    return torch.promote_types(dtype, parameter.dtype) if recipe.weight_decay != 0 else dtype
